"""Fill the tables of docs/results/gn-ws.md from the JSON file beside it.

python -m benchmarks.group_norm_tables
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.markers import RESULTS, fill

# Conversion: the largest drops in points that were aimed at; None where it was only to be reported.
_GOALS: dict[str, tuple[float | None, float | None, float | None]] = {
    "gn, one group": (4.0, 2.2, 0.2),
    "gn, 16 channels a group": (4.5, 3.0, 0.3),
    "gn+ws, one group": (None, 4.0, 0.6),
    "gn+ws, 16 channels a group": (None, None, 0.8),
    "wn+mobn": (0.0, None, None),
}
# Fine-tuning: the largest drop in points.
_TUNING_GOAL = 3.0


def _document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "gn-ws.json").read_text())
    return found


def _drops(rows: list[dict[str, Any]], goal: float | None) -> str:
    if not rows:
        return ""
    found = [row["drop"] for row in rows]
    mean = statistics.mean(found)
    several = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    if goal is None:
        return f"{mean:.2f}{several}"
    return f"{mean:.2f}{several}, {'goal' if mean <= goal else '**missed:**'} {goal:g}"


def conversions() -> list[str]:
    """Return the drops of each conversion, mean and range over the seeds."""
    rows = [
        "| conversion | no data | 256 images | + 400 steps of 64 | same top-1 after all |",
        "|---|---|---|---|---|",
    ]
    for name, row in _document()["rows"].items():
        stages = [[row["no data"]], row.get("calibrated", []), row.get("recovered", [])]
        goals = _GOALS.get(name, (None, None, None))
        cells = [_drops(stage, goal) for stage, goal in zip(stages, goals, strict=True)]
        last = next(stage for stage in reversed(stages) if stage)
        same = statistics.mean(run["agreement"] for run in last)
        low, high = last[0]["interval"]
        rows.append(f"| {name} | {' | '.join(cells)} | {same:.4f} ({low:.4f} to {high:.4f}) |")
    return rows


def fine_tuning() -> list[str]:
    """Return what 500 steps at batch size 2 do to each, without and with clipped gradients."""
    document = _document()
    rows = [
        "| model | right at the start | after 500 steps | lost | gradients clipped to 1 | lost |",
        "|---|---|---|---|---|---|",
    ]
    for name, plain in document["fine-tuned"].items():
        cells = [f"{_right(plain, 'start'):.2f}"]
        for row in (plain, document["fine-tuned, clipped"].get(name)):
            if row is None:
                cells += ["", ""]
                continue
            missed = "" if row["mean loss"] <= _TUNING_GOAL or _is_original(name) else "**"
            lost = f"{missed}{row['mean loss']:.2f}{missed} (worst {row['worst loss']:.2f})"
            cells += [f"{_right(row, 'end'):.2f}", lost]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _is_original(name: str) -> bool:
    return name.startswith("bn")


def _right(row: dict[str, Any], when: str) -> float:
    return float(statistics.mean(run["right"] for run in row[when]))


def folding() -> list[str]:
    """Return the errors of the folded gn+ws model."""
    rows = ["| run by | check | error | bound |", "|---|---|---|---|"]
    for runner, checks in _document()["folded"]["checks"].items():
        for check in checks:
            if check["measured"] is not None:
                numbers = f"{check['measured']:.1e} | {check['bound']:.1e}"
                rows.append(f"| {runner} | {check['name']} | {numbers} |")
    return rows


def main() -> None:
    """Put the tables between their markers."""
    tables = {"conversions": conversions, "fine-tuning": fine_tuning}
    if "folded" in _document():
        tables["folding"] = folding
    fill(RESULTS / "gn-ws.md", tables)


if __name__ == "__main__":
    main()
