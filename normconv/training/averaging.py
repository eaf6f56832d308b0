"""The average of models in weights, not in gains and directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.folding import fold
from normconv.graph import Names
from normconv.layers import (
    LogWeightNormed,
    Reparametrised,
    WeightStandardized,
    copy_model,
    fold_layer_,
    log_gain_,
    share_parts_,
    weight_norm_,
    weight_standardize_,
)
from normconv.numerics import all_finite
from normconv.report import Report
from normconv.surgery import Result

__all__ = ["average"]


def average(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> Result:
    """Return the average of models of one structure, in the form of the first.

    The plain weights are averaged, in float64: the average of g and that of v are those of no weight,
    since directions of different length count differently. Each weight is then split again as it was
    in the first model. Biases, gains of norms and running statistics are averaged as they are; integer
    buffers are the first's.

    Args:
        models: of the same classes, names and shapes; not changed.
        weights: how much each counts, such as its number of samples; all the same for None.

    Raises:
        UsageError: there is no model, a weight is negative or none is positive, a model holds NaN or
            infinity, or the models differ; names the first key that does.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", algorithm 1.

    >>> from normconv.layers import weight_norm_
    >>> one, two = (weight_norm_(nn.Linear(2, 1, bias=False)) for _ in range(2))
    >>> mean = average([one, two]).model
    >>> torch.allclose(mean.weight, (one.weight + two.weight) / 2)
    True
    """
    models = list(models)
    shares = _shares(models, weights)
    plain = []
    for number, (model, share) in enumerate(zip(models, shares, strict=True)):
        _check_structure(models[0], model, f"models[{number}]")
        folded, report = fold(model, share_tensors=True)
        _check_kinds(report, f"models[{number}]")
        plain.append(folded.state_dict())
        if share:  # a client without samples may hold anything
            _check_finite(plain[-1], f"models[{number}]")
    twin = copy_model(models[0])
    forms = _forms(twin)
    _unfold_(twin, list(forms))
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                tensor.copy_(_mean([values[name] for values in plain], shares))
    _split_(twin, forms)
    facts = {"models": len(models), "weights": shares, "layers split again": len(forms)}
    return Result(twin, Report("average", type(models[0]).__name__, facts=facts))


def _shares(models: Sequence[nn.Module], weights: Sequence[float] | None) -> list[float]:
    if not models:
        raise UsageError(Problem("models", "there is none"))
    if weights is None:
        return [1 / len(models)] * len(models)
    given = [float(weight) for weight in weights]
    if len(given) != len(models):
        what = f"{len(given)} for {len(models)} models"
        raise UsageError(Problem("weights", what, "give one for each"))
    total = sum(given)
    if not all(weight >= 0 for weight in given) or not 0 < total < float("inf"):
        raise UsageError(Problem("weights", f"{given} are no shares", "0 or more, not all 0"))
    return [weight / total for weight in given]


def _check_structure(first: nn.Module, model: nn.Module, where: str) -> None:
    ours, theirs = _structure(first), _structure(model)
    if key := next((k for k in ours | theirs if ours.get(k) != theirs.get(k)), None):
        has = [str(of.get(key, "nothing")) for of in (theirs, ours)]
        what = f"{key}: it has {has[0]}, models[0] {has[1]}"
        raise UsageError(Problem(where, what, "average models of one structure"))


def _check_finite(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor) and not value.is_meta and not all_finite(value):
            what = f"{name} holds NaN or infinity"
            raise UsageError(Problem(where, what, "leave this model out"))


def _check_kinds(report: Report, where: str) -> None:
    """Refuse computed weights that are not split again here."""
    kinds = [*report.facts["folded"], *(["a parametrization"] if report.facts["left"] else [])]
    if other := [kind for kind in kinds if not str(kind).startswith("normconv ")]:
        what = f"its weights are computed by {other[0]}"
        raise UsageError(Problem(where, what, "average nc.fold(model).model of each"))


def _structure(model: nn.Module) -> dict[str, str]:
    modules = dict(model.named_modules())
    found = {name or "the model": type(module).__name__ for name, module in modules.items()}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        dtype = f", {tensor.dtype}" if isinstance(tensor, Tensor) else ""
        found[name] = f"shape {shape}{dtype}"
    names = Names(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners = names.owners(parameter)
        if len(owners) > 1:
            found[name] += f", tied in {', '.join(sorted(owners))}"
    for name, module in modules.items():
        if not any(True for _ in module.children()):
            found[f"settings of {name}"] = module.extra_repr()
    return found


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if all(torch.equal(value, values[0]) for value in values[1:]):
        return values[0]
    wide = torch.complex128 if values[0].is_complex() else torch.float64
    total = torch.zeros_like(values[0], dtype=wide)
    for value, share in zip(values, shares, strict=True):
        if share:
            total += share * value.to(total)
    return total


def _forms(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each reparametrised layer: the one whose parts it shares, and its kind with its options."""
    names = Names(model)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Reparametrised):
            owners = names.owners(layer.gain_and_v(layer.weights[0])[1])
            leader = "" if owners[0] == name else owners[0]
            own = {attribute: getattr(layer, attribute) for attribute in layer.own_attributes}
            found[name] = (leader, {"kind": layer.kind, **own})
    return found


def _unfold_(model: nn.Module, names: Sequence[str]) -> None:
    kept = list(model.parameters())  # alive until the end, so that identities stay unique
    done: dict[tuple[int, ...], nn.Parameter] = {}
    for name in names:
        fold_layer_(model.get_submodule(name), done)
    del kept


def _split_(model: nn.Module, forms: dict[str, tuple[str, dict[str, Any]]]) -> None:
    for name, (leader, form) in forms.items():
        layer = model.get_submodule(name)
        if leader:
            share_parts_(layer, model.get_submodule(leader))
        elif form["kind"] == WeightStandardized.kind:
            weight_standardize_(layer, dialect=form["dialect"])
        else:
            weight_norm_(layer)
            if form["kind"] == LogWeightNormed.kind:
                log_gain_(layer, form["gain_rate"])
