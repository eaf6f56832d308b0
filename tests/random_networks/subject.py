"""A network ready to convert, how far a right answer may be off, and comparisons that name a miss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normconv.api import to_graph
from normconv.graph import is_norm
from normconv.numerics import evaluating, noise_bound, relative_l2
from normconv.plan import Plan
from normconv.proof import cast_inputs, coarsest_dtype, evaluate, flat_outputs, prove
from normconv.surgery import make_plan
from tests.random_networks.program import Program

__all__ = [
    "Subject",
    "assert_close",
    "assert_equal",
    "assert_proved",
    "assert_same_in_own_dtype",
    "in_branches",
]

_FLOAT64 = 1e-11
_LOOKS = 8


@dataclass(frozen=True)
class Subject:
    """A network in its dtype and in float64."""

    program: Program
    model: nn.Module
    wide: nn.Module
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]

    @classmethod
    def of(cls, program: Program, model: nn.Module) -> Subject:
        """Take a model that a program made, or its graph."""
        return cls(program, model, copy.deepcopy(model).double(), program.args(), program.kwargs())

    @property
    def wide_inputs(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The inputs in float64."""
        return cast_inputs((self.args, self.kwargs), torch.float64)

    @property
    def is_graph(self) -> bool:
        """Whether it was traced for its functional norms."""
        return isinstance(self.model, torch.fx.GraphModule)

    def fresh(self) -> nn.Module:
        """Make the same architecture with other values."""
        net = self.program.fresh(seed=1)
        return to_graph(net, self.args, self.kwargs) if self.is_graph else net

    def plan(self, target: str, **more: Any) -> Plan:
        """Plan for a target."""
        inputs = {"example_inputs": self.args, "example_kwargs": self.kwargs}
        plan = make_plan(self.model, target, **inputs, **more)
        assert Plan.from_json(plan.to_json()) == plan, "the plan does not survive JSON"
        return plan

    def bounds(self, expected: Mapping[str, Tensor]) -> dict[str, float]:
        """In float64: 1e-11, or what the network makes of one rounding step if that is more."""
        args, kwargs = _moved(self.wide_inputs)
        again = evaluate(self.wide, args, kwargs)
        return {key: max(_FLOAT64, 4 * relative_l2(again[key], expected[key])) for key in expected}


def in_branches(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Run the branches of training mode, norms and dropout as in eval mode."""
    with evaluating(model):
        model.train()
        for module in model.modules():
            if is_norm(module) or isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        return flat_outputs(model(*args, **kwargs))


def _moved(inputs: Any, seed: int = 0) -> Any:
    """The inputs moved by one rounding step, up or down."""
    generator = torch.Generator().manual_seed(seed)

    def move(tensor: Tensor) -> Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        return tensor * (1 + signs * torch.finfo(tensor.dtype).eps).to(tensor.dtype)

    args, kwargs = inputs
    return tuple(move(v) for v in args), {name: move(v) for name, v in kwargs.items()}


def assert_close(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    bounds: Mapping[str, float],
    what: str,
) -> None:
    """Hold outputs against others; an output without a bound has the largest of all."""
    assert list(got) == list(expected), f"{what}: outputs {list(got)}, not {list(expected)}"
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, f"{what}: {key} is {got[key].dtype}"
        assert got[key].shape == value.shape, f"{what}: {key} is {tuple(got[key].shape)}"
        error, bound = relative_l2(got[key], value), bounds.get(key, max(bounds.values()))
        assert error <= bound, f"{what}: {key} is off by {error:.3g}, more than {bound:.3g}"


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Hold outputs against others, bit by bit."""
    assert list(got) == list(expected), f"{what} has other outputs"
    assert all(torch.equal(got[key], expected[key]) for key in expected), f"{what} differs"


def assert_proved(subject: Subject, result: nn.Module, plan: Plan) -> None:
    """The package's own proof passes."""
    proof = prove(subject.model, result, plan.converted, subject.args, subject.kwargs)
    failed = [f"{check.name}: {check.describe()}" for check in proof.checks if not check.passed]
    assert not failed, f"the proof fails: {failed}"


def assert_same_in_own_dtype(subject: Subject, result: nn.Module) -> None:
    """Off by no more than rounding explains: four times the original's own error.

    On few numbers that error can be small by luck: then the original is looked at again, with its
    inputs moved by one rounding step.
    """
    model, inputs = subject.model, (subject.args, subject.kwargs)
    exact = evaluate(model, *inputs, dtype=torch.float64)
    got, dtype = evaluate(result, *inputs), coarsest_dtype(model)
    owns = [evaluate(model, *inputs)]
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in owns[0].items()}
    errors = {key: relative_l2(got[key], value) for key, value in exact.items()}
    bounds: dict[str, float] = {}
    for look in range(_LOOKS):
        for key, value in exact.items():
            bounds[key] = noise_bound(dtype, max(relative_l2(own[key], value) for own in owns))
        if all(errors[key] <= bounds[key] for key in exact):
            return
        owns.append(evaluate(model, *_moved(inputs, look)))
    raise AssertionError(f"{dtype}: off by {errors}, more than {bounds}")
