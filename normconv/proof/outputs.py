"""Running a model so that two runs can be compared: named outputs, fixed seed, restored flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.errors import NormconvError, Problem, Refused
from normconv.layers import copy_model
from normconv.numerics import evaluating
from normconv.proof.random_draws import DrawnAsBefore
from normconv.proof.widening import computing_in

__all__ = ["cast_inputs", "evaluate", "flat_outputs", "map_floats", "run_in"]

Value = TypeVar("Value")


def flat_outputs(value: Any) -> dict[str, Tensor]:
    """Return every tensor of a nested output by a stable name.

    A single tensor is ``output``; others are ``output.0``, ``output.logits`` and so on, in order.

    >>> list(flat_outputs({"a": torch.zeros(1), "b": [torch.zeros(1)]}))
    ['output.a', 'output.b.0']
    """
    return dict(_walk("output", value))


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(f"{name}.{key}", item)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield from _walk(f"{name}.{key}", getattr(value, key))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, item in enumerate(value):
            yield from _walk(f"{name}.{index}", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from _walk(f"{name}.{entry.name}", getattr(value, entry.name))


def cast_inputs(value: Value, dtype: torch.dtype) -> Value:
    """Return nested inputs with every floating tensor in `dtype`; the rest as it is."""
    return map_floats(lambda tensor: tensor.to(dtype), value)


def map_floats(function: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Return nested inputs with the function applied to every floating tensor."""

    def apply(leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return function(leaf) if is_float else leaf

    mapped: Value = pytree.tree_map(apply, value)
    return mapped


def evaluate(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run the model in eval mode and return its outputs by name.

    Args:
        model: left as it was, flags included.
        args: positional inputs.
        kwargs: keyword inputs.
        dtype: compute in this dtype, inputs cast; None runs the model as it is.

    >>> evaluate(nn.Linear(2, 1), (torch.zeros(3, 2),), dtype=torch.float64)["output"].dtype
    torch.float64
    """
    if dtype is None:
        with evaluating(model):
            return flat_outputs(model(*args, **(kwargs or {})))
    inputs = cast_inputs((args, dict(kwargs or {})), dtype)

    def run(model: nn.Module) -> dict[str, Tensor]:
        with evaluating(model):
            return flat_outputs(model(*inputs[0], **inputs[1]))

    return run_in(model, dtype, run)


def run_in(model: nn.Module, dtype: torch.dtype, run: Callable[[nn.Module], Value]) -> Value:
    """Call `run` with a model that computes in `dtype`: this one if it can, else a copy of it.

    Args:
        model: left as it was.
        dtype: a floating dtype.
        run: called once, or twice when a module reads another's tensors.

    Raises:
        Refused: the model cannot compute in `dtype`, nor can a copy of it that is cast.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # for the tensors that a forward makes
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    draws = DrawnAsBefore(dtype, own=next(floats, default), default=default)
    try:
        try:
            with computing_in(model, dtype), draws:
                return run(model)
        except (
            Exception
        ):  # torch's dtype mismatches have no class of their own, nor have the user's
            with draws:
                return run(_cast_copy(model, dtype))
    except NormconvError:
        raise
    except Exception as reason:
        name = str(dtype).removeprefix("torch.")
        what = f"it cannot be run in {name}, which judges ({type(reason).__name__}: {reason})"
        way_out = "let its forward follow the input's dtype; apply_plan converts without a proof"
        raise Refused(Problem(type(model).__name__, what, way_out)) from reason
    finally:
        torch.set_default_dtype(default)


def _cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype`, with the tensors that are plain attributes."""
    twin = copy_model(model).to(dtype)
    for module in twin.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                module.__dict__[name] = value.to(dtype)
    return twin
