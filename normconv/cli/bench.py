"""`normconv bench`: how fast models run, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from normconv.cli.common import (
    Html,
    Input,
    Json,
    Out,
    RandomWeights,
    Trust,
    check_outputs,
    command,
    is_main_process,
    stage,
)
from normconv.cli.devices import Device, checked_device
from normconv.cli.pages import write_page
from normconv.errors import Problem, UsageError
from normconv.files import write_json
from normconv.report import Report, versions
from normconv.report.html_parts import number, size
from normconv.report.terminal import table

if TYPE_CHECKING:
    from torch import nn

__all__ = ["bench", "show"]

_FILES = (".onnx", ".pt2")
_FLOAT = "tensor(float)"
_NOT_TIMED = frozenset({"timm", "torchvision", "transformers"})  # models come from them

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME=MODEL",
        help="Models under the names they get: .onnx, .pt2, a whole-module .pt, or a spec.",
        show_default=False,
    ),
]


@command
def bench(
    models: Models,
    input_: Input = None,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", metavar="LIST", help="Samples a call: 1,8,64.")
    ] = "1,8",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="eager, compile, ort-cpu, ort-cuda, ort-tensorrt; repeatable; all but compile.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="For the turns at each batch size.")
    ] = 5.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of one operator; torch's number.")
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Allow TF32 on CUDA.")] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Let ONNX Runtime replay a CUDA graph.")
    ] = False,
    device: Device = "cpu",
    trust: Trust = None,
    random_weights: RandomWeights = False,
    out: Out = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Also draw the latencies.")
    ] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Time models side by side, in turns: latency, throughput, memory, load time, size, nodes."""
    named = _named(models)
    check_outputs(list(named.values()), ("--out", out, (".json",)), ("--plot", plot, (".png",)))
    if plot is not None:
        from normconv.report.drift_plot import check_plot_path

        check_plot_path(plot)
    sizes = _sizes(batch_sizes)
    with stage("load", as_json=as_json):
        opened = {
            name: _open(source, device, tuple(trust or ()), random_weights)
            for name, source in named.items()
        }
        inputs = _inputs(opened, input_, next(iter(named.values())))
    with stage("time in turns", as_json=as_json):
        from normconv.deploy import bench as bench_models

        report = bench_models(
            opened,
            inputs,
            batch_sizes=sizes,
            backends=backend or None,
            threads=threads,
            seconds=seconds,
            tf32=tf32,
            cuda_graphs=cuda_graphs,
        )
    if not is_main_process():
        return
    if out is not None:
        write_json(out, report.to_dict())
    if plot is not None:
        from normconv.report.bench_plot import plot_bench

        plot_bench(report, plot)
    write_page(report)
    if as_json:
        typer.echo(report.to_json())
        return
    show(Console(), report)
    for path in (out, plot, html):
        if path is not None:
            Console().print(f"[dim]written:[/] {path}", highlight=False)


def _named(words: list[str]) -> dict[str, str]:
    """Read ``NAME=MODEL``; a model without a name has that of its file."""
    named: dict[str, str] = {}
    for word in words:
        name, sign, source = word.partition("=")
        if not sign:
            name, source = Path(word.rpartition(":")[2]).stem, word
        if not name or not source:
            raise UsageError(Problem(word, "this is no NAME=MODEL", "bn=model.onnx"))
        if name in named:
            what = f"{named[name]} and {source} have one name"
            raise UsageError(Problem(name, what, f"give each its own: other={source}"))
        named[name] = source
    return named


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        what = f"{text!r} is no list of whole numbers from 1"
        raise UsageError(Problem("--batch-sizes", what, "1,8,64"))
    return [int(word) for word in words]


def _open(source: str, device: str, trust: tuple[str, ...], random: bool) -> nn.Module | Path:
    if Path(source).suffix.lower() in _FILES:
        if not Path(source).is_file():
            raise UsageError(Problem(source, "there is no such file"))
        return Path(source)
    from normconv.sources import open_source

    device = checked_device(device)
    return open_source(source, trust=trust, random_weights=random).model.eval().to(device)


def _inputs(opened: dict[str, Any], given: str | None, source: str) -> Any:
    """Take what `--input` says, else what the first module takes, else what the first file does."""
    from torch import nn

    from normconv.sources import example_inputs

    module = next((m for m in opened.values() if isinstance(m, nn.Module)), None)
    if given is None and module is None:
        path = next((m for m in opened.values() if m.suffix.lower() == ".onnx"), None)
        if path is None:
            raise UsageError(f"{source} needs example inputs: pass --input 2x3x224x224")
        return _file_inputs(path)
    found = example_inputs(module or nn.Identity(), given, source=source)
    return found.args, found.kwargs


def _file_inputs(path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make noise of the shapes that a file fixes, for a batch of one."""
    import torch

    from normconv.deploy import Session

    specs = Session(path, "cpu").inputs
    for spec in specs:
        if spec.type != _FLOAT or not all(isinstance(axis, int) for axis in spec.shape[1:]):
            what = f"it takes {spec}, for which there is no noise of one shape"
            raise UsageError(Problem(str(path), what, "pass --input SHAPE or FILE"))
    noise = torch.Generator().manual_seed(0)
    shapes = [[axis if isinstance(axis, int) else 1 for axis in spec.shape] for spec in specs]
    return tuple(torch.randn(shape, generator=noise) for shape in shapes), {}


def show(console: Console, report: Report) -> None:
    """Print the machine, the models, a row for each timing, and what was not measured."""
    facts = report.facts
    console.rule("[bold]bench")
    for name, value in facts["machine"].items():
        console.print(f"[dim]{name}:[/] {value}", highlight=False)
    used = {name: version for name, version in versions().items() if name not in _NOT_TIMED}
    told = ", ".join(f"{name} {version}" for name, version in used.items())
    console.print(f"[dim]versions:[/] {told}", highlight=False)
    made = table(["model", "size", "nodes", "norms", "weight arithmetic", "what it is"])
    for name, about in facts["models"].items():
        counts = ("nodes", "norm_nodes", "weight_arithmetic")
        cells = ("–" if about[count] is None else str(about[count]) for count in counts)
        made.add_row(Text(name), size(about["bytes"]), *cells, Text(about["form"]))
    console.print(made)
    columns = ["model", "backend", "batch", "ms", "p95", "samples/s", "ratio", "load ms", "memory"]
    made = table([*columns, "nodes by provider"])
    for row in facts["timings"]:
        low, high = row["ratio_quartiles"]
        memory = row["peak_bytes"] if row["device_bytes"] is None else row["device_bytes"]
        made.add_row(
            Text(row["model"]),
            row["backend"],
            str(row["batch_size"]),
            f"{row['latency_ms']:.3g}",
            f"{row['p95_ms']:.3g}",
            f"{row['throughput']:.4g}",
            f"{row['ratio']:.3f} ({low:.2f}–{high:.2f})",
            number(row["load_ms"], ".0f") or "–",
            size(memory),
            ", ".join(f"{count} {name}" for name, count in row["nodes_by_provider"].items()),
        )
    console.print(made)
    firsts = dict.fromkeys(row["ratio_to"] for row in facts["timings"])
    console.print(f"[dim]ratio:[/] to {' or '.join(firsts)}, median and quartiles over the turns")
    for missing in facts["absent"]:
        line = Text.assemble(
            ("not measured: ", "yellow"), f"{missing['what']}: {missing['reason']}"
        )
        console.print(line)
