"""`normconv calibrate`, `normconv recover`, and the options that say which data a command may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import Progress

from normconv.cli.common import (
    MODEL,
    Opened,
    Out,
    SourceOptions,
    check_outputs,
    command,
    emit,
    is_main_process,
    out_path,
    report_path,
    reporting,
    save_or_reject,
    stage,
)
from normconv.errors import Problem, UsageError

if TYPE_CHECKING:
    from torch import nn

    from normconv.calibration import Share
    from normconv.plan import Plan
    from normconv.report import Report

__all__ = ["BatchOptions", "Data", "DataOptions", "calibrate", "progress_of", "recover"]


@dataclass(frozen=True)
class BatchOptions:
    """How images and arrays become batches.

    Args:
        batch: samples a batch.
        limit: at most so many samples.
        mean: of each channel; empty for the model's own.
        std: of each channel.
        size: of the square that images are cropped to.
        data_use: whose the data is.
        device: what to compute on.
    """

    batch: Annotated[int, typer.Option("--batch-size", min=1, help="Samples a batch.")] = 64
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="At most so many samples of the data.")
    ] = 256
    mean: Annotated[
        str, typer.Option("--mean", help="Of images, e.g. 0.485,0.456,0.406; else the model's.")
    ] = ""
    std: Annotated[str, typer.Option("--std", help="Of images, e.g. 0.229,0.224,0.225.")] = ""
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Scale and crop images to this square.")
    ] = None
    data_use: Annotated[
        str,
        typer.Option(
            "--data-use",
            help="public; private: the report says that no accountant covered it; none: refuse.",
        ),
    ] = "public"
    device: Annotated[
        str,
        typer.Option("--device", help="To compute on; auto takes a GPU where there is one."),
    ] = "auto"

    def join(self) -> Share:
        """Join the processes started together, and say what part of the data is this one's."""
        from normconv.calibration import join_processes

        return join_processes(self.device)

    def open(self, spec: str | None, model: nn.Module, share: Share, *, at_least: int = 0) -> Any:
        """Open data for a model, of it at least so many samples; None for none."""
        if spec is None:
            return None
        from normconv.sources import Transform, open_data

        transform = Transform.of(
            model, _numbers("--mean", self.mean), _numbers("--std", self.std), self.size
        )
        part = (share.rank, share.processes)
        limit = max(self.limit, at_least)
        return open_data(spec, transform=transform, batch=self.batch, limit=limit, share=part)


@dataclass(frozen=True)
class DataOptions(BatchOptions):
    """Also how what is made of a model by them is measured against its original.

    Args:
        held_out: other data, to measure on.
        min_agreement: the least share of samples with the original's top-1.
        cache: where activations are kept between passes.
        plot: a PNG file of drift by depth.
    """

    held_out: Annotated[
        str | None,
        typer.Option("--held-out", metavar="DATA", help="Other data to measure agreement on."),
    ] = None
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement", min=0, max=1, help="Exit 1 below this share of same top-1."
        ),
    ] = None
    cache: Annotated[
        str,
        typer.Option(
            "--cache", help="Of activations, so that no pass starts anew: memory, disk, none."
        ),
    ] = "memory"
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="PNG", help="Also draw the drift of each norm by depth."),
    ] = None

    def join(self) -> Share:
        """Do as every command with data, once the plot's path is checked."""
        from normconv.report.drift_plot import check_plot_path

        if self.plot is not None:
            check_plot_path(self.plot)
        return super().join()

    def draw(self, report: Report) -> dict[str, str]:
        """Draw what was asked for; return what was written."""
        if self.plot is None or not is_main_process():
            return {}
        from normconv.report import plot_drift

        plot_drift(report, self.plot)
        return {"plot": str(self.plot)}


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")] if text else []
    except ValueError:
        raise UsageError(
            Problem(option, f"{text!r} is no list of numbers", "0.5,0.5,0.5")
        ) from None


@contextmanager
def progress_of(text: str, *, as_json: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Show a bar on a terminal, a line at each tenth elsewhere; on standard error."""
    console = Console(stderr=True)
    if as_json or not is_main_process():
        yield None
    elif console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task(text)

            def move(done: int, total: int, told: str) -> None:
                said = f"{text}: {told}" if told else text
                bar.update(task, completed=done, total=total, description=said)

            yield move
    else:

        def line(done: int, total: int, told: str) -> None:
            if done * 10 // total != (done - 1) * 10 // total:
                said = f", {told}" if told else ""
                console.print(f"{text}: {done} of {total}{said}", highlight=False)

        yield line


Reference = Annotated[
    str,
    typer.Option("--reference", help="The original model: a file or a spec.", show_default=False),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Unlabelled inputs: images (folder, .zip), .npz, .pt, .safetensors, pkg.mod:factory.",
        show_default=False,
    ),
]


@command
def calibrate(
    source: SourceOptions,
    data_options: DataOptions,
    reference: Reference,
    data: Data,
    out: Out = None,
) -> None:
    """Match a converted model's layers and norms to the original's, on unlabelled data.

    Writes MODEL.calibrated.pt and .json, or what -o says.
    """
    with _pair(source, data_options, reference, data, ".calibrated.pt", out) as pair:
        from normconv.calibration import calibrate as calibrate_model

        plan, cache = _plan_of(pair.opened), cast(Any, data_options.cache)
        model = pair.opened.model
        pair.result = calibrate_model(model, plan, pair.data, cache=cache, **pair.common)


@command
def recover(
    source: SourceOptions,
    data_options: DataOptions,
    reference: Reference,
    data: Data,
    out: Out = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Batches to learn from.")] = 400,
    lr: Annotated[float, typer.Option("--lr", help="The largest learning rate.")] = 3e-4,
    features: Annotated[
        float, typer.Option("--features", min=0, help="Weight of the outputs of converted norms.")
    ] = 0.0,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of both softmaxes, of class scores.")
    ] = 2.0,
    every: Annotated[
        int, typer.Option("--every", min=1, help="Steps between looks at the agreement.")
    ] = 50,
    patience: Annotated[
        int, typer.Option("--patience", min=1, help="Looks without a better one before it stops.")
    ] = 8,
    amp: Annotated[
        bool, typer.Option("--amp", help="Compute in bfloat16 where that is safe.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Write it at each look, go on from it.")
    ] = None,
) -> None:
    """Teach a converted model to put out what the original does, on unlabelled data.

    Writes MODEL.recovered.pt and .json, or what -o says. Give it thousands of images: --limit 20000.
    """
    suffix = ".recovered.pt"
    with _pair(source, data_options, reference, data, suffix, out, checkpoint) as pair:
        from normconv.calibration import Lesson
        from normconv.calibration import recover as recover_model

        pair.common["teacher"] = pair.common.pop("reference")
        looks = {"temperature": temperature, "every": every, "patience": patience}
        lesson = Lesson(steps=steps, lr=lr, features=features, amp=amp, **cast(Any, looks))
        student, keywords = pair.opened.model, {**pair.common, "lesson": lesson}
        pair.result = recover_model(student, data=pair.data, checkpoint=checkpoint, **keywords)


@dataclass
class _Pair:
    """A converted model, its original and data, and what comes of them."""

    opened: Opened
    data: Any
    common: dict[str, Any]
    result: Any = None


@contextmanager
def _pair(
    source: SourceOptions,
    options: DataOptions,
    reference: str,
    data: str,
    suffix: str,
    out: Path | None,
    checkpoint: Path | None = None,
) -> Iterator[_Pair]:
    """Open both models and the data, show a bar, and write what the block made."""
    path = out_path(source.source, suffix, out)
    check_outputs(
        (source.source, reference, data, options.held_out),
        ("--out", path, MODEL),
        ("the report", report_path(path), (".json",)),
        ("--checkpoint", checkpoint, (checkpoint.suffix.lower(),) if checkpoint else ()),
    )
    share = options.join()
    opened = source.open()
    opened.model.to(share.device)
    with stage(f"load {reference}", as_json=source.as_json):
        from normconv.sources import open_source

        trust = tuple(source.trust or ())
        original = open_source(reference, **source.checkpoint, trust=trust).model.to(share.device)
    common = {
        "reference": original,
        "held_out": options.open(options.held_out, original, share),
        "min_agreement": options.min_agreement,
        "data_use": options.data_use,
    }
    pair = _Pair(opened, options.open(data, original, share), common)
    text = suffix.split(".")[1]
    with reporting(path, opened.describe), progress_of(text, as_json=source.as_json) as progress:
        common["progress"] = progress
        yield pair
    model, report = pair.result
    report = opened.describe(report)
    report = save_or_reject(model.cpu(), report, path, opened)
    files = {"model": str(path), "report": str(report_path(path)), **options.draw(report)}
    emit(report.extended(facts={"written": files}), as_json=source.as_json)


def _plan_of(opened: Opened) -> Plan:
    """The plan that made the model, from its own history."""
    from normconv.plan import Plan, history_of

    made = [entry["apply"] for entry in history_of(opened.model) if "apply" in entry]
    if not made:
        what = "nothing says how it was converted"
        raise UsageError(Problem(opened.source, what, "give what `normconv convert --to gn` wrote"))
    return Plan.from_dict(made[-1])
