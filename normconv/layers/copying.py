"""Copying a model whole, whatever hangs on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from normconv.errors import PlanError, Problem

__all__ = ["copy_model"]

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, *, share_tensors: bool = False) -> Model:
    """Return a deep copy of a model.

    Legacy weight norm, among others, keeps a computed tensor as a plain attribute; deepcopy refuses
    tensors with a gradient history, so those are detached in the copy. The first forward makes them
    anew.

    Args:
        model: any module.
        share_tensors: the copy's modules are its own, its parameters and buffers are the model's:
            for edits that replace tensors and never write into them.

    Raises:
        PlanError: something on the model cannot be copied; names it.

    >>> import torch, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     layer = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    >>> copy_model(layer).weight.requires_grad
    False
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            for tensor in _tensors(value):
                if not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
        if share_tensors:
            for shared in [*module._parameters.values(), *module._buffers.values()]:
                if shared is not None and not is_lazy(shared):  # lazy ones are made where they lie
                    memo[id(shared)] = shared
        for buffer in module._buffers.values():
            if isinstance(buffer, UninitializedBuffer):
                memo[id(buffer)] = _twin_of(buffer)
    try:
        twin = copy.deepcopy(model, memo)
        _carry_parameter_attributes(model, memo)
        return twin
    except Exception as reason:  # whatever hangs on the user's model decides what this is
        raise PlanError(_uncopyable(model, reason)) from reason


def _carry_parameter_attributes(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Copy what hangs on parameters (`p._is_hf_initialized`), which torch's own deepcopy drops."""
    for parameter in model.parameters():
        twin = memo.get(id(parameter))
        if twin is not None and twin is not parameter:
            for name, value in vars(parameter).items():
                vars(twin).setdefault(name, copy.copy(value))


def _twin_of(buffer: UninitializedBuffer) -> UninitializedBuffer:
    """What torch's own deepcopy refuses."""
    make: Any = UninitializedBuffer
    twin: UninitializedBuffer = make(buffer.requires_grad, buffer.device, buffer.dtype)
    twin.__dict__.update(buffer.__dict__)
    return twin


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)


def _uncopyable(model: nn.Module, reason: Exception) -> list[Problem]:
    inner = nn.Module().__dict__.keys()
    problems = []
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name in inner:
                continue
            try:
                copy.deepcopy(value, {})
            except Exception as error:
                where = f"{path}.{name}" if path else name
                problems.append(
                    Problem(where, f"it cannot be copied ({error})", "take it off first")
                )
    return problems or [Problem(type(model).__name__, f"it cannot be copied ({reason})")]
