"""`normconv state-dict convert`: checkpoints between conventions, without the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from normconv.cli.common import Json, Key, Trust, command, emit, stage
from normconv.errors import Problem, UsageError

__all__ = ["app"]

Number = TypeVar("Number", int, float)

app = typer.Typer(
    help="Checkpoints from one convention of names to another, without the model.",
    no_args_is_help=True,
)


def _by_glob(
    option: str, words: list[str] | None, kind: Callable[[str], Number], other: Number | None
) -> dict[str, Number]:
    """Read ``GLOB=VALUE`` words; what has no ``=`` is a value for all, or a glob with `other`."""
    found: dict[str, Number] = {}
    problems = []
    for word in words or []:
        glob, equals, value = word.rpartition("=")
        if not equals and other is not None:
            found[word] = other
            continue
        try:
            found[glob or "*"] = kind(value)
        except ValueError:
            what = f"{value!r} in {word!r} is no number"
            problems.append(Problem(option, what, f"{option} GLOB=NUMBER"))
    if problems:
        raise UsageError(problems)
    return found


def _check_inputs(out: Path, others: Mapping[str, Path | None]) -> None:
    """Refuse an output that would replace what is read besides the source."""
    problems = [
        Problem("OUT", f"{out} is what {option} names", "name another file")
        for option, path in others.items()
        if path is not None and path.resolve() == out.resolve()
    ]
    if problems:
        raise UsageError(problems)


@app.command("convert")
@command
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A .safetensors, a .pt, or an index of shards (….index.json).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)
    ],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            help="plain, normconv-wn, legacy-wn, torch-wn, ws-qiao, ws-timm, ws-bit or ws-nf.",
        ),
    ] = "auto",
    to: Annotated[
        str, typer.Option("--to", help="plain, normconv-wn, legacy-wn or torch-wn.")
    ] = "plain",
    like: Annotated[
        Path | None,
        typer.Option("--like", help="A checkpoint with the keys that the result is to have."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="A plan of the model: its norms are folded, too."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            metavar="GLOB[=DIM]",
            help="Layers or weights that get a gain, or are standardized; repeatable.",
        ),
    ] = None,
    dim: Annotated[
        int, typer.Option("--dim", help="The axis of those gains; 1 for transposed convolutions.")
    ] = 0,
    eps: Annotated[
        list[str] | None,
        typer.Option(
            "--eps",
            metavar="[GLOB=]EPS",
            help="Of the norms of --plan, or of standardized weights; repeatable.",
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option("--scale", help="exp: normconv-wn gets gains e^(c·s).")
    ] = "linear",
    c: Annotated[float | None, typer.Option("--c", help="Of gains e^(c·s).")] = None,
    gamma: Annotated[float | None, typer.Option("--gamma", help="The constant γ of ws-nf.")] = None,
    key: Key = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint between plain weights, weight norms, and from standardized weights."""
    _check_inputs(out, {"--like": like, "--plan": plan})
    options: dict[str, Any] = {
        "layers": _by_glob("--layers", layers, int, dim),
        "eps": _by_glob("--eps", eps, float, None) or None,
    }
    with stage(f"convert {source}", as_json=as_json):
        from normconv.bridges import convert_file
        from normconv.plan import Plan

        report = convert_file(
            source,
            out,
            to,
            key=key,
            trust=tuple(trust or ()),
            from_=from_,
            like=like,
            plan=None if plan is None else Plan.read(plan),
            scale=scale,
            c=c,
            gamma=gamma,
            **options,
        )
    emit(report.extended(facts={"written": str(out)}), as_json=as_json)
