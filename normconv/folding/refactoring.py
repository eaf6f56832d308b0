"""The way back from plain weights to g and v, or to gain and v."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from normconv.errors import Problem, UsageError
from normconv.folding.torch_weight_norm import hooked_names, parametrized_names
from normconv.layers import (
    Reparametrised,
    WeightStandardized,
    copy_model,
    obstacle_to,
    row_layouts,
    share_parts_,
    weight_norm_,
    weight_standardize_,
)
from normconv.numerics import mean_shares
from normconv.plan import Recipe, history_of, record
from normconv.report import Report, SiteRow
from normconv.surgery import Result
from normconv.surgery.layer_steps import layer_names, layer_steps

__all__ = ["refactor_layers", "reparametrise_layers_", "reparametrised_before"]

_LISTED = 5


def refactor_layers(
    model: nn.Module,
    to: Literal["wn", "ws"],
    *,
    layers: str | Iterable[str] | None = None,
    like: nn.Module | None = None,
) -> Result:
    """Return a copy of the model with plain weights split into g and v, or into gain and v.

    ``wn``: v = w and g = ‖w‖, whatever the sign or scale that g had before. ``ws``: v = w and
    gain = d(w) / s; a filter whose mean is more than rounding has no such form.

    Args:
        model: not changed.
        to: ``wn`` or ``ws``.
        layers: ``all``, or globs of layers' names; None for those that `like` or the model's own history
            says were reparametrised.
        like: a model of the same names whose reparametrised layers are meant, under torch's weight norm
            too.

    Raises:
        UsageError: nothing says which layers, a glob matches none, or a layer cannot be taken; lists all.

    >>> import normconv as nc
    >>> model, _ = refactor_layers(nn.Sequential(nn.Linear(3, 2)), "wn", layers="all")
    >>> type(model[0]).__name__, type(nc.fold(model).model[0]).__name__
    ('WNLinear', 'Linear')
    """
    dialects = _dialects(model, layers, like)
    recipe = Recipe.of("wn", include=_globs(model, layers, dialects))
    candidates = layer_names(model)
    recipe.check_used([(name, "") for name in candidates])
    chosen = layer_steps(model, recipe, ())
    found = {s.site: (s.producers or ("",))[0] for s in chosen.steps if s.action == "wrap"}
    problems = list(chosen.problems)
    if to == "ws":
        taken = {name: leader for name, leader in found.items() if not leader}
        problems += [p for name in taken if (p := _unfit_for_ws(name, model)) is not None]
    if problems:
        raise UsageError(problems)
    twin = copy_model(model)
    entry = {
        "to": to,
        "layers": [
            {"name": name, "shares": leader, "dialect": dialects.get(name, "timm")}
            for name, leader in found.items()
        ],
    }
    reparametrise_layers_(twin, entry)
    record(twin, {"refactor": entry})
    rows = tuple(
        SiteRow(step.site, step.norm, step.producers[0] if step.producers else "", to, "exact", "")
        for step in chosen.steps
        if step.action == "wrap"
    )
    stay = tuple(
        f"{step.site}: {step.reason}"
        for step in chosen.steps
        if step.action == "keep" and step.reason != "no rule matches it"
    )
    return Result(
        twin,
        Report(
            verb="refactor",
            subject=type(model).__name__,
            target=to,
            sites=rows,
            facts={"layers": len(rows)},
            notes=(*stay[:_LISTED], *chosen.notes),
        ),
    )


def reparametrise_layers_(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Split the weights of layers, in place, as an entry of a history says.

    Args:
        model: with plain weights in those layers.
        entry: ``to``, and for each layer its ``name``, the layer that it ``shares`` its weight with and
            its ``dialect``.
    """
    for layer in entry["layers"]:
        module = model.get_submodule(layer["name"])
        if layer["shares"]:
            share_parts_(module, model.get_submodule(layer["shares"]))
        elif entry["to"] == "ws":
            weight_standardize_(module, dialect=layer["dialect"])
        else:
            weight_norm_(module)


def reparametrised_before(model: nn.Module) -> dict[str, str]:
    """Return the layers that a model's history says were reparametrised, each with its dialect.

    The dialect is that of weight standardization, ``timm`` where a layer had weight norm.

    >>> reparametrised_before(nn.Linear(2, 2))
    {}
    """
    found: dict[str, str] = {}
    for entry in history_of(model):
        for step in entry.get("apply", {}).get("steps", ()):
            if step["action"] == "keep":
                continue
            dialect = step.get("options", {}).get("dialect", "timm")
            layers = [*step.get("producers", ()), *step.get("consumers", ())]
            if step["action"] == "standardize":
                found |= dict.fromkeys(layers, dialect)
            elif step["action"] == "wrap":
                found[step["site"]] = dialect
            elif step["target"].startswith("wn"):
                found |= dict.fromkeys(layers, dialect)
        for layer in entry.get("refactor", {}).get("layers", ()):
            found[layer["name"]] = layer["dialect"]
    return found


def _dialects(
    model: nn.Module, layers: str | Iterable[str] | None, like: nn.Module | None
) -> dict[str, str]:
    """The layers that are known to have been reparametrised, each with its dialect."""
    if like is None:
        return reparametrised_before(model)
    if layers is not None:
        raise UsageError(Problem("layers", "like= says which already", "pass one of the two"))
    return {
        name: module.dialect if isinstance(module, WeightStandardized) else "timm"
        for name, module in like.named_modules()
        if isinstance(module, Reparametrised) or hooked_names(module) or parametrized_names(module)
    }


def _globs(
    model: nn.Module, layers: str | Iterable[str] | None, known: Mapping[str, str]
) -> tuple[str, ...]:
    if layers is not None:
        globs = (layers,) if isinstance(layers, str) else tuple(layers)
        return () if globs == ("all",) else globs
    if not known:
        what = "neither its history nor like= says which of its layers were reparametrised"
        way_out = "pass layers='all' or globs of names (--layers)"
        raise UsageError(Problem(type(model).__name__, what, way_out))
    return tuple(glob.escape(name) for name in known)


def _unfit_for_ws(name: str, model: nn.Module) -> Problem | None:
    layer = model.get_submodule(name)
    if found := obstacle_to("ws", layer):
        return Problem(name, *found)
    for weight_name, layout in row_layouts(layer).items():
        weight = layer._parameters[weight_name]
        assert weight is not None
        size = weight.numel() // layout.channels(weight)
        noise = size**0.5 * torch.finfo(weight.dtype).eps
        if not weight.is_meta and bool((mean_shares(weight, layout) > noise).any()):
            what = f"its {weight_name} has a mean in its rows, which standardization takes away"
            way_out = "leave it plain, or nc.wrap(layer, to='ws') for another function"
            return Problem(name, what, way_out)
    return None
