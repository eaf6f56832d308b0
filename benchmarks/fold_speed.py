"""What folding weight norm saves: eager speed on short chunks, and what ONNX exporters make of it.

    python -m benchmarks.fold_speed --out docs/results/fold-speed.json

A HiFi-GAN vocoder (transformers' SpeechT5HifiGan at its published size) and the decoder of EnCodec
(24 kHz) with random weights: weight norm as transformers applies it (a parametrization), as the older
hook, and folded. The forms run in turn on the same chunk: one forward each a round, in an order that
moves on from round to round. A ratio is the median over the rounds of a form's seconds over the folded
one's in the same round. Seconds are processor time, on which other work on the machine tells little; with
OMP_NUM_THREADS=1 that is the time it takes.

EnCodec pads by sizes that it keeps in integer tensors, which `torch.export` cannot follow; for the files
they are numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn

import normconv as nc
from benchmarks.machine import machine
from benchmarks.markers import RESULTS, fill
from normconv.files import write_json

FRAMES = (5, 20, 50)
FORMS = ("folded", "parametrization", "hook")


class Case(NamedTuple):
    """A network and how it is fed."""

    make: Callable[[], nn.Module]
    chunk: Callable[[int], Tensor]


def vocoder() -> nn.Module:
    """Make SpeechT5's HiFi-GAN with its weight norm on."""
    import transformers

    net: Any = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig())
    net.apply_weight_norm()
    made: nn.Module = net
    return made


def decoder() -> nn.Module:
    """Make the decoder of EnCodec, which is weight-normed from the start."""
    import transformers

    net: Any = transformers.EncodecModel(transformers.EncodecConfig())
    made: nn.Module = net.decoder
    return made


CASES = {
    "HiFi-GAN (SpeechT5HifiGan)": Case(vocoder, lambda frames: torch.randn(1, frames, 80)),
    "EnCodec decoder (24 kHz)": Case(decoder, lambda frames: torch.randn(1, 128, frames)),
}


def with_numbers_for_sizes(net: nn.Module) -> nn.Module:
    """Return a copy whose convolutions of EnCodec pad by numbers; theirs have stride 1 and no extra."""
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if hasattr(module, "_get_extra_padding_for_conv1d"):
            conv: Any = module
            assert int(conv.stride) == 1
            for name in ("stride", "kernel_size", "padding_total"):
                number = int(conv._buffers.pop(name))
                setattr(conv, name, number)
            conv._get_extra_padding_for_conv1d = _no_extra
    return twin


def _no_extra(hidden_states: Tensor) -> int:
    return 0


def forms_of(case: Case) -> tuple[dict[str, nn.Module], int]:
    """Return the network in its three forms, which compute the same, and how many weights are folded."""
    torch.manual_seed(0)
    net = case.make().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("original0"):
                parameter.mul_(torch.rand_like(parameter) + 0.5)  # gains as training leaves them
    folded, report = nc.fold(net)
    hooked = nc.fold(net).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for site in report.sites:
            torch.nn.utils.weight_norm(hooked.get_submodule(site.site))
    return {"folded": folded, "parametrization": net, "hook": hooked}, len(report.sites)


def speed(forms: dict[str, nn.Module], chunk: Tensor, rounds: int) -> dict[str, Any]:
    """Time one forward of each form a round."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    names = list(forms)
    with torch.no_grad():
        outputs = {form: net(chunk) for form, net in forms.items()}
        for form, output in outputs.items():
            torch.testing.assert_close(output, outputs["folded"], rtol=1e-3, atol=1e-4, msg=form)
        for number in range(rounds):
            for step in range(len(names)):
                form = names[(number + step) % len(names)]
                start = time.process_time()
                forms[form](chunk)
                seconds[form].append(time.process_time() - start)
    plain = seconds["folded"]
    return {
        "rounds": rounds,
        "milliseconds": {form: 1e3 * statistics.median(each) for form, each in seconds.items()},
        "ratio to folded": {
            form: statistics.median(a / b for a, b in zip(each, plain, strict=True))
            for form, each in seconds.items()
            if form != "folded"
        },
    }


def exported(net: nn.Module, chunk: Tensor, exporter: str) -> dict[str, Any]:
    """Export once; count the file's bytes, its nodes, and those that compute on constants alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                if exporter == "normconv":
                    nc.export_onnx(net, path, example_inputs=(chunk,), dynamic_batch=False)
                else:
                    dynamo = exporter == "dynamo=True"
                    torch.onnx.export(
                        net, (chunk,), str(path), dynamo=dynamo, opset_version=18, verbose=False
                    )
        except Exception as error:  # an exporter that fails is a result
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        nodes = list(onnx.load(path, load_external_data=False).graph.node)
        graph = onnx.load(path, load_external_data=False).graph
        constant = {entry.name for entry in graph.initializer}
        computed = 0
        for node in nodes:
            if all(name in constant or not name for name in node.input):
                constant.update(node.output)
                computed += node.op_type not in ("Constant", "Identity")
        return {"bytes": size, "nodes": len(nodes), "nodes on constants": computed}


def measure(rounds: int) -> dict[str, Any]:
    """Return everything that is measured."""
    logging.disable(logging.WARNING)
    result: dict[str, Any] = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "clock": "processor time",
        "cases": {},
    }
    for name, case in CASES.items():
        forms, weights = forms_of(case)
        entry: dict[str, Any] = {"weights folded": weights, "speed": {}, "onnx": {}}
        for frames in FRAMES:
            entry["speed"][str(frames)] = speed(forms, case.chunk(frames), rounds)
        for form in ("folded", "parametrization"):
            net = with_numbers_for_sizes(forms[form])
            entry["onnx"][form] = {
                exporter: exported(net, case.chunk(FRAMES[-1]), exporter)
                for exporter in ("dynamo=True", "dynamo=False", "normconv")
            }
        result["cases"][name] = entry
    return result


def speed_table(document: dict[str, Any]) -> list[str]:
    """Return what a form takes over the folded one."""
    lines = [
        "| network | frames | folded | parametrization | hook |",
        "|---|---|---|---|---|",
    ]
    for name, case in document["cases"].items():
        for frames, row in case["speed"].items():
            ratios = (f"{row['ratio to folded'][form]:.2f}×" for form in FORMS[1:])
            folded = f"{row['milliseconds']['folded']:.1f} ms"
            lines.append(f"| {name} | {frames} | {folded} | {' | '.join(ratios)} |")
    return lines


def files_table(document: dict[str, Any]) -> list[str]:
    """Return what exporters write."""
    lines = [
        "| network | exporter | folded | with weight norm |",
        "|---|---|---|---|",
    ]
    for name, case in document["cases"].items():
        for exporter, plain in case["onnx"]["folded"].items():
            normed = case["onnx"]["parametrization"][exporter]
            lines.append(f"| {name} | {exporter} | {_file(plain)} | {_file(normed)} |")
    return lines


def _file(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"]).partition(":")[0]
    megabytes, nodes, on_constants = row["bytes"] / 1e6, row["nodes"], row["nodes on constants"]
    return f"{megabytes:.1f} MB, {nodes} nodes, {on_constants} on weights alone"


def main() -> None:
    """Measure, write the document and the tables of the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "fold-speed.json")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tables", action="store_true", help="write the tables again, run nothing")
    options = parser.parse_args()
    if not options.tables:
        write_json(options.out, measure(options.rounds))
    document = json.loads(options.out.read_text())
    tables = {
        "speed of folded models": partial(speed_table, document),
        "files of exporters": partial(files_table, document),
    }
    fill(options.out.with_name("fold.md"), tables)


if __name__ == "__main__":
    main()
