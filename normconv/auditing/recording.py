"""What one run of a model hands from module to module, kept so that other runs can be held against it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from normconv.graph.tracing import tensors_in

__all__ = ["Key", "Listener", "Moment", "Record", "Recorder", "hooked", "judgeable", "random_state"]

Key = tuple[str, int, Literal["in", "out"]]
"""A module's name, which of its calls, and whether its inputs or its outputs are meant."""


@dataclass(frozen=True)
class Moment:
    """What is handed over at one place.

    Args:
        tensors: copies, in order.
        random: the states of the random generators.
    """

    tensors: list[Tensor]
    random: list[Tensor]


@dataclass
class Record:
    """One run.

    Args:
        moments: by place.
        training: the modules called, in order, and whether each was in training mode then.
        around: for each call the module that was running when it was made.
    """

    moments: dict[Key, Moment] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    around: dict[tuple[str, int], str] = field(default_factory=dict)


class Listener(Protocol):
    """Is told of every call of a module."""

    def enter(self, name: str, number: int, module: nn.Module, given: Any) -> None:
        """Learn what call `number` of a module is given."""

    def leave(self, name: str, number: int, given: Any, finished: bool) -> None:
        """Learn what it returned; not `finished` where it raised."""


@contextmanager
def hooked(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Tell a listener of every call, around the user's own hooks: what those do belongs to the call."""
    numbers: Counter[str] = Counter()
    running: list[tuple[nn.Module, str, int]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        name = names[module]
        numbers[name] += 1
        running.append((module, name, numbers[name]))
        listener.enter(name, numbers[name], module, (args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        while running:
            inner, name, number = running.pop()
            listener.leave(name, number, output, inner is module and output is not None)
            if inner is module:
                return

    names = {module: name for name, module in model.named_modules()}
    handles: list[Any] = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def judgeable(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value that have rows to compare."""
    return [
        tensor
        for _, tensor in tensors_in(value)
        if tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    ]


def random_state(devices: list[int]) -> list[Tensor]:
    """Return the states of the generators that the model draws from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


class Recorder:
    """Writes down what is handed over.

    Args:
        devices: the CUDA devices whose generators count.
    """

    def __init__(self, devices: list[int]) -> None:
        self.record = Record()
        self._devices = devices
        self._running: list[str] = []
        self._copies: dict[int, tuple[Any, int, Tensor]] = {}

    def enter(self, name: str, number: int, module: nn.Module, given: Any) -> None:
        """Keep the inputs."""
        self.record.training[name] = self.record.training.get(name, False) or module.training
        self.record.around[name, number] = self._running[-1] if self._running else name
        self._running.append(name)
        self._keep((name, number, "in"), given)

    def leave(self, name: str, number: int, given: Any, finished: bool) -> None:
        """Keep the outputs."""
        self._running.pop()
        if finished:
            self._keep((name, number, "out"), given)

    def _keep(self, key: Key, given: Any) -> None:
        copies = [self._copy(tensor) for tensor in judgeable(given)]
        self.record.moments[key] = Moment(copies, random_state(self._devices))

    def _copy(self, tensor: Tensor) -> Tensor:
        """Most inputs are the output of the module before, unwritten since: one copy does for both."""
        known = self._copies.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        copy = tensor.detach().clone()
        self._copies[id(tensor)] = (weakref.ref(tensor), tensor._version, copy)
        return copy
