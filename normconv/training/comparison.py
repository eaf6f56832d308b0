"""What a comparison found, as plain data."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normconv.files import atomic_path, write_json

__all__ = ["Comparison"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Learning curves of one network under several normalizations.

    Args:
        recipe: its name.
        headline: the measure of the last column, ``test_accuracy`` for one.
        higher_is_better: of the headline.
        facts: what was trained on what, with which versions.
        rows: one for each epoch of each run: what was run, then what was measured.
        step_times: milliseconds of a step and its ratio to the plain network's.
        missing: runs that are not finished, by name.
    """

    recipe: str
    headline: str
    higher_is_better: bool
    facts: dict[str, Any]
    rows: tuple[Row, ...]
    step_times: tuple[Row, ...] = ()
    missing: tuple[str, ...] = ()

    def measures(self) -> list[str]:
        """Return the names of what was measured at each epoch."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name.startswith(("train_", "test_"))]

    def summary(self) -> list[Row]:
        """Return, for each normalization and batch size, what the seeds end on: mean and deviation.

        ``diverged`` counts seeds whose loss became no number; they are in no mean.
        """
        groups: dict[tuple[str, int], dict[int, Row]] = {}
        for row in self.rows:  # the last row of a run stays
            of_seeds = groups.setdefault((row["normalization"], row["batch_size"]), {})
            of_seeds[row["seed"]] = row
        times = {(t["normalization"], t["batch_size"]): t for t in self.step_times}
        found = []
        for (normalization, batch_size), of_seeds in groups.items():
            ends = [row for row in of_seeds.values() if row.get("train_loss", 0.0) is not None]
            made: Row = {"normalization": normalization, "batch_size": batch_size}
            made |= {"seeds": len(of_seeds), "diverged": len(of_seeds) - len(ends)}
            for name in self.measures():
                values = [row[name] for row in ends if row.get(name) is not None]
                made[name] = statistics.fmean(values) if values else None
                made[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
            measured = times.get((normalization, batch_size), {})
            made["step_ms"] = measured.get("step_ms")
            made["ratio_to_plain"] = measured.get("ratio_to_plain")
            found.append(made)
        return found

    def document(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return {
            "recipe": self.recipe,
            "headline": self.headline,
            "higher_is_better": self.higher_is_better,
            "facts": self.facts,
            "summary": self.summary(),
            "step_times": list(self.step_times),
            "missing": list(self.missing),
            "rows": list(self.rows),
        }

    def write(self, folder: Path) -> dict[str, str]:
        """Write ``comparison.json`` with everything and ``curves.csv`` with the rows."""
        write_json(folder / "comparison.json", self.document())
        _write_csv(folder / "curves.csv", self.rows)
        return {"json": str(folder / "comparison.json"), "csv": str(folder / "curves.csv")}


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
