"""The works that normconv grew from, each trained once: docs/results/seeds.md and the folder beside it.

    python -m benchmarks.seeds --data DIR        # the folder with MNIST (idx) and CIFAR-10 (zips)

Runs `normconv compare` for each, one after the other, and keeps its JSON, CSV and picture. What has been
run is not run again; `--only NAME` runs one. Pictures are drawn again from the JSON each time.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.markers import RESULTS, fill
from normconv.files import write_json
from normconv.report.curves_plot import plot_curves

FOLDER = RESULTS / "seeds"
_MNIST = "--data-dir data --test-share 0.2"

# Name of the result and what follows `normconv compare`; `data` stands for the folder of images.
RUNS = {
    "tfa-tutorial": "tfa-tutorial --data-dir data --full --seeds 1",
    "mnist-dense": f"mnist-dense {_MNIST} --seeds 3",
    "cifar-convpool-cnn-c": "cifar-convpool-cnn-c --data-dir data --epochs 8",
    "conv-vae": f"conv-vae {_MNIST}",
    "recurrent": f"recurrent {_MNIST} --epochs 10",
    "q-network": "q-network",
    "fashion-microbatch-mnist": (
        "fashion-microbatch --data mnist:data --test-share 0.2 --seeds 3 --epochs 4"
    ),
    "fashion-microbatch-cifar10": (
        "fashion-microbatch --data cifar10:data --batch-sizes 2,64 --limit 8000 --epochs 3"
    ),
}


def run(name: str, data: Path, work: Path) -> None:
    """Train one comparison in a folder of its own and keep what it wrote."""
    out = work / name
    words = [re.sub(r"(^|:)data$", rf"\g<1>{data}", word) for word in RUNS[name].split()]
    start = time.perf_counter()
    command = [sys.executable, "-m", "normconv", "compare", *words, "-o", str(out)]
    subprocess.run(command, check=True)
    document: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    document["command"] = f"normconv compare {RUNS[name]}"
    document["seconds"] = round(time.perf_counter() - start)
    document["machine"] = machine()
    FOLDER.mkdir(exist_ok=True)
    shutil.copyfile(out / "curves.csv", FOLDER / f"{name}.csv")
    write_json(FOLDER / f"{name}.json", document)


def _document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def _number(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        return ""
    percent = key.endswith("accuracy")
    factor, unit = (100, " %") if percent else (1, "")
    value, deviation = row[key] * factor, (row.get(f"{key}_std") or 0.0) * factor
    digits = 3 if abs(value) < 10 else 1
    spread = f" ± {deviation:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{value:.{digits}f}{spread}{unit}"


def table(name: str) -> list[str]:
    """Return the table of one comparison: what the runs end on, and what a step takes."""
    document = _document(name)
    summary = document["summary"]
    columns = {
        "test_accuracy": "right, test",
        "test_return": "return",
        "train_loss": "loss, training",
        "test_loss": "loss, test",
    }
    columns = {key: title for key, title in columns.items() if summary[0].get(key) is not None}
    rows = [
        f"| norm | batch | {' | '.join(columns.values())} | ms a step | times plain |",
        "|---|---|" + "---|" * (len(columns) + 2),
    ]
    for row in summary:
        cells = [_number(row, key) for key in columns]
        step, ratio = row.get("step_ms"), row.get("ratio_to_plain")
        cells += [f"{step:.2f}" if step else "", f"{ratio:.2f}" if ratio else ""]
        rows.append(f"| {row['normalization']} | {row['batch_size']} | {' | '.join(cells)} |")
    how = f"`{document['command']}`, {document['seconds'] / 60:.1f} minutes"
    if data := document["facts"].get("data"):
        how += f"; {data}"
    if note := document.get("note"):
        how += f"; {note}"
    return [how + ".", "", *rows]


def main() -> None:
    """Run what has not been run, then fill the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="without it only the page is filled")
    parser.add_argument("--work", type=Path, help="where unfinished runs are kept")
    parser.add_argument("--only", choices=RUNS)
    options = parser.parse_args()
    if options.data:
        work = options.work or Path(tempfile.mkdtemp())
        for name in [options.only] if options.only else RUNS:
            if not (FOLDER / f"{name}.json").exists():
                run(name, options.data.resolve(), work)
    done = [name for name in RUNS if (FOLDER / f"{name}.json").exists()]
    for name in done:
        plot_curves(_document(name), FOLDER / f"{name}.png")
    fill(RESULTS / "seeds.md", {name: partial(table, name) for name in done})


if __name__ == "__main__":
    main()
