"""Folding what the libraries compute: weight norm in transformers, standardized convolutions in timm.

    python -m benchmarks.fold_zoo --out docs/results/fold-zoo.json

Weight norm: a small model, at random weights, of every modelling file of the installed transformers that
calls weight norm; what the model's own `remove_weight_norm` does to it, and what `nc.fold` does, whose
outputs are held against a float64 run of the model before. Standardized convolutions: members of each of
timm's families, most with one block a stage, and of transformers, folded and exported to ONNX. The tables
of the page beside the JSON file are written from it; with ``--tables`` nothing is run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconv as nc
from benchmarks.fold_zoo_models import RECIPES, apply_, build, modelling_files, normed, remove_
from benchmarks.machine import machine
from benchmarks.markers import fill
from normconv.proof import prove
from normconv.report import Check

_SHALLOW = {"depths": (1, 1, 1, 1)}
_HYBRID = {"img_size": 64, "depth": 1}
# Of each family; those without options are whole.
TIMM: dict[str, dict[str, Any]] = {
    "resnetv2_50x1_bit": {},
    "resnetv2_101x1_bit": {},
    "nf_resnet26": _SHALLOW,
    "nf_resnet50": _SHALLOW,
    "nf_seresnet26": _SHALLOW,
    "nf_ecaresnet26": _SHALLOW,
    "nf_regnet_b0": _SHALLOW,
    "nf_regnet_b1": _SHALLOW,
    "nfnet_f0": _SHALLOW,
    "nfnet_l0": _SHALLOW,
    "eca_nfnet_l0": _SHALLOW,
    "dm_nfnet_f0": _SHALLOW,
    "dm_nfnet_f1": _SHALLOW,
    "vit_tiny_r_s16_p8_224": _HYBRID,
    "vit_small_r26_s32_224": _HYBRID,
    "vit_base_r50_s16_224": _HYBRID,
}
BIT = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
PADDINGS = {"BitModel": None, "BitModel, padded as TensorFlow does": "SAME"}
SIZE = 64


def weight_normed(name: str) -> dict[str, Any]:
    """Measure one modelling file."""
    recipe = RECIPES[name]
    model, theirs = build(name), build(name)
    apply_(model)
    apply_(theirs)
    total, removal = normed(model), ""
    try:
        removal = "works" if remove_(theirs) else "has none"
    except Exception as error:  # what the library does is what is measured
        removal = f"raises {type(error).__name__}"
    left = normed(theirs)
    if removal == "works" and left:
        removal = "leaves some"
    folded, report = nc.fold(model)
    checks: list[Check] = []
    for part, inputs in recipe.inputs.items():
        before, after, given = model.get_submodule(part), folded.get_submodule(part), inputs()
        args, kwargs = (tuple(given.values()), {}) if part else ((), given)
        checks += prove(before, after, (), args, kwargs).checks
    return {
        "file": name,
        "class": recipe.head,
        "parts": [part for part in recipe.inputs if part],
        "weights under weight norm": total,
        "own removal": removal,
        "left by it": left,
        "folded": dict(report.facts["folded"]),
        "left by fold": normed(folded) + report.facts["left"],
        **_outputs(checks),
    }


def _outputs(checks: list[Check]) -> dict[str, Any]:
    """The outputs' worst error in units of its bound, and whether all is equal to the noise floor."""
    measured = [c for c in checks if c.measured is not None and c.bound]
    worst = max(measured, key=lambda c: (c.measured or 0) / (c.bound or 1))
    return {
        "outputs equal": all(check.passed for check in checks),
        "error": worst.measured,
        "bound": worst.bound,
    }


def standardized(name: str, model: nn.Module) -> dict[str, Any]:
    """Measure one model with standardized convolutions."""
    _leave_init_(model)
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    folded, report = nc.fold(model)
    outputs = _outputs(list(prove(model, folded, (), (x,)).checks))
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = nc.export_onnx(model, Path(folder) / "m.onnx", example_inputs=(x,))
        except nc.CheckFailed as failed:
            exported = failed.report
    checks = {check.name: check for check in exported.checks}
    return {
        "model": name,
        "folded": dict(report.facts["folded"]),
        "left": report.facts["left"],
        **outputs,
        "onnx nodes": exported.facts["nodes"],
        "onnx weight arithmetic": checks["weight arithmetic"].measured,
        "onnx passed": exported.passed,
        "onnx failures": {check.name: check.describe() for check in exported.failed_checks},
    }


@torch.no_grad()
def _leave_init_(model: nn.Module) -> None:
    """Move constant parameters: fresh gains of 0 hide whole branches from the outputs."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.1 * torch.rand_like(parameter) + 0.05)


def _with_standardized_convolutions() -> Iterator[tuple[str, nn.Module]]:
    import timm
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2
    from transformers import BitConfig, BitModel

    torch.manual_seed(0)
    convolution = partial(StdConv2d, eps=1e-8)  # as in timm's resnetv2_*_bit
    bit = ResNetV2(layers=[1, 1, 1, 1], conv_layer=convolution, stem_type="fixed")
    yield "timm resnetv2_*_bit", bit.eval()
    for name, options in TIMM.items():
        yield f"timm {name}", timm.create_model(name, **options).eval()
    for label, padding in PADDINGS.items():
        config = BitConfig(**BIT, num_groups=8, global_padding=padding, return_dict=False)
        yield f"transformers {label}", BitModel(config).eval()


def _removal_rows(document: dict[str, Any]) -> list[str]:
    rows = [
        "| modelling file | class | weights | its own removal | left by it | left by `fold` "
        "| error | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in document["weight norm"]:
        parts = f" ({', '.join(case['parts'])})" if case["parts"] else ""
        cells = [
            case["file"],
            case["class"] + parts,
            case["weights under weight norm"],
            case["own removal"],
            case["left by it"],
            case["left by fold"],
            _error(case),
            f"{case['bound']:.1e}",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def _standardized_rows(document: dict[str, Any]) -> list[str]:
    rows = [
        "| model | convolutions folded | left | error | bound | ONNX nodes | that compute weights "
        "| file passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in document["weight standardization"]:
        folded = ", ".join(f"{n} {k.removesuffix(' (forward)')}" for k, n in case["folded"].items())
        cells = [
            case["model"],
            folded,
            case["left"],
            _error(case),
            f"{case['bound']:.1e}",
            case["onnx nodes"],
            int(case["onnx weight arithmetic"]),
            "yes" if case["onnx passed"] else "no",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def _error(case: dict[str, Any]) -> str:
    return f"{case['error']:.1e}" + ("" if case["outputs equal"] else " (fails)")


def _write_tables(out: Path) -> None:
    document = json.loads(out.read_text())
    tables = {
        "weight norm in transformers": lambda: _removal_rows(document),
        "standardized convolutions": lambda: _standardized_rows(document),
    }
    fill(out.with_name("fold.md"), tables)


def main() -> None:
    """Run all cases, write the JSON file and the tables beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/fold-zoo.json"))
    parser.add_argument("--tables", action="store_true", help="write the tables again, run nothing")
    options = parser.parse_args()
    if not options.tables:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        missing = set(modelling_files()) ^ RECIPES.keys()
        if missing:
            raise SystemExit(f"without a recipe, or no longer there: {', '.join(sorted(missing))}")
        document: dict[str, Any] = {"machine": machine()}
        document["weight norm"] = [_said(weight_normed(name)) for name in RECIPES]
        document["weight standardization"] = []
        for name, model in _with_standardized_convolutions():
            document["weight standardization"].append(_said(standardized(name, model)))
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    _write_tables(options.out)


def _said(case: dict[str, Any]) -> dict[str, Any]:
    stamp = time.strftime("%H:%M:%S")
    print(stamp, json.dumps(case), file=sys.stderr, flush=True)
    return case


if __name__ == "__main__":
    main()
