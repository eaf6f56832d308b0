"""`fold` for a folder of transformers: written, loaded again in a fresh process, compared, then named."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from normconv.deploy.reload import reload_folder
from normconv.errors import CheckFailed, Problem, Refused, UsageError
from normconv.files import atomic_folder, write_json
from normconv.folding import fold
from normconv.layers import copy_model
from normconv.proof import prove_outputs, prove_recorded, record_original
from normconv.report import Check, Report
from normconv.sources.folded import RECORD, WEIGHTS, fresh, write_folded
from normconv.sources.hf_folder import quiet_transformers
from normconv.sources.library_layout import refill_weight_norms_

__all__ = ["REPORT", "Layout", "check_folder_out", "fold_folder", "refuse_left"]

Layout = Literal["plain", "library"]
REPORT = "normconv.json"

_WEIGHT_FILES = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".onnx",
        ".gguf",
        ".npz",
        ".pkl",
    ]
)


def fold_folder(
    model: nn.Module,
    source: Path,
    out: Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    layout: Layout = "plain",
    strict: bool = False,
) -> Report:
    """Fold a transformers model and write it as a folder that was proved after loading it again.

    With ``layout="plain"`` the folder has plain weights. A class that applies weight norm when it is
    made cannot take those by `from_pretrained`: they are then in ``folded.safetensors``, for
    `normconv.load_folded`. With ``layout="library"`` the folder is for `from_pretrained` whatever the
    class: where that has weight norms it holds v = w and g = ‖w‖.

    All other files of the source (configuration, tokenizer, preprocessor) are copied.

    Args:
        model: as `normconv.load` gives it for the source; not changed.
        source: the folder it came from.
        out: a new or empty folder; on failure it is left as it was.
        args: positional example inputs.
        kwargs: keyword example inputs.
        layout: in which form the weights are written.
        strict: refuse a reparametrisation that fold does not know.

    Raises:
        UsageError: `out` holds files, or lies in the source.
        Refused: with `strict`, naming what is left.
        CheckFailed: the folded model, or the folder loaded in a fresh process, computes something else.
    """
    check_folder_out(source, out)
    folded, report = fold(model, share_tensors=True)
    if strict:
        refuse_left(report)
    recording = record_original(model, (), args, kwargs)
    proof = prove_recorded(recording, folded)
    report = report.extended(checks=proof.checks, facts=proof.facts, notes=proof.notes)
    if not report.passed:
        raise CheckFailed(report, folded)
    with atomic_folder(out) as folder:
        with quiet_transformers():
            report = report.extended(facts=_write(model, folded, source, folder, layout))
        left_behind = _copy_rest(source, folder)
        if left_behind:
            note = f"files and folders of other weights are not copied: {', '.join(left_behind)}"
            report = report.extended(notes=(note,))
        reloaded = reload_folder(folder, args, kwargs)
        checks: tuple[Check, ...]
        if reloaded.failure:
            checks = (Check("the folder loads in a fresh process", False, detail=reloaded.failure),)
        else:
            fits = Check(
                "every weight of the folder is its own",
                not reloaded.misfits,
                detail=", ".join(reloaded.misfits[:5]),
            )
            checks = (fits, *prove_outputs(recording, reloaded.outputs))
        marked = tuple(_in_fresh_process(check) for check in checks)
        report = report.extended(checks=marked, facts={"written": {"folder": str(out)}})
        if not report.passed:
            raise CheckFailed(report)
        write_json(folder / REPORT, report.to_dict())
    return report


def check_folder_out(source: Path, out: Path) -> None:
    """Refuse, before any work, a folder that cannot be written.

    Raises:
        UsageError: it holds files already, is a file, or lies in the source (or the source in it).
    """
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        what = f"{out} is the source, or one of them lies in the other"
        raise UsageError(Problem("--out", what, "name another folder"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = f"{out} holds files already" if out.is_dir() else f"{out} is a file"
        raise UsageError(Problem("--out", what, "name a new or an empty folder"))


def refuse_left(report: Report) -> None:
    """Raise where fold left a reparametrisation that it does not know.

    Raises:
        Refused: naming each.
    """
    count = int(report.facts["left"])
    if count:
        left = [note.partition(": ") for note in report.notes[-count:]]
        way_out = "or fold without strict, which keeps it"
        raise Refused([Problem(name, what, way_out) for name, _, what in left])


def _write(
    model: nn.Module, folded: nn.Module, source: Path, folder: Path, layout: Layout
) -> dict[str, str]:
    """Write the weights; say in which form, and what loads them."""
    kind: Any = type(model)
    by_library = f"transformers.{kind.__name__}.from_pretrained(folder)"
    made_by_class = fold(fresh(kind, source), share_tensors=True).report
    if not made_by_class.facts["folded"]:
        cast(Any, folded).save_pretrained(folder)
        return {"layout": "plain weights, which the class takes", "load with": by_library}
    if layout == "plain":
        write_folded(folded, folder)
        by_us = f'normconv.load_folded("{kind.__name__}", folder)'
        form = f"plain weights in {WEIGHTS}, since {kind.__name__} makes itself weight-normed"
        return {"layout": form, "load with": by_us}
    normed = copy_model(model)
    if (source / RECORD).is_file():  # it has no weight norms any more
        normed = fresh(kind, source)
        normed.load_state_dict(folded.state_dict(), strict=False)
    count = refill_weight_norms_(normed, folded)
    cast(Any, normed).save_pretrained(folder)
    return {"layout": f"the class's own, v = w and g = ‖w‖ in {count}", "load with": by_library}


def _copy_rest(source: Path, folder: Path) -> list[str]:
    """Copy what is no weights; return what is left behind."""
    left = []
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or entry.name in (RECORD, REPORT):
            continue
        if entry.is_dir():
            if any(_holds_weights(inner) for inner in entry.rglob("*")):
                left.append(f"{entry.name}/")
            else:
                shutil.copytree(entry, folder / entry.name)
        elif not _holds_weights(entry):
            shutil.copyfile(entry, folder / entry.name)
        elif entry.suffix != ".safetensors" and not entry.name.startswith("pytorch_model"):
            left.append(entry.name)
    return left


def _holds_weights(path: Path) -> bool:
    return path.suffix in _WEIGHT_FILES or path.name.endswith(".index.json")


def _in_fresh_process(check: Check) -> Check:
    return replace(check, name=f"reloaded: {check.name}")
