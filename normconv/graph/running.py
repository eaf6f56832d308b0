"""Does the model run at all on the example inputs, and if not, which of its modules stops it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normconv.errors import CaptureError, Problem
from normconv.graph.quiet import quiet
from normconv.graph.tracing import copied, shapes_of

__all__ = ["Innermost", "first_line", "forward_failure", "refuse_to_run"]

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_META = ("meta tensor", "'meta'", "meta device")


class Innermost:
    """Knows the innermost module that runs; after an exception, the one that raised it."""

    def __init__(self, model: nn.Module) -> None:
        self._running: list[nn.Module] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._handles: list[Any] = []

    def __enter__(self) -> Innermost:
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        # What raised and was caught by the model never left.
        while self._running and self._running.pop() is not module:
            pass

    def describe(self) -> str:
        """Name the module and its class."""
        if not self._running:
            return ""
        module = self._running[-1]
        name, kind = self._names[module], type(module).__name__
        return f"{name} ({kind})" if name else kind


def forward_failure(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Problem | None:
    """Run a forward pass in the model's present mode; return what it raises, and where.

    What the machine or the meta device lacks is no fault of the inputs, and not told.
    """
    args, kwargs = copied((args, dict(kwargs)))
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.is_cuda})
    with Innermost(model) as innermost:
        try:
            with torch.no_grad(), quiet(), torch.random.fork_rng(devices=devices):
                model(*args, **kwargs)
        except Exception as reason:  # the forward is the user's
            text = str(reason).lower()
            excused = _MEMORY if not _is_meta(model) else (*_MEMORY, *_META)
            if isinstance(reason, (MemoryError, *_OUT)) or any(w in text for w in excused):
                return None
            where = innermost.describe() or type(model).__name__
            return Problem(where, first_line(reason), _way_out((args, kwargs)))
    return None


_OUT = (torch.OutOfMemoryError,)


def _is_meta(model: nn.Module) -> bool:
    return any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def refuse_to_run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs on which the model does not run.

    Raises:
        CaptureError: names the innermost module that raised, what it said and the shapes given.
    """
    if (problem := forward_failure(model, args, kwargs)) is not None:
        raise CaptureError(problem)


def _way_out(given: Any) -> str:
    return f"check that the example inputs ({shapes_of(given)}) fit the model"


def first_line(reason: Exception) -> str:
    """Say in one line what an exception says."""
    text = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {text[0] if text else 'no message'}"[:300]
