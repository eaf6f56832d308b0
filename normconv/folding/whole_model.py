"""Fold: every weight that is computed from others becomes the plain weight it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from normconv.folding.constant_norms import put_constant_norms_
from normconv.folding.refactoring import reparametrise_layers_
from normconv.folding.reparametrisations import fold_weights_
from normconv.folding.standalone import check_standalone, plain_affines, replace_affines_
from normconv.graph import Names, survey
from normconv.graph.passes import settle_
from normconv.graph.rewrite import absorb_norm_, normalizer_name, replace_module_
from normconv.layers import (
    ChannelAffine,
    Cloned,
    MeanOnlyBatchNorm,
    copy_model,
)
from normconv.plan import Plan, history_of, record
from normconv.report import Report
from normconv.surgery import Result, apply_plan

__all__ = ["fold", "rebuild"]

# Affine maps in eval mode that no conversion counts as norms, and how a report counts them.
_AFFINES: dict[type[nn.Module], str] = {
    ChannelAffine: "channel affine",
    MeanOnlyBatchNorm: "mean-only batch norm",
}


def fold(
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    standalone: bool = False,
    share_tensors: bool = False,
) -> Result:
    """Return a copy of the model with plain weights in place of every computed one.

    Folds normconv's own layers, weight norm and spectral norm in both of torch's forms, pruning hooks,
    every other parametrization of `torch.nn.utils.parametrize`, and layers whose own `forward` computes
    a weight: the standardized convolutions of timm and transformers, and others of that kind. Each
    weight is the float64 value in eval mode rounded once; the model's buffers are read and never
    advanced. A row with ‖v‖ = 0, where torch's weight norm computes NaN, becomes 0 and is listed. What
    is not understood is left, counted in ``report.facts["left"]`` and named in the notes. Folding a plain
    model changes nothing.

    Args:
        model: not changed.
        example_inputs: with inputs, a `ChannelAffine` or `MeanOnlyBatchNorm` is folded into its neighbour
            too where exact; the latter no longer takes the batch's mean in training then.
        example_kwargs: keyword inputs.
        standalone: leave no class of normconv, so that a pickle of the model loads where normconv is not
            installed. An affine map that folds nowhere becomes a depthwise 1x1 convolution or a BatchNorm
            with the same eval function; its input's rank comes from the inputs, or from the plan that put
            it there.
        share_tensors: what needs no folding is shared with the model instead of copied: less memory
            for a result that is only read.

    Raises:
        CaptureError: with inputs, when the model cannot be captured.
        UsageError: with `standalone`, where some module can have no plain class; names each.

    >>> import normconv as nc
    >>> from normconv.layers import weight_norm_
    >>> model, report = nc.fold(nn.Sequential(weight_norm_(nn.Linear(3, 2))))
    >>> type(model[0]).__name__, dict(report.facts)["folded"]
    ('Linear', {'normconv weight norm': 1})
    """
    # Folding a weight replaces it. Only an affine map is written into a layer that is there already.
    twin = copy_model(model, share_tensors=share_tensors and example_inputs is None)
    _drop_clones_(twin)
    rows, left = fold_weights_(twin)
    absorbed: list[dict[str, Any]] = []
    kinds: list[str] = []
    if example_inputs is not None:
        absorbed, kinds = _fold_affines_(twin, example_inputs, example_kwargs or {})
    settle_(twin)
    became: list[dict[str, Any]] = []
    notes = [f"{row.site or row.norm}: {row.reason}" for row in rows if row.reason]
    if standalone:
        became = plain_affines(twin, example_inputs, example_kwargs or {})
        notes += _became_notes(twin, became)
        twin = replace_affines_(twin, became)
    if history_of(model) and (rows or absorbed or became):
        entry = {"absorbed": absorbed, **({"became": became} if became else {})}
        record(twin, {"fold": entry})
    if standalone:
        check_standalone(twin)
    counts = Counter(row.action for row in rows)
    counts.update(kinds)
    report = Report(
        verb="fold",
        subject=type(model).__name__,
        sites=tuple(rows),
        facts={"folded": dict(counts), "left": len(left)},
        notes=(*notes, *(str(problem) for problem in left)),
    )
    return Result(twin, report)


def _became_notes(model: nn.Module, entries: list[dict[str, Any]]) -> list[str]:
    notes = []
    for entry in entries:
        name, became = entry["names"][0], entry["became"]
        was = type(model.get_submodule(name)).__name__
        in_training = " (in training it takes the batch's statistics)" if "Norm" in became else ""
        notes.append(f"{name}: the {was} became a {became}{in_training}")
    return notes


def _drop_clones_(model: nn.Module) -> None:
    """Put layers back into the places that they share with a copy of their output."""
    names = Names(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Cloned) and name:
            replace_module_(model, (name, *names.aliases(name)), module.get_submodule("layer"))


def _fold_affines_(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Fold what can be; return the entries that say how, and the kind of each."""
    if not any(isinstance(module, tuple(_AFFINES)) for module in model.modules()):
        return [], []
    sites = survey(model, args, kwargs, wanted=lambda m: isinstance(m, tuple(_AFFINES))).sites
    entries: list[dict[str, Any]] = [
        {
            "names": [site.name, *site.aliases],
            "producers": list(site.producers),
            "consumers": list(site.consumers),
            "spans": list(site.spans),
        }
        for site in sorted(sites, key=lambda site: not site.consumers)
        if site.producers or site.consumers
    ]
    layers = [model.get_submodule(entry["names"][0]) for entry in entries]
    kinds = [_AFFINES[kind] for layer in layers for kind in _AFFINES if isinstance(layer, kind)]
    for entry in entries:
        _absorb_(model, entry)
    return entries, kinds


def _absorb_(model: nn.Module, entry: Mapping[str, Any]) -> None:
    absorb_norm_(
        model,
        entry["names"],
        entry["producers"],
        consumers=entry.get("consumers", ()),
        spans=entry.get("spans", ()),
    )


def rebuild(model: nn.Module, history: list[dict[str, Any]]) -> nn.Module:
    """Give a fresh model the structure that a history of conversions leads to.

    Args:
        model: as the factory makes it; not changed. Its weights carry no meaning afterwards.
        history: entries of `normconv.plan.history_of`, oldest first.

    Raises:
        PlanError: the history is of another architecture.
    """
    for entry in history:
        if "apply" in entry:
            model = apply_plan(model, Plan.from_dict(entry["apply"])).model
            continue
        model = copy_model(model)
        if "clone" in entry:
            _put_clones_(model, entry["clone"]["layers"])
        elif "refactor" in entry:
            reparametrise_layers_(model, entry["refactor"])
        elif "freeze" in entry:
            put_constant_norms_(model, entry["freeze"]["sites"])
        elif "fold" in entry:
            _drop_clones_(model)
            fold_weights_(model)
            for absorbed in entry["fold"].get("absorbed", ()):
                _absorb_(model, absorbed)
            if became := entry["fold"].get("became"):
                model = replace_affines_(model, became)
        # What calibration and recovery changed besides are values.
        for site, groups in entry.get("calibrate", {}).get("groups", {}).items():
            norm: Any = model.get_submodule(normalizer_name(model, site))
            norm.num_groups = groups
        record(model, entry)
    return model


def _put_clones_(model: nn.Module, layers: Iterable[str]) -> None:
    names = Names(model)
    for name in layers:
        cloned = Cloned.of(model.get_submodule(name))
        replace_module_(model, (name, *names.aliases(name)), cloned)
