"""What the commands share: options, loading, printing, exit codes."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from normconv.cli.pages import Html as Html
from normconv.cli.pages import is_main_process as is_main_process
from normconv.cli.pages import page_wanted, write_page
from normconv.cli.saving import report_path as report_path
from normconv.cli.saving import reporting as reporting
from normconv.cli.saving import save_or_reject as save_or_reject
from normconv.errors import CheckFailed, NormconvError, Problem, UsageError
from normconv.report import Report
from normconv.report.html import check_html_path
from normconv.report.terminal import print_error, print_report

if TYPE_CHECKING:
    import torch
    from torch import nn

    from normconv.sources import Inputs, Loaded

MODEL = (".pt", ".pth", ".safetensors")

__all__ = [
    "MODEL",
    "At",
    "Json",
    "Opened",
    "Out",
    "Provider",
    "ReferenceOptions",
    "SourceOptions",
    "check_outputs",
    "command",
    "emit",
    "options_from",
    "out_path",
    "report_path",
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
At = Annotated[
    str,
    typer.Option("--at", metavar="NAME", help="Only this submodule; inputs stay the model's."),
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="The file to write.")]
Provider = Annotated[
    str | None, typer.Option("--provider", help="cpu, cuda or tensorrt; without it cuda, else cpu.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


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


def _write_failure(error: NormconvError) -> None:
    """Write the report with the failed checks where `--report` says."""
    try:
        if isinstance(error, CheckFailed):
            write_page(error.report)
    except NormconvError as also:
        print_error(Console(stderr=True), also)


def emit(report: Report, *, as_json: bool, all_sites: bool = False) -> None:
    """Print a report as tables, or as JSON alone; write it as HTML where that is wanted."""
    if not is_main_process():
        return
    write_page(report)
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(Console(), report, all_sites=all_sites)


@contextmanager
def stage(text: str, *, as_json: bool = False) -> Iterator[None]:
    """Show what is being done: a spinner on a terminal, a line elsewhere; on standard error."""
    console = Console(stderr=True)
    if as_json or not is_main_process():
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

    def to(self, device: torch.device) -> Opened:
        """Move model (the same one) and inputs."""
        self.model.to(device)
        return replace(self, inputs=self.inputs.to(device))

    def describe(self, report: Report) -> Report:
        """Put where model and inputs come from at the head of a report."""
        facts = {**self.loaded.facts, "example inputs": self.inputs.origin}
        rest = {name: value for name, value in report.facts.items() if name not in facts}
        notes = self.loaded.notes + report.notes
        return replace(report, facts={**facts, **rest}, notes=notes)


@dataclass(frozen=True)
class SourceOptions:
    """The options that say which model is meant and what to run it on.

    Args:
        source: a file or a spec.
        model: the model a checkpoint is for.
        model_arg: its arguments, NAME=VALUE each.
        key: where in the checkpoint the weights are.
        trust: what the file may name besides libraries.
        random_weights: take a named model as it is initialised.
        input_: the example input as it was given.
        as_json: nothing but JSON is wanted.
        html: where the report is also written, as HTML.
    """

    source: Source
    model: ModelSpec = None
    model_arg: ModelArg = None
    key: Key = None
    trust: Trust = None
    random_weights: RandomWeights = False
    input_: Input = None
    as_json: Json = False
    html: Html = None

    def open(self) -> Opened:
        """Load the model and find its example inputs."""
        with stage(f"load {self.source}", as_json=self.as_json):
            from normconv.sources import example_inputs, open_source

            loaded = open_source(
                self.source,
                **self.checkpoint,
                trust=tuple(self.trust or ()),
                random_weights=self.random_weights,
            )
            inputs = example_inputs(loaded.model, self.input_, source=self.source)
            return Opened(loaded, inputs, self.source)

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What says how a file of weights is read."""
        from normconv.sources import parse_model_args

        arguments = parse_model_args(self.model_arg or [])
        return {"model": self.model, "model_args": arguments, "key": self.key}


@dataclass(frozen=True)
class ReferenceOptions(SourceOptions):
    """The same for a command that can do without a source."""

    source: Source = ""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function; a parameter that is a dataclass stands for its fields.

    So commands share groups of options without repeating them. normconv's errors become a message
    and the exit code they stand for. Where there is an option `html`, a report that is emitted, or that
    a failed check carries, is written there too.
    """
    own = inspect.signature(function, eval_str=True).parameters
    groups: dict[str, Callable[..., Any]] = {
        name: parameter.annotation
        for name, parameter in own.items()
        if hasattr(parameter.annotation, "__dataclass_fields__")
    }
    fields_of = {
        n: inspect.signature(group, eval_str=True).parameters for n, group in groups.items()
    }

    @functools.wraps(function)
    def run(**given: Any) -> None:
        as_json = bool(given.get("as_json"))
        page = given.get("html")
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field in fields_of[name]})
        with page_wanted(page):
            try:
                if page is not None:
                    check_html_path(page)
                function(**given)
            except NormconvError as error:
                _print_failure(error, as_json)
                _write_failure(error)
                raise typer.Exit(error.exit_code) from None

    every = [p for n, p in own.items() for p in fields_of.get(n, {n: p}).values()]
    # A parameter without a default is an argument, and those come first.
    parameters = sorted(every, key=lambda parameter: parameter.default is not parameter.empty)
    # typer reads the signature, or, in older versions, the annotations.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run


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
        return Path(Path(source.rpartition(":")[2]).name + suffix)
    return path.with_name(f"{path.stem}{suffix}")


def check_outputs(
    source: str | Sequence[str | None], *outputs: tuple[str, Path | None, tuple[str, ...]]
) -> None:
    """Refuse, before any work, outputs that would destroy an input or each other.

    Args:
        source: what is read: the model, then whatever else.
        outputs: for each the option it comes from, the path, and the endings it may have.

    Raises:
        UsageError: lists every such path.
    """
    problems = []
    read = [source] if isinstance(source, str) else [each for each in source if each is not None]
    taken = {Path(each).resolve(): "read" for each in read[1:] if Path(each).exists()}
    if Path(read[0]).exists():
        taken[Path(read[0]).resolve()] = "the source"
    for option, path, endings in outputs:
        if path is None:
            continue
        if path.is_dir():
            problems.append(Problem(option, f"{path} is a folder", "name a file"))
        elif path.suffix.lower() not in endings:
            what = f"{path} does not end in {' or '.join(endings)}"
            problems.append(Problem(option, what, "give it such a name"))
        elif (place := path.resolve()) in taken:
            problems.append(Problem(option, f"{path} is {taken[place]}", "name another file"))
        else:
            taken[place] = f"what {option} names"
    if problems:
        raise UsageError(problems)


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
