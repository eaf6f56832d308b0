"""An optimizer goes on with the model that a conversion made of the one it was built for."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normconv.errors import Problem, UsageError
from normconv.graph import is_norm
from normconv.layers import Reparametrised
from normconv.plan import history_of
from normconv.report import Report
from normconv.surgery import Result
from normconv.training.momentum import Momentum

__all__ = ["Rebound", "rebind", "rebind_"]


class Rebound(NamedTuple):
    """What `rebind` returns.

    Args:
        optimizer: over the new model's parameters.
        report: which parameters kept their state, and which start anew.
    """

    optimizer: Optimizer
    report: Report


def rebind(
    optimizer: Optimizer,
    result: Result | nn.Module,
    original: nn.Module | None = None,
    *,
    state: Literal["fresh", "map"] = "fresh",
) -> Rebound:
    """Return a copy of an optimizer over the parameters of a converted model.

    See `rebind_`; the optimizer itself stays that of the original. A schedule goes on with the one that
    it was made for: give such an optimizer to `rebind_`.

    >>> import normconv as nc
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> result = nc.convert(net.eval(), "wn", example_inputs=(torch.randn(4, 3),))
    >>> new, report = rebind(sgd, result, net)
    >>> report.facts["fresh"], report.facts["gone"]
    (['0.weight_g', '0.weight_v', '0.bias'], ['0.weight', '1.weight', '1.bias'])
    """
    twin = type(optimizer).__new__(type(optimizer))
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    kept = {
        parameter: {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for parameter, values in optimizer.state.items()
    }
    held = {**optimizer.__getstate__(), "param_groups": groups}
    twin.__setstate__({**held, "state": defaultdict(dict, kept)})
    report = rebind_(twin, result, original, state=state)
    return Rebound(twin, report)


def rebind_(
    optimizer: Optimizer,
    result: Result | nn.Module,
    original: nn.Module | None = None,
    *,
    state: Literal["fresh", "map"] = "fresh",
) -> Report:
    """Give an optimizer, in place, the parameters of the model that a conversion made.

    A parameter of the same name and shape in a layer that the conversion left as it was keeps its state
    bit for bit, and its place in its group. Any other starts with no state, in the group of the parameter
    that it comes from: that of the same layer, or the norm's in whose slot it is. Groups stay as they
    are in number and options, so that schedules go on.

    With ``state="map"`` SGD's momentum m of a weight W goes to its successors. Where the new weight is
    s · W row by row, that of W' = s · W is m / s, and g and v get the pullback of that. A bias that took
    a norm's β goes on with β's momentum, and so does a `ChannelAffine`: with scale = γ/σ and
    shift = β − scale · μ its scale gets σ · m(γ) + μ · m(β). Adam and its relatives start anew for those,
    both moments: the second moment of g is no function of that of W, and the first is scaled by it.

    Args:
        optimizer: built for `original`; changed.
        result: the converted model, or the `Result` that holds it.
        original: the model that the optimizer was built for, as it was when it was converted; None where
            the conversion was in place: parameters are then known by identity.
        state: ``fresh`` or ``map``.

    Returns:
        A report whose facts list the parameters that were ``kept``, are ``fresh`` or ``mapped``, the
        names that are ``gone``, and the parameters ``left out``: trained, and from what the optimizer
        did not train.

    Raises:
        UsageError: the optimizer has parameters that the original has not; it is as it was.
    """
    if state not in ("fresh", "map"):
        raise UsageError(Problem("state", f"it is 'fresh' or 'map', not {state!r}"))
    model = result.model if isinstance(result, Result) else result
    if original is None:
        return _Rebinding(optimizer, model, None, state).carry_out()
    names = {id(p) for p in original.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if strangers := sum(id(p) not in names for p in held):
        what = (
            f"{strangers} of its {len(held)} parameters are none of the {type(original).__name__}"
        )
        raise UsageError(Problem(type(optimizer).__name__, what, "pass the model it was built for"))
    return _Rebinding(optimizer, model, original, state).carry_out()


class _Rebinding:
    def __init__(
        self, optimizer: Optimizer, model: nn.Module, original: nn.Module | None, state: str
    ) -> None:
        self._optimizer = optimizer
        self._model = model
        self._original = original
        self._map = state == "map"
        self._new = dict(model.named_parameters())
        self._group_of = {
            id(parameter): number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._rewritten = _rewritten(model, original)
        self._notes: list[str] = []

    def carry_out(self) -> Report:
        old = self._held = self._old_parameters()
        groups: list[list[nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
        states: dict[Tensor, dict[str, Any]] = {}
        momentum = self._momentum()
        facts: dict[str, list[str]] = {
            name: [] for name in ("kept", "fresh", "mapped", "gone", "left out")
        }
        for name, parameter in self._new.items():
            before = old.get(name)
            if before is not None and self._same(name, before, parameter):
                number = self._group_of.get(id(before))
                if number is None:
                    continue  # the optimizer never trained it
                facts["kept"].append(name)
                if before in self._optimizer.state:
                    states[parameter] = self._optimizer.state[before]
            else:
                number = self._group_for(name, old) if parameter.requires_grad else None
                if number is None:
                    if parameter.requires_grad:
                        facts["left out"].append(name)
                    continue
                carried = momentum.of(name, parameter) if momentum is not None else None
                if carried is not None:
                    states[parameter] = {"momentum_buffer": carried}
                facts["fresh" if carried is None else "mapped"].append(name)
            groups[number].append(parameter)
        left = dict(self._model.named_parameters(remove_duplicate=False))
        facts["gone"] = [n for n, p in old.items() if n not in left and id(p) in self._group_of]
        self._note_restarts(facts["fresh"])
        for group, parameters in zip(self._optimizer.param_groups, groups, strict=True):
            group["params"] = parameters
            if "param_names" in group:
                names = {id(p): name for name, p in self._new.items()}
                group["param_names"] = [names[id(p)] for p in parameters]
        self._optimizer.state = defaultdict(dict, states)
        return Report(
            "rebind", type(self._optimizer).__name__, facts=facts, notes=tuple(self._notes)
        )

    def _momentum(self) -> Momentum | None:
        if not self._map or self._original is None:
            return None
        # A norm before a layer scales columns and shifts into the bias: W alone has no chain rule there.
        after = _rewritten(self._model, self._original, sides=("consumers",))
        took = {layer: site for layer, site in self._rewritten.items() if layer not in after}
        return Momentum(self._optimizer, self._original, self._model, took, frozenset(after))

    def _old_parameters(self) -> dict[str, nn.Parameter]:
        if self._original is not None:
            return dict(self._original.named_parameters(remove_duplicate=False))
        # In place: v is the very parameter that the weight was.
        names = {id(p): name for name, p in self._new.items()}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        found: dict[str, nn.Parameter] = {}
        for number, parameter in enumerate(held):
            name = names.get(id(parameter), f"parameter {number}, no more in the model")
            owner, _, last = name.rpartition(".")
            layer: Any = self._model.get_submodule(owner) if id(parameter) in names else None
            if isinstance(layer, Reparametrised):
                weights = {layer.parts(weight)[1]: weight for weight in layer.weights}
                last = weights.get(last, last)
                name = f"{owner}.{last}".lstrip(".")
            found[name] = parameter
        return found

    def _same(self, name: str, before: nn.Parameter, parameter: nn.Parameter) -> bool:
        owner = name.rpartition(".")[0]
        if before is parameter:
            return owner not in self._rewritten
        if before.shape != parameter.shape or owner in self._rewritten or self._original is None:
            return False
        was, now = (root.get_submodule(owner) for root in (self._original, self._model))
        if is_norm(was) and type(was) is not type(now):
            return False
        # A layer whose own forward computed its weight has the same name before and after `fold`.
        return torch.equal(before, parameter.to(before))

    def _group_for(self, name: str, old: dict[str, nn.Parameter]) -> int | None:
        """The group of what a new parameter comes from: itself, its layer, or the slot it stands in."""
        owner, _, last = name.rpartition(".")
        layer = self._model.get_submodule(owner)
        if isinstance(layer, Reparametrised):
            parts = {part: weight for weight in layer.weights for part in layer.parts(weight)}
            last = parts.get(last, last)
        last = {"scale": "weight", "shift": "bias"}.get(last, last)
        while True:
            exact = old.get(f"{owner}.{last}".lstrip("."))
            if exact is not None:
                return self._group_of.get(id(exact))
            prefix = f"{owner}." if owner else ""
            near = [
                p for n, p in old.items() if n.startswith(prefix) and "." not in n[len(prefix) :]
            ]
            numbers = [self._group_of[id(p)] for p in near if id(p) in self._group_of]
            if numbers:
                return self._beside(name, old, numbers)
            if near or not owner:
                return self._beside_slot(name)
            owner = owner.rpartition(".")[0]

    def _beside_slot(self, name: str) -> int | None:
        """The group of the layer that held a norm which is in its slot again."""
        site = name.rpartition(".")[0]
        layers = [layer for layer, norm in self._rewritten.items() if norm == site]
        return next(
            (
                self._group_of[id(p)]
                for n, p in self._held.items()
                if n.rpartition(".")[0] in layers and id(p) in self._group_of
            ),
            None,
        )

    def _beside(self, name: str, old: dict[str, nn.Parameter], numbers: list[int]) -> int:
        """A bias that a layer gets from a norm goes where the norm's bias was."""
        owner, _, last = name.rpartition(".")
        if last == "bias":
            beta = old.get(f"{self._rewritten.get(owner, '')}.bias".lstrip("."))
            if beta is not None and id(beta) in self._group_of:
                return self._group_of[id(beta)]
        return numbers[0]

    def _note_restarts(self, fresh: list[str]) -> None:
        if not self._map:
            return
        states = self._optimizer.state.values()
        if any("exp_avg_sq" in values for values in states) and fresh:
            self._notes.append(
                f"the second moments of {len(fresh)} parameters restart, and with them the first: expect "
                "some steps of another size, or warm the learning rate up"
            )
        elif self._original is None and fresh:
            self._notes.append("momentum is carried only where original= is given")
        elif any("momentum_buffer" in values for values in states) and fresh:
            self._notes.append(
                f"the momentum of {len(fresh)} parameters restarts: it is carried from a weight to the "
                "(g, v) made of it and from β to the bias that took it, not back, and not through a norm "
                "that went into the layer after it"
            )


def _rewritten(
    model: nn.Module,
    original: nn.Module | None,
    sides: tuple[str, ...] = ("producers", "consumers"),
) -> dict[str, str]:
    """The layers that took a norm since the original, each with the norm's name."""
    before = [] if original is None else history_of(original)
    since = history_of(model)[len(before) :]
    back = len(history_of(model)) < len(
        before
    )  # in its original class again: all that was done is undone
    found: dict[str, str] = {}
    for entry in before if back else since:
        for step in entry.get("apply", {}).get("steps", ()):
            if step["action"] in ("fold", "forward", "standardize"):
                layers = [layer for side in sides for layer in step.get(side, ())]
                found |= dict.fromkeys(layers, step["site"])
        for absorbed in entry.get("fold", {}).get("absorbed", ()):
            layers = [layer for side in sides for layer in absorbed.get(side, ())]
            found |= dict.fromkeys(layers, absorbed["names"][0])
    return found
