"""Fill the tables of docs/results/main-job.md from the JSON files beside it.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.markers import RESULTS, fill

_OTHER = "predictions other than float64's"


def _error(run: dict[str, Any]) -> str:
    return f"{run['error']:.1e} / {run['bound']:.1e}"


def architectures() -> list[str]:
    """Return the table of architectures, a row each."""
    models = json.loads((RESULTS / "main-job.json").read_text())["models"]
    rows = [
        "| model | norms | folded | affine | sight | blind | float64 error | float32 error / bound "
        "| ORT error / bound | norm nodes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for spec, model in models.items():
        wn, actions = model["wn"], model["actions"]
        cells = [
            spec,
            model["norms"],
            actions.get("fold", 0),
            actions.get("affine", 0),
            f"{wn['float32']['sight']:.2f}",
            model["blind end to end"],
            f"{wn['float64']['error']:.1e}",
            _error(wn["float32"]),
            _error(wn["onnx"]),
            wn["onnx"]["norm nodes"],
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def pretrained() -> list[str]:
    """Return the rows of the pretrained network."""
    document = json.loads((RESULTS / "pretrained.json").read_text())
    head = [
        "| model | right | predictions other than float64's | rel-L2 error | max abs error |",
        "|---|---|---|---|---|",
    ]
    return head + [
        f"| {name} | {row['right']} | {row[_OTHER]} "
        f"| {row['rel-L2 error']:.1e} | {row['max abs error']:.1e} |"
        for name, row in document["models"].items()
    ]


def cost() -> list[str]:
    """Return the rows of what the proof costs."""
    document = json.loads((RESULTS / "export-cost.json").read_text())
    bounds = {"seconds": "1.5", "peak MiB": "1.6", "peak beyond imports MiB": "1.6"}
    rows = ["| | normconv | torch.onnx.export | ratio | bound |", "|---|---|---|---|---|"]
    for figure, bound in bounds.items():
        m = document[figure]
        numbers = f"{m['normconv']:.3g} | {m['torch']:.3g} | {m['ratio']:.2f}"
        rows.append(f"| {figure} | {numbers} | {bound} |")
    return rows


def main() -> None:
    """Put the tables between their markers."""
    tables = {
        "architectures": architectures,
        "pretrained": pretrained,
        "cost": cost,
    }
    fill(RESULTS / "main-job.md", tables)


if __name__ == "__main__":
    main()
