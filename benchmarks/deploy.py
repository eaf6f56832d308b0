"""What deployment costs: latency of converted files, load time and size, on ONNX Runtime's CPU provider.

    python -m benchmarks.deploy --out docs/results/deploy.json

Each case is written as soon as it is measured; one that is in the document already is not measured again.
Files of one case take turns (`nc.bench`); a ratio is the median over the turns. `again` is the file that
the others are compared with, once more: how far its ratio is from 1 is what the machine adds. Weights are
random, statistics are set by random inputs: time does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import normconv as nc
from benchmarks.machine import machine
from benchmarks.markers import RESULTS, fill
from normconv.deploy import Session, norm_nodes
from normconv.deploy.onnx_graph import node_counts, weight_arithmetic
from normconv.files import write_json
from normconv.numerics import quartiles, ratios_by_turn, take_turns
from normconv.proof import randomise_norms_

MODELS = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:densenet121",
    "timm:resnetv2_50",
)

CLASSIC = "torchvision:resnet50"
SMALL = "torchvision:resnet18"
_LEAST_LOADS = 7

Files = dict[str, Path]


def network(name: str, pixels: int) -> tuple[nn.Module, Tensor]:
    """Return an architecture with random weights and statistics of random inputs, and one input."""
    torch.manual_seed(0)
    net: nn.Module = nc.load(name, random_weights=True).eval()
    randomise_norms_(net, (torch.randn(4, 3, pixels, pixels),))
    return net, torch.randn(1, 3, pixels, pixels)


def exported(net: nn.Module, x: Tensor, path: Path, dynamo: bool = True) -> Path:
    """Export with torch alone, as anyone does."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"external_data": False} if dynamo else {}
        torch.onnx.export(
            net.eval(), (x,), str(path), dynamo=dynamo, opset_version=18, verbose=False, **options
        )
    return path


def ours(net: nn.Module, x: Tensor, path: Path) -> Path:
    """Export with normconv: folded, and proved against the network."""
    nc.export_onnx(net, path, example_inputs=(x,), dynamic_batch=False)
    return path


def converted(net: nn.Module, target: str, x: Tensor) -> nn.Module:
    """Convert the structure; nothing is calibrated, since time does not depend on it."""
    return nc.apply_plan(net, nc.make_plan(net, target, example_inputs=(x,))).model.eval()


def timed(files: Files, x: Tensor, seconds: float) -> dict[str, Any]:
    """Time files in turns, against the first; the first once more at the end."""
    first = next(iter(files))
    models = {**files, "again": files[first]}
    report = nc.bench(models, x, backends=("ort-cpu",), seconds=seconds)
    about = report.facts["models"]
    return {
        row["model"]: {
            "ms": row["latency_ms"],
            "p95 ms": row["p95_ms"],
            "ratio": row["ratio"],
            "quartiles": row["ratio_quartiles"],
            "turns": row["turns"],
            "load ms": row["load_ms"],
            "nodes": about[row["model"]]["nodes"],
            "norm nodes": about[row["model"]]["norm_nodes"],
            "bytes": about[row["model"]]["bytes"],
        }
        for row in report.facts["timings"]
    }


def weight_norm(name: str, pixels: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Time WN, folded, against the network with BatchNorm."""
    net, x = network(name, pixels)
    files = {
        "bn": exported(net, x, folder / "bn.onnx"),
        "wn folded": ours(converted(net, "wn", x), x, folder / "wn.onnx"),
    }
    return timed(files, x, seconds)


def group_norm(name: str, pixels: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Time GN with standardized weights, folded, against GN with plain weights."""
    net, x = network(name, pixels)
    files = {
        target: ours(converted(net, target, x), x, folder / f"{place}.onnx")
        for place, target in enumerate(("gn", "gn+ws"))
    }
    return timed(files, x, seconds)


def frozen_norms(name: str, pixels: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Time a network trained with GN whose norms were frozen and folded, against BatchNorm."""
    net, x = network(name, pixels)
    data = [torch.randn(4, *x.shape[1:]) for _ in range(2)]
    frozen = nc.freeze_norms(converted(net, "gn+ws", x), data).model
    files = {
        "bn": exported(net, x, folder / "bn.onnx"),
        "frozen": ours(frozen, x, folder / "frozen.onnx"),
    }
    return timed(files, x, seconds)


def files_of(name: str, pixels: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Measure load time and size: WN and WS, folded and not, by both exporters of torch."""
    net, x = network(name, pixels)
    rows: dict[str, Any] = {}
    for target in ("wn", "gn+ws"):
        model = converted(net, target, x)
        forms = {"folded": nc.fold(model).model.eval(), "not folded": model}
        for dynamo in (True, False):
            exporter = f"dynamo={dynamo}"
            paths: Files = {}
            case: dict[str, Any] = rows.setdefault(f"{target}, {exporter}", {})
            for form, module in forms.items():
                path = folder / f"{target}-{dynamo}-{form.replace(' ', '-')}.onnx"
                try:
                    paths[form] = exported(module, x, path, dynamo)
                except Exception as error:  # an exporter that fails is a result
                    line = (str(error).strip().splitlines() or [""])[0][:160]
                    case[form] = {"error": f"{type(error).__name__}: {line}"}
            for form, row in loaded(paths, seconds).items():
                case[form] = row
    return rows


def loaded(files: Files, seconds: float) -> dict[str, Any]:
    """Open files in turns, each in a session of its own."""
    works = [partial(Session, path, "cpu") for path in files.values()]
    if not works:
        return {}
    turns = take_turns(
        works, seconds=seconds, least=_LEAST_LOADS, calls=1, unmeasured=0, pause=0.005
    )
    found = {}
    for (form, path), each in zip(files.items(), turns, strict=True):
        low, middle, high = quartiles([1e3 * call for turn in each for call in turn])
        proto = onnx.load(path)
        found[form] = {
            "bytes": path.stat().st_size,
            "nodes": sum(node_counts(proto).values()),
            "norm nodes": len(norm_nodes(proto)),
            "nodes that compute weights": len(weight_arithmetic(proto)),
            "load ms": middle,
            "quartiles": [low, high],
            "ratio": quartiles(ratios_by_turn(each, turns[0]))[1],
        }
    return found


Case = Callable[[float, Path], dict[str, Any]]


def cases(small: bool) -> dict[str, Case]:
    """Return every measurement by its key in the document."""
    pixels = 64 if small else 224
    classic = SMALL if small else CLASSIC
    made: dict[str, Case] = {
        f"wn {name}": partial(weight_norm, name, pixels) for name in ([SMALL] if small else MODELS)
    }
    made[f"gn {classic}"] = partial(group_norm, classic, pixels)
    made[f"frozen {classic}"] = partial(frozen_norms, classic, pixels)
    made[f"files {classic}"] = partial(files_of, classic, pixels)
    return made


# --- tables -------------------------------------------------------------------------------------


def latency_table(document: Mapping[str, Any]) -> list[str]:
    """Return ratios of latency, a row for each case."""
    lines = [
        "| network | file | against | ms | ratio | quartiles | same file again | norm nodes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in document["cases"].items():
        kind, _, name = key.partition(" ")
        if kind == "files":
            continue
        if "error" in rows:
            lines.append(f"| {name} | {kind} | | | {rows['error']} | | | |")
            continue
        first = next(iter(rows))
        for form, row in rows.items():
            if form in (first, "again"):
                continue
            low, high = row["quartiles"]
            against = f"{first}, {rows[first]['norm nodes']} norm nodes"
            cells = [
                name.partition(":")[2],
                form,
                against,
                f"{row['ms']:.1f} / {rows[first]['ms']:.1f}",
                f"{row['ratio']:.3f}",
                f"{low:.3f}–{high:.3f}",
                f"{rows['again']['ratio']:.3f}",
                str(row["norm nodes"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def files_table(document: Mapping[str, Any]) -> list[str]:
    """Return load times and sizes, folded against not folded."""
    lines = [
        "| network | weights, exporter | form | MB | nodes | that compute weights | load ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in document["cases"].items():
        kind, _, name = key.partition(" ")
        if kind != "files" or "error" in rows:
            continue
        for case, forms in rows.items():
            for form, row in forms.items():
                head = f"| {name.partition(':')[2]} | {case} | {form} "
                if "error" in row:
                    lines.append(f"{head}| {row['error']} | | | | |")
                    continue
                lines.append(
                    f"{head}| {row['bytes'] / 1e6:.1f} | {row['nodes']} "
                    f"| {row['nodes that compute weights']} | {row['load ms']:.0f} "
                    f"| {row['ratio']:.2f} |"
                )
    return lines


def machine_line(document: Mapping[str, Any]) -> list[str]:
    """Say on what it was measured."""
    about = document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = f"{about['processor']}, {about['cores']} cores, {about['memory GiB']} GiB"
    return [f"{where}, {document['threads']} threads; {versions}."]


def measure(out: Path, small: bool, seconds: float) -> None:
    """Measure what is not in the document yet, and write it case by case."""
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    document |= {"machine": machine(), "threads": torch.get_num_threads(), "seconds": seconds}
    for key, case in cases(small).items():
        if key in document["cases"] and "error" not in document["cases"][key]:
            continue
        print(key, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                document["cases"][key] = case(seconds, Path(folder))
            except Exception as error:  # the other cases are measured all the same
                line = (str(error).strip().splitlines() or [""])[0]
                document["cases"][key] = {"error": f"{type(error).__name__}: {line}"}
        write_json(out, document)


def main() -> None:
    """Measure, write the document and the tables of the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "deploy.json")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the turns of each case")
    parser.add_argument("--small", action="store_true", help="a resnet18 at 64 pixels: a trial")
    parser.add_argument("--tables", action="store_true", help="write the tables again, run nothing")
    options = parser.parse_args()
    if not options.tables:
        measure(options.out, options.small, options.seconds)
    page = options.out.with_suffix(".md")
    if page.exists():
        document = json.loads(options.out.read_text())
        tables = {
            "machine": partial(machine_line, document),
            "latency": partial(latency_table, document),
            "load time and size": partial(files_table, document),
        }
        fill(page, tables)


if __name__ == "__main__":
    main()
