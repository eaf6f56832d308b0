"""The typer application. Torch is loaded by the commands, not by `--help`."""

from __future__ import annotations

import sys

import typer

from normconv import __version__
from normconv.cli import (
    audit,
    bench,
    calibrate,
    compare,
    convert,
    demo,
    doctor,
    export,
    fold,
    initialise,
    inspect,
    refactor,
    state_dict,
    verify,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="normconv",
    help="Take BatchNorm out of a PyTorch model, keep what it computes, prove it, deploy it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done and proved, 1 a check failed, 2 usage, 3 refused input or site.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normconv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("inspect")(inspect.inspect)
app.command("plan")(convert.plan)
app.command("convert")(convert.convert)
app.command("initialise")(initialise.initialise)
app.command("calibrate")(calibrate.calibrate)
app.command("recover")(calibrate.recover)
app.command("fold")(fold.fold)
app.command("refactor")(refactor.refactor)
app.add_typer(state_dict.app, name="state-dict")
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("audit")(audit.audit)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show σ must not stop us
    app()
