"""`refactor`: plain weights back into g and v, or a whole model back into its original class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from normconv.errors import CheckFailed, Problem, UsageError
from normconv.folding import applied_plans, refactor_layers, refactor_norms
from normconv.plan import Plan
from normconv.proof import prove
from normconv.sources import example_inputs as inputs_for
from normconv.sources import open_source
from normconv.surgery import Result, checked_inputs, lazy_modules, make_plan, materialised

__all__ = ["refactor"]


def refactor(
    model: nn.Module,
    *,
    to: Literal["wn", "ws", "bn"] = "wn",
    like: nn.Module | Callable[[], nn.Module] | str | None = None,
    layers: str | Iterable[str] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Result:
    """Return a copy of the model in a form that trains, or that its original's own code takes.

    ``wn`` and ``ws`` split plain weights into g and v, or gain and v: the way back from `fold`. The
    weights stay to 1 ulp (``ws``: of the largest in the filter), rows of zeros exactly.

    ``bn`` leads back into the original, unmodified class, from ``wn``, ``wn+mobn``, ``plain`` and
    ``frozen``: its state dict loads strictly there. Each norm is in its slot again with σ² = 1 − eps,
    μ = 0, γ = 1 and β the bias that the layer before it has now; that layer has the folded weight, and
    no bias, or where the original has one a bias of 0. Where an affine map stood, γ and β are its own;
    a mean-only norm gives its running mean to μ; a norm without γ and β has them in σ² and μ.

    Args:
        model: not changed.
        to: ``wn``, ``ws`` or ``bn``.
        like: ``bn``: the original, what makes one, or a file or spec of one; needed where the model has
            no history. ``wn``, ``ws``: a model whose reparametrised layers are meant, under torch's
            weight norm too.
        layers: ``wn``, ``ws``: ``all``, or globs of names; None takes those that the history or `like`
            says were reparametrised.
        example_inputs: positional inputs, on which result and model are compared; without them nothing
            is compared. ``bn`` without a history: what feeds what in `like` is found with them.
        example_kwargs: keyword inputs.

    Raises:
        UsageError: nothing says which layers or which norms; an option that the form has not.
        PlanError: a norm cannot be put back; names each, with the reason.
        CheckFailed: the outputs differ; carries the report and the rejected model.

    >>> import torch, normconv as nc
    >>> net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)
    >>> plain = nc.fold(nc.convert(net, "wn", example_inputs=(x,)).model).model
    >>> type(refactor(plain).model[0]).__name__
    'WNConv2d'
    >>> back, report = refactor(plain, to="bn", example_inputs=(x,))
    >>> report.passed, net.load_state_dict(back.state_dict())
    (True, <All keys matched successfully>)
    """
    if to not in ("wn", "ws", "bn"):
        raise UsageError(Problem("to", f"it is 'wn', 'ws' or 'bn', not {to!r}"))
    given = example_inputs is not None or example_kwargs is not None
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    other = _model_of(like)
    if to == "bn":
        if layers is not None:
            what = "to='bn' puts back every norm that was converted"
            raise UsageError(Problem("layers", what, "leave it out"))
        plan = None
        if other is not None and (lazy_modules(other) or not applied_plans(model)):
            found = (args, kwargs) if given else _own_inputs(other)
            other = materialised(other, *found)
            plan = None if applied_plans(model) else _plan_of(other, *found)
        result = refactor_norms(model, like=other, plan=plan)
    else:
        result = refactor_layers(model, to, layers=layers, like=other)
    if not given:
        note = "nothing was compared: pass example_inputs to prove it"
        return result._replace(report=result.report.extended(notes=(note,)))
    proof = prove(model, result.model, (), args, kwargs)
    report = result.report.extended(checks=proof.checks, facts=proof.facts, notes=proof.notes)
    if not report.passed:
        raise CheckFailed(report, result.model)
    return Result(result.model, report)


def _model_of(like: nn.Module | Callable[[], nn.Module] | str | None) -> nn.Module | None:
    if like is None or isinstance(like, nn.Module):
        return like
    if isinstance(like, str):
        return open_source(like, random_weights=True).model
    made = like()
    if not isinstance(made, nn.Module):
        raise UsageError(Problem("like", f"it makes a {type(made).__name__}, no nn.Module"))
    return made


def _own_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found = inputs_for(model)
    return found.args, dict(found.kwargs)


def _plan_of(original: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
    """What a conversion of the original would fold into what."""
    return make_plan(original, "plain", example_inputs=args, example_kwargs=kwargs, strict=False)
