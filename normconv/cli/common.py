"""What the commands share: options, loading, printing, exit codes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from normconv.errors import CheckFailed, NormconvError, UsageError
from normconv.files import atomic_path, rejected_path, write_json
from normconv.report import Report
from normconv.report.terminal import print_error, print_report

if TYPE_CHECKING:
    from torch import nn

    from normconv.sources import Inputs, Loaded

__all__ = [
    "Input",
    "Json",
    "Key",
    "ModelArg",
    "ModelSpec",
    "Opened",
    "Out",
    "RandomWeights",
    "Source",
    "Trust",
    "command",
    "emit",
    "open_model",
    "out_path",
    "reporting",
    "save_or_reject",
    "stage",
]

SOURCE_HELP = (
    "A whole-module .pt, a checkpoint (with --model), or a spec: timm:NAME, torchvision:NAME, "
    "transformers:FOLDER, pkg.mod:factory."
)
Source = Annotated[str, typer.Argument(help=SOURCE_HELP, show_default=False)]
ModelSpec = Annotated[
    str | None, typer.Option("--model", help="The model a checkpoint is for, as a spec.")
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="NAME=VALUE", help="An argument of the model; repeatable."),
]
Key = Annotated[
    str | None, typer.Option("--key", help="Where in the checkpoint the weights are, dotted.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="PACKAGE",
        help="Let the file name classes of a package, ./src or train.py.",
    ),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Take a named model as it is initialised.")
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="SHAPE|FILE", help="Example input: 2x3x224x224, file.pt or file.npz."
    ),
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="The file to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

Command = TypeVar("Command", bound=Callable[..., None])


def command(function: Command) -> Command:
    """Turn normconv's errors into a message and the exit code they stand for."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            function(*args, **kwargs)
        except NormconvError as error:
            _print_failure(error, as_json)
            raise typer.Exit(error.exit_code) from None

    return run  # type: ignore[return-value]


def _print_failure(error: NormconvError, as_json: bool) -> None:
    report = error.report if isinstance(error, CheckFailed) else None
    if as_json:
        problems = [problem.__dict__ for problem in error.problems]
        document: dict[str, Any] = report.to_dict() if report is not None else {}
        kind = type(error).__name__
        document |= {"error": kind, "problems": problems, "exit_code": error.exit_code}
        typer.echo(json.dumps(document, indent=2))
        return
    if report is not None:
        print_report(Console(), report)
    print_error(Console(stderr=True), error)


def emit(report: Report, *, as_json: bool, all_sites: bool = False) -> None:
    """Print a report as tables, or as JSON alone."""
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(Console(), report, all_sites=all_sites)


@contextmanager
def stage(text: str, *, as_json: bool = False) -> Iterator[None]:
    """Show what is being done: a spinner on a terminal, a line elsewhere; on standard error."""
    console = Console(stderr=True)
    if as_json:
        yield
    elif console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(f"{text} …", highlight=False)
        yield


@dataclass(frozen=True)
class Opened:
    """A model from a source, with the inputs to run it on.

    Args:
        loaded: the model, what was found, and notes.
        inputs: example inputs and where they come from.
        source: the source as it was given.
    """

    loaded: Loaded
    inputs: Inputs
    source: str

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.loaded.model

    def describe(self, report: Report) -> Report:
        """Put where model and inputs come from at the head of a report."""
        facts = {**self.loaded.facts, "example inputs": self.inputs.origin}
        return Report(
            **{
                **report.__dict__,
                "facts": {**facts, **{k: v for k, v in report.facts.items() if k not in facts}},
                "notes": self.loaded.notes + report.notes,
            }
        )


def open_model(
    source: str,
    *,
    model: str | None,
    model_arg: list[str] | None,
    key: str | None,
    trust: list[str] | None,
    random_weights: bool,
    input_: str | None,
    as_json: bool,
) -> Opened:
    """Load a model and its example inputs as the shared options say."""
    with stage(f"load {source}", as_json=as_json):
        from normconv.sources import example_inputs, open_source, parse_model_args

        loaded = open_source(
            source,
            model=model,
            model_args=parse_model_args(model_arg or []),
            key=key,
            trust=tuple(trust or ()),
            random_weights=random_weights,
        )
        return Opened(loaded, example_inputs(loaded.model, input_, source=source), source)


def out_path(source: str, suffix: str, out: Path | None) -> Path:
    """Name the file to write: `out`, else the source's name with another ending.

    A file's result stands beside it; a spec's in the current folder.

    >>> out_path("runs/model.pt", ".wn.pt", None).as_posix()
    'runs/model.wn.pt'
    >>> out_path("timm:resnet50", ".wn.pt", None).as_posix()
    'resnet50.wn.pt'
    """
    if out is not None:
        return out
    path = Path(source)
    if not path.exists() and ":" in source:
        path = Path(source.rpartition(":")[2]).name  # type: ignore[assignment]
        return Path(f"{path}{suffix}")
    return path.with_name(f"{path.stem}{suffix}")


def save_or_reject(model: nn.Module, report: Report, path: Path) -> None:
    """Write model and report under their names, or, where a check failed, as ``NAME.rejected``.

    A rejected pair leaves an older good pair untouched.
    """
    from normconv.sources import save

    document = report_path(path)
    if report.passed:
        save(model, path)
        write_json(document, report.to_dict())
        return
    with atomic_path(rejected_path(path)) as temporary:
        made = temporary.with_name(path.name)
        save(model, made)
        os.replace(made, temporary)
    write_json(rejected_path(document), report.to_dict())


def report_path(path: Path) -> Path:
    """Name the JSON beside a model file: ``model.wn.pt`` has ``model.wn.json``."""
    return path.with_suffix(".json")


@contextmanager
def reporting(path: Path, describe: Callable[[Report], Report]) -> Iterator[None]:
    """Keep what a failed check rejected, then let the error go on."""
    try:
        yield
    except CheckFailed as error:
        error.report = describe(error.report)
        if error.model is not None:
            save_or_reject(error.model, error.report, path)  # type: ignore[arg-type]
        raise


def options_from(values: list[str] | None) -> Mapping[str, Any]:
    """Read ``NAME=VALUE`` pairs.

    Raises:
        UsageError: a value without a name.
    """
    from normconv.sources import parse_model_args

    for value in values or []:
        if "=" not in value:
            raise UsageError(f"--option takes NAME=VALUE, not {value!r}")
    return parse_model_args(values or [])
