"""Fill the tables of docs/results/training-speed.md from the JSON files beside it.

python -m benchmarks.training_tables
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.markers import RESULTS, fill

# By network, batch and micro-batches what a step may take over the floor.
BOUNDS: Mapping[tuple[str, int, int], Mapping[str, float]] = {
    **{
        key: {
            "wn in the optimizer": 1.04,
            "wn in the graph": 1.08,
            "ws in the optimizer": 1.04,
            "ws in the graph": 1.12,
        }
        for key in (("resnet18", 8, 1), ("resnet50", 2, 1))
    },
    ("resnet18", 8, 8): {
        "wn in the optimizer": 1.01,
        "wn in the graph, cached": 1.01,
        "ws in the optimizer": 1.01,
        "ws in the graph, cached": 1.01,
    },
}


def _cases(device: str) -> list[dict[str, Any]]:
    path = RESULTS / "training-speed.json"
    found = json.loads(path.read_text())["cases"].values() if path.exists() else ()
    return [case for case in found if case["device"] == device]


def _table(case: Mapping[str, Any]) -> list[str]:
    shape = f"{case['network']}, batch {case['batch']}"
    shape += f", {case['micro']} micro-batches a step" if case["micro"] > 1 else ""
    shape += f", {case['size']} px" if case["size"] else ""
    how = f"{case['rule']}, {case['dtype']}{', compiled' if case['compiled'] else ''}"
    where = case["machine"]
    at = where.get("device", f"{where['processor']}, {case['threads']} threads")
    bounds = BOUNDS.get((case["network"], case["batch"], case["micro"]), {})
    lines = [
        f"**{shape}** ({how}; {case['rounds']} rounds; {at}; torch {where['versions']['torch']})",
        "",
        "| | ms | over the floor | bound | over BN | peak, MiB more | kept, KiB more | calls | kernels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in case["rows"].items():
        floor = case["rows"][row["compared with"]]
        bound = bounds.get(name) if case["rule"] == "sgd" else None
        ratio = row["over floor"]
        cells = [
            f"{name} ({row['way']})" if row["way"] != "torch" else name,
            f"{row['milliseconds']:.1f}",
            f"{ratio:.3f}",
            "" if bound is None else f"{bound} {'pass' if ratio <= bound else 'miss'}",
            f"{row['over bn']:.3f}" if "over bn" in row else "",
            f"{(row['peak, bytes'] - floor['peak, bytes']) / 2**20:.1f}",
            f"{row['kept more, bytes'] / 2**10:.0f}",
            row["calls of torch"],
            row["kernels"] or "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _tables(device: str, reason: str) -> list[str]:
    tables = [line for case in _cases(device) for line in _table(case)]
    return tables or [reason, ""]


def on_cpu() -> list[str]:
    """Return a table for each case on a CPU."""
    return _tables("cpu", "Not measured yet.")


def on_cuda() -> list[str]:
    """Return a table for each case on CUDA."""
    return _tables("cuda", "Not measured: there was no CUDA device.")


def trajectories() -> list[str]:
    """Return how far fifty steps are from those in the graph."""
    document = json.loads((RESULTS / "trajectories.json").read_text())
    rows = [
        "| | form | `loop` | `foreach` | with a wrong gradient |",
        "|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        options = ", ".join(f"{k}={v}" for k, v in case["options"].items())
        numbers = " | ".join(f"{case[key]:.1e}" for key in ("loop", "foreach", "seen"))
        rows.append(f"| {case['optimizer']}({options}) | {case['form']} | {numbers} |")
    return rows


def main() -> None:
    """Put the tables between their markers."""
    tables = {"trajectories": trajectories, "cpu": on_cpu, "cuda": on_cuda}
    fill(RESULTS / "training-speed.md", tables)


if __name__ == "__main__":
    main()
