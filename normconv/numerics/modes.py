"""Running a model so that a second run gives the same, and so that nothing of it is left behind."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["evaluating", "state_kept"]

_SEED = 0
_CONTAINERS = (list, dict, set, deque)
_OWN = frozenset(nn.Module().__dict__) - {"training"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, without gradients and autocast and with a fixed seed.

    Everything is restored after: flags module by module (a model with frozen parts has mixed ones),
    buffers and attributes that the forward writes to, the random state.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with state_kept(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        model.eval()
        torch.manual_seed(_SEED)
        yield


@contextmanager
def state_kept(model: nn.Module, *, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Undo what running or tracing a model leaves on it, and keep autocast out.

    A forward may count, or fill a cache on first use; under a trace such a cache fills with fake
    tensors and proxies. Attributes, containers among them, hooks and buffers come back as they were.
    Autocast casts weights behind a trace's back and caches what it cast.

    Args:
        model: as it was afterwards.
        but: modules that may change.
    """
    left_alone = {id(module) for module in but}
    modules = [module for module in model.modules() if id(module) not in left_alone]
    attributes = [(module, dict(module.__dict__)) for module in modules]
    stores = [(store, dict(store)) for module in modules for store in _stores_of(module)]
    containers = [
        (value, copy.copy(value))
        for _, kept in attributes
        for name, value in kept.items()
        if name not in _OWN and type(value) in _CONTAINERS
    ]
    buffers = [
        (buffer, buffer.detach().clone())
        for module in modules
        for buffer in module._buffers.values()
        if buffer is not None and not buffer.is_meta and not is_lazy(buffer)
    ]
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            _uncompile(modules)
            yield
        finally:
            for module, kept in attributes:
                module.__dict__.clear()
                module.__dict__.update(kept)
            for store, entries in stores:
                _refill(store, entries)
            for container, entries in containers:
                _refill(container, entries)
            _restore(buffers)


def _stores_of(module: nn.Module) -> list[dict[Any, Any]]:
    """What a module holds; hooks too: a forward may install some and note in an attribute that it has."""
    own = (value for name, value in module.__dict__.items() if name in _OWN and "hooks" in name)
    hooks = [value for value in own if isinstance(value, dict)]
    return [module._parameters, module._buffers, module._modules, *hooks]


def _uncompile(modules: Iterable[nn.Module]) -> None:
    """Let modules compiled in place (`module.compile()`) run as they are: those skip new hooks."""
    for module in modules:
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None


def _refill(container: Any, entries: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(entries)
    else:
        container.update(entries)


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, kept in buffers:
            if not torch.equal(buffer, kept):
                buffer.copy_(kept)
