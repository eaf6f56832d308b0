"""Fold: every weight that is computed from others becomes the plain weight it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normconv.errors import Problem
from normconv.folding.torch_weight_norm import (
    fold_hooked_,
    fold_parametrized_,
    hooked_names,
    parametrized_names,
)
from normconv.graph import Names, survey
from normconv.graph.passes import settle_
from normconv.graph.rewrite import absorb_norm_, normalizer_name, replace_module_
from normconv.layers import (
    ChannelAffine,
    Cloned,
    MeanOnlyBatchNorm,
    Reparametrised,
    copy_model,
    fold_layer_,
)
from normconv.plan import Plan, history_of, record
from normconv.report import Report, SiteRow
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
    share_tensors: bool = False,
) -> Result:
    """Return a copy of the model with plain weights in place of every computed one.

    Folds normconv's own layers, weight-normed and weight-standardized, and both of torch's weight norms
    (`torch.nn.utils.weight_norm` and `torch.nn.utils.parametrizations.weight_norm`). Each weight is the
    float64 value of its formula rounded once; a row with ‖v‖ = 0, where torch's weight norm computes
    NaN, becomes 0 and is listed. Folding a plain model changes nothing.

    Args:
        model: not changed.
        example_inputs: with inputs, a `ChannelAffine` or `MeanOnlyBatchNorm` is folded into its neighbour
            too where exact; the latter no longer takes the batch's mean in training then.
        example_kwargs: keyword inputs.
        share_tensors: what needs no folding is shared with the model instead of copied: less memory
            for a result that is only read.

    Raises:
        CaptureError: with inputs, when the model cannot be captured.

    >>> import normconv as nc
    >>> from normconv.layers import weight_norm_
    >>> model, report = nc.fold(nn.Sequential(weight_norm_(nn.Linear(3, 2))))
    >>> type(model[0]).__name__, dict(report.facts)["folded"]
    ('Linear', {'normconv weight norm': 1})
    """
    # Folding a weight replaces it. Only an affine map is written into a layer that is there already.
    twin = copy_model(model, share_tensors=share_tensors and example_inputs is None)
    _drop_clones_(twin)
    rows = list(_fold_weights_(twin))
    absorbed: list[dict[str, Any]] = []
    kinds: list[str] = []
    if example_inputs is not None:
        absorbed, kinds = _fold_affines_(twin, example_inputs, example_kwargs or {})
    settle_(twin)
    if history_of(model) and (rows or absorbed):
        record(twin, {"fold": {"absorbed": absorbed}})
    counts = Counter(row.action for row in rows)
    counts.update(kinds)
    left = _left_over(twin)
    report = Report(
        verb="fold",
        subject=type(model).__name__,
        sites=tuple(rows),
        facts={"folded": dict(counts), "left": len(left)},
        notes=(
            *(f"{row.site}: {row.reason}" for row in rows if row.reason),
            *(str(problem) for problem in left),
        ),
    )
    return Result(twin, report)


def _drop_clones_(model: nn.Module) -> None:
    """Put layers back into the places that they share with a copy of their output."""
    names = Names(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Cloned) and name:
            replace_module_(model, (name, *names.aliases(name)), module.get_submodule("layer"))


def _fold_weights_(model: nn.Module) -> Iterator[SiteRow]:
    kept = list(model.parameters())  # alive until the end, so that identities stay unique
    done: dict[tuple[int, ...], nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Reparametrised) and isinstance(module, nn.Module):
            kind = f"normconv {module.what}"
            yield _row(name, module, kind, fold_layer_(module, done))
        for tensor in hooked_names(module):
            yield _row(name, module, "torch weight_norm (hook)", fold_hooked_(module, tensor))
        for tensor in parametrized_names(module):
            repaired = fold_parametrized_(module, tensor)
            yield _row(name, module, "torch weight_norm (parametrization)", repaired)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    del kept


def _row(name: str, module: nn.Module, kind: str, repaired: Tensor) -> SiteRow:
    zero = 0 if repaired.is_meta else int(repaired.sum())
    reason = f"{zero} rows without direction became 0" if zero else ""
    return SiteRow(name, type(module).__name__, "", kind, "exact", reason)


def _fold_affines_(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Fold what can be; return the entries that say how, and the kind of each."""
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


def _left_over(model: nn.Module) -> list[Problem]:
    return [
        Problem(
            name, f"its parametrization of {', '.join(module.parametrizations)} is left as it is"
        )
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
    ]


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
        elif "fold" in entry:
            _drop_clones_(model)
            for _ in _fold_weights_(model):
                pass
            for absorbed in entry["fold"].get("absorbed", ()):
                _absorb_(model, absorbed)
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
