"""Try inputs on a model without its numbers: does the forward pass take them?"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["failure_of"]

_BLIND = (
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
    "UnsupportedOperatorException",
)


def failure_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Run the model on shapes alone, in eval; None when it passes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _silent(), torch.no_grad(), _in_eval(_twin(model, mode)) as twin, mode:
            fakes = [_fake(value, mode) for value in args]
            twin(*fakes, **{name: _fake(value, mode) for name, value in kwargs.items()})
    except Exception as error:  # the model's own code may raise anything
        if _needs_numbers(error):
            return _failure_with_numbers(model, args, kwargs)
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return None


def _twin(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a model without its numbers, so that what its forward keeps is kept in the copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # Attributes too: torch's old weight norm keeps the computed weight as one.
        for owned in (module._parameters, module._buffers, vars(module)):
            for value in owned.values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = mode.from_tensor(value)
    return copy.deepcopy(model, memo)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's log of failed shape rules off the terminal: failures are expected here."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[nn.Module]:
    was_training = [module for module in model.modules() if module.training]
    try:
        for module in was_training:
            module.training = False
        yield model
    finally:
        for module in was_training:
            module.training = True


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _needs_numbers(error: Exception) -> bool:
    """Say whether the model looked at numbers, which shapes alone do not have."""
    return any(kind.__name__ in _BLIND for kind in type(error).__mro__)


def _failure_with_numbers(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    try:
        with _silent(), torch.no_grad(), _in_eval(model):
            model(*args, **kwargs)
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return None
