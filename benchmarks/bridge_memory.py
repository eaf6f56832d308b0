"""Memory and time of `normconv state-dict convert` on a file of 2 GB, beyond the mapped file.

    python -m benchmarks.bridge_memory --out docs/results/bridge.json

A safetensors file is made in a temporary folder and converted in a child process of its own, from weight
norm to plain and back. The child converts a small file first, so that no import is measured; then its
anonymous resident memory (RssAnon in /proc/self/status, Linux) is sampled every two milliseconds. Pages
of the mapped file are the system's to take back and are not counted. The page beside the JSON file is
written from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.markers import page_of
from normconv.bridges import convert_file
from normconv.bridges.streaming import SafetensorsWriter
from normconv.bridges.tensors import Spec

BOUND = 300 * 10**6
SIDE = 4096  # a weight of 67 MB
LAYERS = 30
CASES = (
    ("safetensors, legacy-wn to plain", "wn.safetensors", "plain.safetensors", "plain"),
    ("safetensors, plain to torch-wn", "plain.safetensors", "torch.safetensors", "torch-wn"),
    (".pt mapped, legacy-wn to plain", "wn.pt", "from_pt.safetensors", "plain"),
)


def make_file(path: Path, layers: int, side: int) -> None:
    """Write a checkpoint of weight-normed layers, one layer in memory at a time."""
    specs = {}
    for layer in range(layers):
        specs[f"layers.{layer}.weight_g"] = Spec((side, 1), torch.float32)
        specs[f"layers.{layer}.weight_v"] = Spec((side, side), torch.float32)
    writer = SafetensorsWriter(path, specs, {"format": "pt"})
    torch.manual_seed(0)
    for name, spec in specs.items():
        writer.write(name, torch.randn(spec.shape))
    writer.close()


def make_pickled(path: Path, layers: int, side: int) -> None:
    """Write the same names with `torch.save`."""
    torch.manual_seed(0)
    document = {
        f"layers.{layer}.weight_{part}": torch.randn(side, width)
        for layer in range(layers)
        for part, width in (("g", 1), ("v", side))
    }
    torch.save(document, path)


def anonymous() -> int:
    """Return the process's anonymous resident memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux 4.5")


class Peak:
    """The most that `anonymous` said while the block ran."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, anonymous())

    @property
    def extra(self) -> int:
        """In bytes."""
        return self.most - self.before


def child(source: str, out: str, to: str) -> dict[str, Any]:
    """Convert one file and return what it took."""
    layers = {} if to == "plain" else {"layers.*": 0}
    folder = Path(out).parent
    small = folder / ("small" + Path(source).suffix)
    (make_pickled if small.suffix == ".pt" else make_file)(small, 2, 8)
    convert_file(small, folder / "small_plain.safetensors")
    convert_file(
        folder / "small_plain.safetensors",
        folder / "s.safetensors",
        "torch-wn",
        layers=layers or {"*": 0},
    )
    start = time.perf_counter()
    with Peak() as peak:
        report = convert_file(source, out, to, layers=layers)
    return {
        "file": Path(source).stat().st_size,
        "largest tensor": SIDE * SIDE * 4,
        "weights": report.facts["weights converted"],
        "extra": peak.extra,
        "seconds": time.perf_counter() - start,
    }


def page(document: dict[str, Any]) -> str:
    """Return the page for the measurements."""
    rows = [
        "| case | file MB | largest tensor MB | extra MB | bound MB | seconds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        sizes = [case["file"], case["largest tensor"], case["extra"], document["bound"]]
        cells = [case["case"], *(f"{size / 1e6:.0f}" for size in sizes), f"{case['seconds']:.1f}"]
        verdict = "pass" if case["extra"] <= document["bound"] else "miss"
        rows.append("| " + " | ".join([*cells, verdict]) + " |")
    text = [
        "`normconv state-dict convert` reads a mapped file and writes tensor by tensor. Extra is the",
        "growth of the process's anonymous resident memory at its peak; pages of the mapped file do",
        "not count.",
    ]
    command = "python -m benchmarks.bridge_memory --out docs/results/bridge.json"
    return page_of("Memory of the checkpoint bridges", text, command, document["machine"], rows)


def main() -> None:
    """Run the cases, write the JSON file and the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, metavar=("IN", "OUT", "TO"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/bridge.json"))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        make_file(Path(folder, "wn.safetensors"), LAYERS, SIDE)
        make_pickled(Path(folder, "wn.pt"), LAYERS, SIDE)
        for name, source, out, to in CASES:
            files = [str(Path(folder, file)) for file in (source, out)]
            command = [sys.executable, "-m", "benchmarks.bridge_memory", "--child", *files, to]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            cases.append({"case": name, **json.loads(done.stdout.strip().splitlines()[-1])})
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    document = {"machine": machine(), "bound": BOUND, "cases": cases}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()
