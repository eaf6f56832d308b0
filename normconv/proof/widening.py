"""A run in a wider dtype without a second model: each module's tensors are wide while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["computing_in"]


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the model compute in `dtype` inside the block; memory for the running modules only.

    Before a module's forward its own parameters and buffers are replaced by copies in `dtype`, and
    afterwards the originals are put back, as they were. What a module reads from another one that is
    not running keeps its dtype: such a model raises a dtype error, and needs a copy in `dtype`.

    Args:
        model: as it was afterwards, whatever its forward raises.
        dtype: a floating dtype.

    >>> layer = nn.Linear(2, 1)
    >>> with computing_in(layer, torch.float64):
    ...     print(layer(torch.zeros(1, 2, dtype=torch.float64)).dtype)
    torch.float64
    >>> layer.weight.dtype
    torch.float32
    """
    swap = _Swap(dtype)
    handles: list[Any] = []
    try:
        for module in model.modules():
            if swap.concerns(module):
                handles.append(
                    module.register_forward_pre_hook(swap.widen, prepend=True, with_kwargs=True)
                )
                handles.append(module.register_forward_hook(swap.restore, always_call=True))
        with _OneDtypeInAttention(dtype):
            yield
    finally:
        for handle in handles:
            handle.remove()
        swap.restore_all()


class _OneDtypeInAttention(TorchFunctionMode):
    """Casts what attention takes: given a mask in another dtype than the query's it computes junk.

    Such a mask is a parameter that is read outside of its module's forward, which nothing widens. Other
    functions promote it, or raise.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            args = tuple(self._cast(value) for value in args)
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if is_float else value


class _Swap:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: dict[nn.Module, list[tuple[dict[str, Any], str, Tensor]]] = {}
        self._depth: Counter[nn.Module] = Counter()

    def concerns(self, module: nn.Module) -> bool:
        return any(self._is_narrow(t) for s in _stores(module) for t in s.values())

    def _is_narrow(self, tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.is_floating_point() and tensor.dtype != self._dtype

    def widen(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._depth[module] += 1
        # A model that casts inside (`x.float() / 255`) feeds its own dtype: it is exact in a wider one.
        args = tuple(self._wide(value) for value in args)
        kwargs = {name: self._wide(value) for name, value in kwargs.items()}
        if self._depth[module] > 1:
            return args, kwargs
        kept = self._kept.setdefault(module, [])
        for store in _stores(module):
            for name, tensor in store.items():
                if self._is_narrow(tensor):
                    kept.append((store, name, tensor))
                    wide = tensor.detach().to(self._dtype)
                    store[name] = nn.Parameter(wide, False) if store is module._parameters else wide
        return args, kwargs

    def _wide(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if is_float else value

    def restore(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth[module] -= 1
        if self._depth[module] == 0:
            for store, name, tensor in self._kept.pop(module, []):
                store[name] = tensor

    def restore_all(self) -> None:
        for kept in self._kept.values():
            for store, name, tensor in kept:
                store[name] = tensor


def _stores(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers
