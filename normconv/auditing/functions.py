"""Which function inside a module lets samples see each other: each is tried alone on what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normconv.auditing.recording import judgeable
from normconv.auditing.slots import bound_of, change_of

__all__ = ["FunctionWatch"]

_SEED = 0
_BY_DIM = 2  # arguments of softmax(x, dim), mean(x, dim): the second is the axis


class FunctionWatch(TorchFunctionMode):
    """Sees the functions that modules call themselves, and tries those of the modules under suspicion.

    It is a listener as well, to know which module runs.

    Args:
        samples: how many the batch has.
        blamed: modules whose functions are tried.
    """

    def __init__(self, samples: int, blamed: frozenset[str]) -> None:
        super().__init__()
        self.culprits: dict[str, dict[str, None]] = {}
        self.batch_norms: set[str] = set()
        self._samples = samples
        self._blamed = blamed
        self._running: list[str] = []

    def enter(self, name: str, number: int, module: nn.Module, given: Any) -> None:
        """Learn which module runs."""
        self._running.append(name)

    def leave(self, name: str, number: int, given: Any, finished: bool) -> None:
        """Learn that it does no more."""
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._running:
            name = self._running[-1]
            norm = _normalizes_the_batch(func, args, kwargs)
            if norm:
                self.batch_norms.add(name)
            if name in self._blamed and self._couples(func, args, kwargs):
                said = norm or _described(func, args, kwargs)
                self.culprits.setdefault(name, {})[said] = None
        return func(*args, **kwargs)

    def _couples(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Call a function on its arguments, and again with one sample of them changed."""
        written = str(getattr(func, "__name__", "")).rstrip("_") != getattr(func, "__name__", "")
        if written or "out" in kwargs or not _floats(args, kwargs, self._samples):
            return False
        try:
            base, *changed = (
                self._outputs(func, args, kwargs, sample) for sample in (None, 0, self._samples - 1)
            )
            return any(map(self._mixes, base, *changed))
        except Exception:  # a function that cannot be tried alone is not named
            return False

    def _mixes(self, base: Tensor, first: Tensor, last: Tensor) -> bool:
        """Whether samples moved to others' rows, or some entry depends on two of them."""
        if not base.shape == first.shape == last.shape:
            return False
        bound, samples = bound_of(base), self._samples
        runs = ((first, 0), (last, samples - 1))
        if any(change_of(base, now, samples, one, bound).kind == "mixed" for now, one in runs):
            return True
        moved = (base != first, base != last)
        if not base.dim():  # a maximum takes all samples, and follows one
            return bool(moved[0] | moved[1])
        return bool((moved[0] & moved[1]).any())

    def _outputs(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], sample: int | None
    ) -> list[Tensor]:
        def own(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().clone()
            if sample is not None and _has_rows(tensor, self._samples):
                tensor[sample] = tensor[sample] * 4.0 + 2.0  # so that it is the largest as well
            return tensor

        given_args, given_kwargs = pytree.tree_map_only(Tensor, own, (args, dict(kwargs)))
        devices = sorted({t.device.index for t in judgeable(args) if t.is_cuda})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            return judgeable(func(*given_args, **given_kwargs))


def _has_rows(tensor: Tensor, samples: int) -> bool:
    return tensor.is_floating_point() and tensor.shape[:1] == (samples,)


def _floats(args: Any, kwargs: Any, samples: int) -> bool:
    return any(_has_rows(tensor, samples) for tensor in judgeable((args, kwargs)))


def _normalizes_the_batch(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """Name a call of `F.batch_norm` that takes its statistics from the batch; else empty."""
    if func is not F.batch_norm:
        return ""
    call = inspect.signature(F.batch_norm).bind(*args, **kwargs)
    call.apply_defaults()
    return "F.batch_norm with training=True" if call.arguments["training"] else ""


def _described(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    name = str(getattr(func, "__name__", func)).strip("_")
    axis = kwargs.get("dim", args[1] if len(args) == _BY_DIM else None)
    is_axis = isinstance(axis, (int, tuple, list)) and not isinstance(axis, bool)
    return f"{name} over dim {axis}" if is_axis else name
