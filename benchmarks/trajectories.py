"""How far fifty steps of the optimizers of rows are from those of (g, v) in the graph, in float64.

    python -m benchmarks.trajectories --out docs/results/trajectories.json

The network has a convolution, a grouped one, two transposed ones, one of them grouped, and a Linear; with
weight norm one row is zero at first. A step has two micro-batches, and after half of the steps model and
optimizer go on from a checkpoint. The cases are those of tests/training/test_row_optimizers.py; `seen` is
the distance when a thousandth of the gradient of the weight is left in that of v.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.markers import RESULTS
from normconv.files import write_json
from normconv.report import versions
from normconv.training.optimizers import forms
from tests.training.test_row_optimizers import CASES, STEPS, trajectories, wrong_lift


def measure(form: str, case: str) -> dict[str, Any]:
    """Return the largest difference of a weight or bias in any step, by the way that rows are stepped."""
    kind, options = CASES[case]
    ways = ("loop", "foreach")
    found = {way: trajectories(form, kind, options, way, micro=2, resume=True)[0] for way in ways}
    wrong = wrong_lift(forms.lift_)
    with mock.patch("normconv.training.optimizers.stepping.lift_", wrong):
        found["seen"] = trajectories(form, kind, options, "loop", micro=2, resume=True)[0]
    return {"form": form, "case": case, "optimizer": kind, "options": options, **found}


def main() -> None:
    """Run all cases and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "trajectories.json")
    options = parser.parse_args()
    rows = [measure(form, case) for form in ("wn", "ws") for case in CASES]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    write_json(options.out, {"steps": STEPS, "versions": versions(), "cases": rows})


if __name__ == "__main__":
    main()
