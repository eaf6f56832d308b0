"""`normconv demo`: the main job on digits, with a progress bar and a closing table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from normconv.cli.common import Json, command
from normconv.report import jsonable
from normconv.report.terminal import print_report, table

if TYPE_CHECKING:
    from normconv.demo import Row, Stages

__all__ = ["demo", "show"]


@command
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for all files.")] = Path(
        "normconv-demo"
    ),
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the digits.")] = 12,
    as_json: Json = False,
) -> None:
    """Train a small BatchNorm network on digits, convert it, fold, export, run, and compare."""
    console = Console(quiet=as_json)
    console.print("[bold]normconv demo[/]: BatchNorm out, weight norm in, folded ONNX that matches")
    from normconv.demo import run

    with _progress(console) as (begin, step, say):
        stages = run(out, epochs=epochs, begin=begin, step=step, say=say)
    if as_json:
        import json

        document = {
            "folder": str(out),
            "rows": [row.__dict__ for row in stages.rows],
            "convert": stages.converted.to_dict(),
            "fold": stages.folded.to_dict(),
            "export": stages.exported.to_dict(),
        }
        typer.echo(json.dumps(jsonable(document), indent=2))
        return
    show(console, stages, out)


def show(console: Console, stages: Stages, out: Path) -> None:
    """Print what the demo did: the reports, the closing table, the command for the user's model."""
    print_report(console, stages.converted)
    print_report(console, stages.exported)
    _closing_table(console, stages.rows)
    console.print(f"\nAll files are in [bold]{out}[/].", highlight=False)
    console.print("The same for your own model:", highlight=False)
    command_line = "normconv convert model.pt --to wn --onnx model.onnx"
    console.print(f"  [bold green]{command_line}[/]", highlight=False)


def _closing_table(console: Console, rows: tuple[Row, ...]) -> None:
    console.rule("[bold]what became of the network")
    made = table(["model", "accuracy", "error vs float64", "norm nodes", "ms / 64", "file"])
    for row in rows:
        made.add_row(
            row.name,
            f"{row.accuracy:.2%}",
            f"{row.error:.1e}",
            str(row.norm_nodes),
            f"{row.milliseconds:.2f}",
            row.file,
        )
    console.print(made)


Progress = tuple[Callable[[int], None], Callable[[float], None], Callable[[str], None]]


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield _lines(console)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("train", total=None, loss="")

        def begin(steps: int) -> None:
            bar.update(task, total=steps)

        def step(loss: float) -> None:
            bar.update(task, advance=1, loss=f"loss {loss:.3f}")

        def say(line: str) -> None:
            bar.update(task, description=line, loss="")

        yield begin, step, say


def _lines(console: Console) -> Progress:
    state = {"done": 0, "steps": 1}

    def begin(steps: int) -> None:
        state["steps"] = steps
        console.print(f"train: {steps} steps", highlight=False)

    def step(loss: float) -> None:
        state["done"] += 1
        if state["done"] * 4 % state["steps"] < 4:
            share = state["done"] / state["steps"]
            console.print(f"train: {share:4.0%}, loss {loss:.3f}", highlight=False)

    def say(line: str) -> None:
        console.print(line, highlight=False)

    return begin, step, say
