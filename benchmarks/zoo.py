"""Every architecture with BatchNorm of timm, torchvision or transformers: converted and checked.

    python -m benchmarks.zoo --library timm

Random weights, statistics that let the comparison see (`normconv.proof.randomise_norms_`), one process
per architecture under a time and a memory limit, smallest first. Whatever is not converted is recorded
by name with the reason. A run resumes from the results file, which is written after every architecture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.zoo_judge import BOUND, SIGHT
from benchmarks.zoo_listing import LISTING, Entry, listing, representatives
from benchmarks.zoo_measure import TARGETS, measure
from benchmarks.zoo_models import LIBRARIES, NOT_COVERED, preload
from benchmarks.zoo_pool import Limits, Outcome, Tell, run_all
from normconv.files import atomic_path

__all__ = ["Record", "record_of", "run_entries"]

Record = dict[str, Any]


def run_entries(
    library: str,
    entries: Iterable[Entry],
    targets: Sequence[str],
    limits: Limits,
    workers: int,
    done: Callable[[str, Record], None],
) -> None:
    """Measure architectures, each in its process, and hand over each record as it comes."""

    def work(entry: Entry, tell: Tell) -> None:
        measure(library, entry.name, targets, tell)

    for outcome in run_all(entries, work, limits, workers):
        done(outcome.job.name, record_of(outcome))


def record_of(outcome: Outcome[Entry]) -> Record:
    """Make the record of an architecture from what its process told and how it ended."""
    told = dict(outcome.told)
    phase = told.pop("phase", None)
    status = told.pop("status", None)
    reason = told.pop("reason", None)
    if outcome.ended or status is None:
        ended = outcome.ended or "no status told"
        status = ended if ended in ("timeout", "memory") else "crashed"
        reason = f"{ended} during {phase}"
    record: Record = {"status": status, "family": outcome.job.family}
    if reason:
        record["reason"] = reason
    total = {"total": round(outcome.seconds, 1), "processor": round(outcome.processor, 1)}
    seconds = told.pop("seconds", {}) | total
    return record | told | {"seconds": seconds, "peak MiB": round(outcome.peak / 2**20)}


def _read(path: Path) -> dict[str, Record]:
    if not path.exists():
        return {}
    found: dict[str, Record] = json.loads(path.read_text())["architectures"]
    return found


def _write(path: Path, head: dict[str, Any], records: dict[str, Record]) -> None:
    """Write the results with a line an architecture, whole or not at all."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in records.items()]
    text = (
        "{\n" + ",\n".join([*lines, ' "architectures": {\n' + ",\n".join(rows) + "\n }"]) + "\n}\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _chosen(options: argparse.Namespace, records: dict[str, Record]) -> list[Entry]:
    entries = listing(options.library, options.workers, options.listing)
    if options.family:
        entries = [entry for entry in entries if entry.family in options.family]
    if options.names:
        entries = [entry for entry in entries if entry.name in options.names]
    if options.sample:
        entries = representatives(entries)[: options.sample]
    if options.again:
        return entries
    retry = tuple(options.retry.split(",")) if options.retry else ()
    return [e for e in entries if e.name not in records or records[e.name]["status"] in retry]


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    add = parser.add_argument
    add("--library", choices=LIBRARIES, required=True)
    add("--family", nargs="*", help="only these model files")
    add("--names", nargs="*", help="only these architectures")
    add("--sample", type=int, default=0, help="one a family, smallest first, at most so many")
    add("--to", nargs="*", default=list(TARGETS), help="targets")
    add("--out", type=Path)
    add("--workers", type=int, default=1)
    add("--seconds", type=float, default=180, help="limit of each architecture")
    add("--memory-gib", type=float, default=8, help="limit of each architecture")
    add("--budget", type=float, default=math.inf, help="seconds after which none is started")
    add("--listing", type=Path, default=LISTING, help="where the list of architectures is kept")
    add("--again", action="store_true", help="measure what is there already, too")
    add("--retry", help="measure again what has one of these statuses, with commas between")
    options = parser.parse_args(words)
    options.out = options.out or Path(f"docs/results/zoo-{options.library}.json")
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the results file does not have yet, and print a line for each."""
    import torch

    torch.set_num_threads(1)
    options = _options(words)
    preload(options.library)
    records = _read(options.out)
    head = {
        "command": "python -m benchmarks.zoo " + " ".join(words or sys.argv[1:]),
        "machine": machine(),
        "limits": {"seconds": options.seconds, "GiB": options.memory_gib},
        "bounds": {"float64": BOUND, "sight": SIGHT},
        "not covered": NOT_COVERED[options.library],
    }
    chosen = _chosen(options, records)
    start = time.monotonic()
    count = 0

    def done(name: str, record: Record) -> None:
        nonlocal count
        count += 1
        records[name] = record
        _write(options.out, head, records)
        seconds = f"{record['seconds']['total']} s of {time.monotonic() - start:.0f}"
        print(f"{count}/{len(chosen)} {name}: {_summary(record)} {seconds}", flush=True)

    limits = Limits(options.seconds, options.memory_gib * 2**30)
    in_time = takewhile(lambda _: time.monotonic() - start < options.budget, chosen)
    run_entries(options.library, in_time, options.to, limits, options.workers, done)


def _summary(record: Record) -> str:
    target: Record = next(iter(record.get("targets", {}).values()), {})
    error = target.get("float64", {}).get("error")
    parts = [record["status"], record.get("input"), record.get("capture"), target.get("actions")]
    if error is not None:
        parts.append(f"{float(error):.1e}")
    parts += [record.get("reason") or target.get("reason", "")]
    return " ".join(str(part)[:160] for part in parts if part)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
