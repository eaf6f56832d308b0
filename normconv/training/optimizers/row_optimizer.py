"""Optimizers of torch that step the weights of a plain model as (g, v) or (gain, v) would be stepped."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normconv.errors import Problem, UsageError
from normconv.numerics import RowLayout, dialect_named, scale_rows_, wide_dtype
from normconv.numerics.rows import beside, row_axes
from normconv.training.optimizers.forms import Form, Rows, first_rows_, form_named, row_mean
from normconv.training.optimizers.layouts import layouts_of, unfit
from normconv.training.optimizers.rules import Rule
from normconv.training.optimizers.shards import local, local_grad, placed_as_rows
from normconv.training.optimizers.stepping import (
    Weight,
    rows_leading,
    step_compiled_,
    step_each_,
    step_together_,
)

__all__ = ["FORMS", "WAYS", "RowOptimizer"]

FORMS = ("plain", "wn", "ws")
WAYS = ("auto", "compile", "foreach", "loop")
_EAGER = {"foreach": step_together_, "loop": step_each_}
# Elements from which on a step gains more than compiling it takes, within some thousand steps.
_WORTH_COMPILING = 2**20
_OF_GAIN = "_gain"


class RowOptimizer(Optimizer):
    """What the optimizers of rows share; the other base class is the optimizer of torch.

    The state of a weight holds, by the names of torch, what the rule remembers of v, with `_gain` what it
    remembers of the gain, and one number a row each: `gain`, `length`, and `mean` of weight
    standardization. Weights of less than 32 bits have a float32 `master`.

    Attributes:
        way: how weights are stepped; ``auto`` until the first step tells.
    """

    rule: ClassVar[Rule]
    form: ClassVar[str]

    def __init__(
        self,
        params: Any,
        model: nn.Module,
        *,
        fused: str = "auto",
        max_norm: float | None = None,
        gain_weight_decay: float | None = None,
        dialect: str = "timm",
        **options: Any,
    ) -> None:
        if fused not in WAYS:
            raise UsageError(Problem("fused", f"{fused!r} is none of {', '.join(WAYS)}"))
        self.way = fused
        self._explicit = fused != "auto"
        self._layouts = layouts_of(model)
        self._own_defaults = {
            "form": self.form,
            "dialect": dialect,
            "max_norm": max_norm,
            "gain_weight_decay": gain_weight_decay,
        }
        self._check_group({"params": [], **self._own_defaults})
        self._means: dict[Tensor, Tensor] = {}
        self._complete = False
        super().__init__(params, **options)
        self._complete = True
        self.defaults.update(self._own_defaults)
        # Weights are written once every group is known to be sound.
        for group in self.param_groups:
            self._center_(group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("way", "_explicit", "_layouts", "_own_defaults", "_means", "_complete")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, which may be ``form``, ``dialect`` and the like.

        With the form ``ws`` the mean of each row is taken off the weights here: a standardized weight has
        none.

        Raises:
            UsageError: an option or a weight that cannot be; nothing is changed.
        """
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        group = {**self._own_defaults, **param_group, "params": params}
        self._check_group({**self.defaults, **group})
        super().add_param_group(group)
        if self._complete:
            self._center_(group)

    @torch.no_grad()
    def _center_(self, group: dict[str, Any]) -> None:
        """Take the means off the rows of standardized weights, and keep them.

        Not in `state` yet: one that is empty says that no step was taken, to torch's checkpoints too.
        """
        for weight in self._weights_in(group) if group["form"] == "ws" else ():
            layout, value = self._layouts[weight][1], local(weight)
            block = layout.split(value) if layout.transposed else value
            mean = row_mean(block.to(wide_dtype(weight.dtype)), row_axes(block, layout))
            block.sub_(mean)
            self._means[weight] = placed_as_rows(mean.flatten(), weight, layout)

    def _check_group(self, group: dict[str, Any]) -> None:
        problems = []
        form, bound = group["form"], group["max_norm"]
        if form not in FORMS:
            problems.append(Problem("form", f"{form!r} is none of {', '.join(FORMS)}"))
        dialect_named(group["dialect"])
        if bound is not None and (isinstance(bound, bool) or not 0 < bound < math.inf):
            problems.append(Problem("max_norm", f"{bound!r} is no positive number"))
        if bound is not None and form == "ws":
            what = "the length of v counts in weight standardization, by way of eps"
            problems.append(Problem("max_norm", what, "leave it out"))
        for name in ("capturable", "differentiable"):
            if group.get(name):
                what = f"a step of rows cannot be {name}"
                problems.append(Problem(name, what, f"take {name}=False"))
        for weight in self._weights_in(group):
            name, layout = self._layouts[weight]
            if reason := unfit(weight, layout, form):
                problems.append(Problem(name, reason, 'put it in a group with "form": "plain"'))
        if problems:
            raise UsageError(problems)

    def _weights_in(self, group: dict[str, Any]) -> list[Tensor]:
        if group["form"] == "plain":
            return []
        named = (p[1] if isinstance(p, tuple) else p for p in group["params"])
        return [p for p in named if isinstance(p, Tensor) and p in self._layouts]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients anew; its value is returned.

        Raises:
            UsageError: the gradient of a weight with rows is sparse; nothing is stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [
            [p for p in self._weights_in(g) if p.grad is not None] for g in self.param_groups
        ]
        for weight in (weight for of_group in weights for weight in of_group):
            if weight.grad is not None and weight.grad.layout != torch.strided:
                what, way_out = "its gradient is sparse", 'put it in a group with "form": "plain"'
                raise UsageError(Problem(self._layouts[weight][0], what, way_out))
        with _without_gradients([weight for of_group in weights for weight in of_group]):
            _once_hooked(super().step)()
        for group, of_group in zip(self.param_groups, weights, strict=True):
            self._step_rows(group, of_group)
        return loss

    def _step_rows(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        form = form_named(group["form"], group["dialect"])
        by_count: dict[int, list[Weight]] = {}
        for weight in weights:
            state = self._ready(weight, form, group)
            count = int(state["step"]) + 1
            if local(weight).numel():  # a process may hold no row of a small weight
                by_count.setdefault(count, []).append(self._weight(weight, state, group))
        for count, of_count in by_count.items():
            self._step_weights(of_count, form, group, count)
        for weight in weights:
            state = self.state[weight]
            state["step"] += 1
            self._bound_(state, self._layouts[weight][1], group)
            if "master" in state:
                weight.copy_(state["master"])

    def _step_weights(
        self, weights: list[Weight], form: Form, group: dict[str, Any], count: int
    ) -> None:
        if self.way == "auto":
            elements = sum(p.numel() for g in self.param_groups for p in self._weights_in(g))
            self.way = _plain_way(weights) if elements < _WORTH_COMPILING else "compile"
        if self.way == "compile":
            reason = step_compiled_(weights, form, self.rule, group, count)
            if not reason:
                return
            self.way = _plain_way(weights)
            if self._explicit:
                told = f"the step is not compiled but goes by {self.way!r}: {reason}"
                warnings.warn(told, stacklevel=6)
        _EAGER[self.way](weights, form, self.rule, group, count)

    def _ready(self, weight: Tensor, form: Form, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a weight, with all that this step needs."""
        state: dict[str, Any] = self.state[weight]
        wide, layout = wide_dtype(weight.dtype), self._layouts[weight][1]
        fresh = "gain" not in state
        if fresh:
            if weight in self._means:
                state["mean"] = self._means.pop(weight)
            if wide != weight.dtype:
                state["master"] = weight.detach().to(wide, copy=True)
            value = local(state.get("master", weight)).detach()
            block = layout.split(value) if layout.transposed else value
            for name in ("gain", "length", "mean") if form.centered else ("gain", "length"):
                if name not in state:
                    numbers = value.new_zeros(layout.channels(value))
                    state[name] = placed_as_rows(numbers, weight, layout)
            found = {k: beside(v, block, layout) for k, v in _row_numbers(state).items()}
            rows = Rows(found["gain"], found["length"], found.get("mean"))
            first_rows_(block, rows, form, row_axes(block, layout))
        remembered = self.rule.buffers(group)
        if not remembered.keys() <= state.keys() or "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in remembered:
            if name not in state:
                value = state.get("master", weight)
                state[name] = torch.zeros_like(value, memory_format=torch.preserve_format)
                state[name + _OF_GAIN] = torch.zeros_like(state["gain"])
        if fresh:
            self._bound_(state, layout, group)
        return state

    def _weight(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Weight:
        layout = self._layouts[weight][1]
        value = local(state.get("master", weight)).detach()
        grad = local_grad(weight).to(value.dtype)
        names = self.rule.buffers(group)
        laid, buffers = _alike(value, [grad, *(local(state[name]) for name in names)], layout)
        return Weight(
            laid,
            buffers[0],
            layout,
            _row_numbers(state),
            dict(zip(names, buffers[1:], strict=True)),
            {name: local(state[name + _OF_GAIN]) for name in names},
        )

    def _bound_(self, state: dict[str, Any], layout: RowLayout, group: dict[str, Any]) -> None:
        """Shorten rows of v that are longer than the bound by powers of two; the weight stays."""
        bound = group["max_norm"]
        if bound is None:
            return
        kept = local(state["length"])
        length = kept.double()
        long = length > bound
        if not bool(long.any()):
            return
        halvings = torch.where(long, (length / bound).log2().ceil(), torch.zeros_like(length))
        factor = torch.exp2(-halvings)
        kept.copy_(length * factor)
        for name, power in self.rule.buffers(group).items():
            scale_rows_(local(state[name]), factor**power, layout)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` goes on from, before the first step too."""
        for weight, mean in self._means.items():
            self.state[weight] = {"step": torch.tensor(0.0), "mean": mean}
        self._means.clear()
        found: dict[str, Any] = super().state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a `state_dict` was taken, bit for bit.

        torch gives the state of a parameter the dtype of the parameter; that of a weight with rows keeps
        its own.
        """
        super().load_state_dict(state_dict)
        self._means.clear()
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        present = [p for group in self.param_groups for p in group["params"]]
        for index, weight in zip(saved, present, strict=True):
            state = state_dict["state"].get(index, {})
            if weight in self._layouts and ("gain" in state or "mean" in state):
                self.state[weight] = {
                    name: value.detach().to("cpu" if name == "step" else weight.device, copy=True)
                    for name, value in state.items()
                }


def _row_numbers(state: dict[str, Any]) -> dict[str, Tensor]:
    """What is kept one a row, of the rows of this process."""
    return {name: local(state[name]) for name in ("gain", "length", "mean") if name in state}


def _alike(value: Tensor, others: list[Tensor], layout: RowLayout) -> tuple[Tensor, list[Tensor]]:
    """Lay tensors of one shape out alike: as (O, n) if their memory is of one order."""
    same = [o if o.stride() == value.stride() else _restrided(value, o) for o in others]
    return rows_leading(value, layout), [rows_leading(o, layout) for o in same]


def _restrided(value: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.preserve_format).copy_(other)


def _plain_way(weights: list[Weight]) -> str:
    return "loop" if weights[0].weight.device.type == "cpu" else "foreach"


@contextlib.contextmanager
def _without_gradients(params: list[Tensor]) -> Iterator[None]:
    """Let the optimizer of torch see no gradient of some parameters: it leaves those alone."""
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def _once_hooked(step: Any) -> Callable[[], Any]:
    """The step of a base class without the hooks of the optimizer, which the step around it calls."""
    plain = inspect.unwrap(step.__func__, stop=lambda f: not getattr(f, "hooked", False))
    return functools.partial(plain, step.__self__)
