"""A copy of the model to run: in float64 where it can be, the same again before every run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from normconv.auditing.batches import Batch
from normconv.errors import CaptureError, PlanError, Problem
from normconv.graph.quiet import quiet
from normconv.layers import copy_model
from normconv.numerics import evaluating
from normconv.surgery import lazy_modules, materialise_
from normconv.surgery.wrappers import refuse_wrapped

__all__ = ["Twin", "refuse_unfit", "shaped", "twin_of"]

_SEED = 0


@dataclass(frozen=True)
class Twin:
    """A copy of a model, for runs of which nothing stays.

    Args:
        model: the copy.
        source: what its tensors are copies of.
        dtype: what it is run in; None where it runs in its own.
    """

    model: nn.Module
    source: nn.Module
    dtype: torch.dtype | None

    @contextmanager
    def running(self, training: bool) -> Iterator[None]:
        """Let the copy run, always from the same state and the same random numbers."""
        default = torch.get_default_dtype()
        with quiet(), evaluating(self.model), _other_generators_seeded(), self._inputs_cast():
            self.model.train(training)
            try:
                torch.set_default_dtype(self.dtype or default)  # for tensors that a forward makes
                yield
            finally:
                torch.set_default_dtype(default)
                self._restore()

    @contextmanager
    def _inputs_cast(self) -> Iterator[None]:
        """Cast what modules are given: a forward that says `x.float()` feeds its own dtype."""
        if self.dtype is None:
            yield
            return
        dtype = self.dtype

        def wide(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return pytree.tree_map_only(Tensor, wide, (args, kwargs))

        handles = [
            module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            for module in self.model.modules()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def written(self) -> dict[str, Tensor]:
        """Return copies of the parameters and buffers that a run has written to so far, by name."""
        return {
            name: mine.detach().clone()
            for name, mine, original in self._pairs()
            if not _same(mine, original)
        }

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        theirs = _tensors(self.source)
        for name, mine in _tensors(self.model).items():
            original = theirs.get(name)
            if original is not None and original.shape == mine.shape:
                yield name, mine, original.detach().to(mine.dtype)

    @torch.no_grad()
    def _restore(self) -> None:
        for _, mine, original in self._pairs():
            if not _same(mine, original):
                mine.copy_(original)

    @property
    def devices(self) -> list[int]:
        """The CUDA devices that hold it."""
        return sorted({p.device.index or 0 for p in self.model.parameters() if p.is_cuda})


def shaped(model: nn.Module, batch: Batch) -> nn.Module:
    """Return the model, or where layers of it are lazy a copy in which they have their shapes.

    Lazy layers that no forward reaches stay as they are.

    Raises:
        CaptureError: the model does not run on the batch.
    """
    if not lazy_modules(model):
        return model
    copied = copy_model(model)
    args, kwargs = batch.fresh()
    try:
        materialise_(copied, args, kwargs)
    except PlanError as reason:
        if reason.__cause__ is not None:
            raise CaptureError(reason.problems) from reason
    return copied


def twin_of(model: nn.Module, dtype: torch.dtype | None) -> Twin:
    """Copy a model to be run in `dtype`, or in its own where that is None.

    Raises:
        CaptureError: something on it cannot be copied.
    """
    try:
        copied = copy_model(model)
    except PlanError as reason:
        raise CaptureError(reason.problems) from reason
    if dtype is not None:
        _cast_(copied, dtype)
    return Twin(copied, model, dtype)


def refuse_unfit(model: nn.Module) -> None:
    """Refuse what has no values, and what comes in a wrapper with its own view of the model.

    Raises:
        CaptureError: names the wrappers, or the first tensor on the meta device.
    """
    try:
        refuse_wrapped(model)
    except PlanError as reason:
        way_out = "audit the model inside, as it was before it was wrapped"
        raise CaptureError([Problem(p.where, p.what, way_out) for p in reason.problems]) from reason
    names = [name for name, tensor in _tensors(model).items() if tensor.is_meta]
    if names:
        what = "it is on the meta device: without values nothing can be measured"
        way_out = (
            "load the weights, or fill the model with to_empty(device='cpu') and initialise it"
        )
        raise CaptureError(Problem(names[0], what, way_out))


def _cast_(model: nn.Module, dtype: torch.dtype) -> None:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and not is_lazy(tensor) else tensor

    model._apply(cast)
    for module in model.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                module.__dict__[name] = cast(value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    both = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in both if not is_lazy(tensor)}


def _same(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def _other_generators_seeded() -> Iterator[None]:
    """Python's and NumPy's random numbers: stochastic depth and augmentations draw from them too."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
