"""`normconv compare`: one network under several normalizations, as curves, table and picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from normconv.cli.common import Json, ModelArg, command, is_main_process
from normconv.errors import Problem, UsageError
from normconv.report import jsonable
from normconv.report.terminal import table

if TYPE_CHECKING:
    from normconv.calibration import Share
    from normconv.sources.datasets import Labelled
    from normconv.training import Budget, Comparison, Recipe

__all__ = ["compare", "show"]


@dataclass(frozen=True)
class BudgetOptions:
    """How much is trained; what is not given is the recipe's.

    Args:
        full: the published set-up.
        epochs: passes over the training samples.
        limit: of training samples.
        width: factor of the channels.
        batch_sizes: samples a step.
        seeds: of initial weights and order.
    """

    full: Annotated[bool, typer.Option("--full", help="The published set-up.")] = False
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the training samples.")
    ] = None
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="At most so many training samples, half to test."),
    ] = None
    width: Annotated[
        float | None, typer.Option("--width", help="Factor of the channels or units.")
    ] = None
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", metavar="LIST", help="Samples a step: 2,64,128.")
    ] = ""
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="So many, from 0 on; bands show them.")
    ] = None

    def of(self, recipe: Recipe) -> Budget:
        """Return the recipe's budget with what was given."""
        if self.width is not None and not 0 < self.width < float("inf"):
            raise UsageError(Problem("--width", f"{self.width} is no positive number"))
        given: dict[str, Any] = {
            "epochs": self.epochs,
            "limit": self.limit,
            "width": self.width,
            "batch_sizes": _sizes(self.batch_sizes) if self.batch_sizes else None,
            "seeds": None if self.seeds is None else tuple(range(self.seeds)),
        }
        budget = recipe.full if self.full else recipe.small
        return replace(budget, **{name: v for name, v in given.items() if v is not None})


def _sizes(text: str) -> tuple[int, ...]:
    words = text.split(",")
    sizes = tuple(int(word) for word in words if word.strip().isdecimal() and int(word) > 0)
    if len(sizes) < len(words) or len(set(sizes)) < len(sizes):
        what = f"{text!r} is no list of different whole numbers from 1"
        raise UsageError(Problem("--batch-sizes", what, "2,64,128"))
    return sizes


@dataclass(frozen=True)
class LabelledOptions:
    """Which labelled data is trained on.

    Args:
        data: a spec.
        data_dir: where the recipe's own data set is.
        test_share: of data in one part.
        download: fetch it.
    """

    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="digits, mnist:DIR, fashion-mnist:DIR, cifar10:DIR, images:PATH, pkg.mod:factory.",
        ),
    ] = None
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The folder of the recipe's own data set.")
    ] = None
    test_share: Annotated[
        float | None,
        typer.Option("--test-share", help="Of data in one part: keep this share to test on."),
    ] = None
    download: Annotated[
        bool, typer.Option("--download", help="Let torchvision fetch the data set into the folder.")
    ] = False

    def spec(self, recipe: Recipe) -> str:
        """Return what is trained on; empty where the recipe makes its own.

        Raises:
            UsageError: nothing says where the data is, or the folder would be ignored.
        """
        if self.data_dir is not None and (self.data is not None or recipe.data not in _FOLDERS):
            what = "--data says where it is" if self.data else f"{recipe.name} has no such folder"
            raise UsageError(Problem("--data-dir", what, "leave it out"))
        if self.data is not None or recipe.data not in _FOLDERS:
            return self.data or recipe.data
        if self.data_dir is None:
            what = f"{recipe.name} is trained on {recipe.data}, and nothing says where that is"
            way_out = f"--data-dir DIR (--download fetches it), or --data {recipe.data}:DIR"
            raise UsageError(Problem("--data-dir", what, way_out))
        return f"{recipe.data}:{self.data_dir}"

    def open(self, recipe: Recipe, limit: int | None) -> Labelled | None:
        """Open what is trained on, of it what the recipe looks at."""
        spec = self.spec(recipe)
        if not spec:
            if self.test_share is not None or self.download:
                what = f"{recipe.name} makes its own data"
                raise UsageError(Problem("--test-share, --download", what, "leave them out"))
            return None
        from normconv.sources.datasets import open_labelled

        most = None if recipe.whole else limit
        return open_labelled(spec, limit=most, test_share=self.test_share, download=self.download)


_FOLDERS = ("mnist", "fashion-mnist", "cifar10")


@command
def compare(
    context: typer.Context,
    budget: BudgetOptions,
    labelled: LabelledOptions,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name; --list shows them.")
    ] = "digits",
    normalizations: Annotated[
        str,
        typer.Option("--normalizations", metavar="LIST", help="plain,bn,wn,wn+init,wn+mobn,gn,..."),
    ] = "",
    model: Annotated[
        str | None,
        typer.Option("--model", help="A network of your own in place of a recipe, with --data."),
    ] = None,
    model_arg: ModelArg = None,
    lr: Annotated[float, typer.Option("--lr", help="Of Adam, with --model.")] = 1e-3,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder; runs in it are not done again.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto takes a GPU where there is one.")
    ] = "auto",
    amp: Annotated[
        bool, typer.Option("--amp", help="Compute in bfloat16 where that is safe.")
    ] = False,
    timing: Annotated[
        float,
        typer.Option("--timing", min=0, help="Seconds to time steps at each batch size; 0: none."),
    ] = 10.0,
    list_: Annotated[bool, typer.Option("--list", help="Show the recipes and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train one network under several normalizations: learning curves, a table and a picture.

    Writes comparison.json, curves.csv and curves.png. Call it again to go on after an interruption.
    """
    if list_:
        _list(Console(emoji=False))
        return
    _refuse_ignored(context, own=model is not None)
    from normconv.calibration import join_processes
    from normconv.training import compare as run
    from normconv.training import recipe_of, recipe_of_model
    from normconv.training.normalizations import check_normalizations

    names = tuple(normalizations.split(",")) if normalizations else None
    if names:
        check_normalizations(names)
    if model is not None:
        from normconv.sources import parse_model_args

        if labelled.data is None:
            what = "nothing says what it is trained on"
            raise UsageError(Problem("--model", what, "--data digits, or another data set"))
        arguments = parse_model_args(model_arg or [])
        chosen = recipe_of_model(model, labelled.data, model_args=arguments, lr=lr)
    else:
        chosen = recipe_of(recipe)
    wanted = budget.of(chosen)
    folder = out or Path(f"compare-{_file_name(chosen.name)}")
    if folder.is_file():
        raise UsageError(Problem("--out", f"{folder} is a file", "name a folder"))
    share = join_processes(device)
    with _watching(as_json=as_json, share=share) as progress:
        found = run(
            chosen,
            normalizations=names,
            budget=wanted,
            data=labelled.open(chosen, wanted.limit),
            folder=folder,
            share=share,
            amp=amp,
            timing=timing,
            progress=progress,
        )
    if found.missing:
        if is_main_process():
            left = f"{len(found.missing)} runs are with other processes: the last one writes"
            Console(stderr=True, emoji=False).print(left, highlight=False)
        return
    files = {**found.write(folder), **_draw(found, folder)}
    if as_json:
        import json

        typer.echo(json.dumps(jsonable({**found.document(), "written": files}), indent=2))
        return
    console = Console(emoji=False)
    show(console, found)
    for kind, path in files.items():
        console.print(f"[dim]{kind}:[/] {escape(path)}", highlight=False)


def _refuse_ignored(context: typer.Context, *, own: bool) -> None:
    """Refuse a recipe beside a network of one's own, and options of such a network without one."""
    names = {"recipe": "RECIPE"} if own else {"lr": "--lr", "model_arg": "--model-arg"}
    why = "--model takes a recipe's place" if own else "it goes with --model"
    problems = [
        Problem(shown, why, "leave one of them out" if own else "leave it out, or name a model")
        for name, shown in names.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if problems:
        raise UsageError(problems)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.")


def _draw(found: Comparison, folder: Path) -> dict[str, str]:
    if importlib.util.find_spec("matplotlib") is None:
        return {"plot": "none: pip install 'normconv[plot]'"}
    from normconv.report.curves_plot import plot_curves

    plot_curves(found.document(), folder / "curves.png")
    return {"plot": str(folder / "curves.png")}


def _list(console: Console) -> None:
    from normconv.training.recipes import RECIPES

    for recipe in RECIPES.values():
        names = ", ".join(recipe.normalizations)
        data = recipe.data or "makes its own data"
        console.print(f"[bold]{escape(recipe.name)}[/] ({data}; {names})", highlight=False)
        console.print(Padding(escape(recipe.reproduces), (0, 0, 1, 2)), highlight=False)


def show(console: Console, found: Comparison) -> None:
    """Print a row for each normalization and batch size."""
    console.rule(f"[bold]compare {escape(found.recipe)}")
    for name in ("reproduces", "data", "device"):
        if name in found.facts:
            console.print(f"[dim]{name}:[/] {escape(str(found.facts[name]))}", highlight=False)
    rows = found.summary()
    have = found.measures()
    measures = [n for n in (found.headline, "test_loss", "train_loss") if n in have]
    measures = list(dict.fromkeys(measures))
    words = [name.removeprefix("test_") if name == found.headline else name for name in measures]
    columns = ["norm", "batch", *(word.replace("_", " ") for word in words), "ms/step", "× plain"]
    noted = any(row["diverged"] for row in rows)
    made = table([*columns, "diverged"] if noted else columns)
    for row in rows:
        cells = [_cell(row, name) for name in measures]
        if row[found.headline] is not None and row[found.headline] == _best(found, rows, row):
            cells[0].stylize("bold green")
        times = [_number(row[name], ".2f") for name in ("step_ms", "ratio_to_plain")]
        first = (row["normalization"], str(row["batch_size"]))
        lost = Text(f"{row['diverged']} of {row['seeds']}", "red") if row["diverged"] else Text()
        made.add_row(*first, *cells, *times, *([lost] if noted else []))
    console.print(made)


def _best(found: Comparison, rows: list[dict[str, Any]], like: dict[str, Any]) -> float | None:
    values = [
        row[found.headline]
        for row in rows
        if row["batch_size"] == like["batch_size"] and row[found.headline] is not None
    ]
    better = max if found.higher_is_better else min
    return better(values) if len(values) > 1 else None


def _cell(row: dict[str, Any], name: str) -> Text:
    """Mean and deviation over the seeds; shares in percent."""
    mean, deviation = row[name], row[f"{name}_std"]
    percent = name.endswith("accuracy") and mean is not None
    shown = f"{mean:.1%}" if percent else _number(mean, ".4g")
    if deviation is None:
        return Text(shown)
    return Text(f"{shown} ± {100 * deviation:.1f}" if percent else f"{shown} ± {deviation:.1g}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


@contextmanager
def _watching(*, as_json: bool, share: Share) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a bar with the run on a terminal, a line at each run and tenth elsewhere."""
    console = Console(stderr=True, emoji=False)
    if as_json or not is_main_process():
        yield None
        return
    whose = "" if share.processes == 1 else f" (process 1 of {share.processes})"
    if console.is_terminal:
        from rich.progress import Progress

        with Progress(console=console) as bar:
            task = bar.add_task("prepare the data", total=None)
            yield lambda run, done, total: bar.update(
                task, description=escape(run + whose), completed=done, total=total
            )
        return
    console.print("prepare the data …", highlight=False)
    last = ("", -1)

    def line(run: str, done: int, total: int) -> None:
        nonlocal last
        if last != (run, done * 10 // total):
            last = (run, done * 10 // total)
            console.print(f"{escape(run)}{whose}: {done} of {total} steps", highlight=False)

    yield line
