"""The batch that is run, and the same batch with one sample changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normconv.errors import Problem, UsageError
from normconv.graph.tracing import copied, tensors_in

__all__ = ["Batch", "batch_of"]

#: What one sample is made into: odd, so that few other axes are a multiple of it.
_ENLARGED = 3
_LEAST_SHARE = 0.3  # of its value that an entry keeps when it is changed
_TOKENS = 2  # more values than this are tokens; fewer are a mask


@dataclass(frozen=True)
class Batch:
    """Inputs of several samples.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        samples: how many there are.
        axis: which axis of the inputs holds them.
        enlarged: it was made of one sample.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int
    axis: int = 0
    enlarged: bool = False

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies to run on: a forward may write into its inputs."""
        args, kwargs = copied((self.args, self.kwargs))
        return args, kwargs

    def cast(self, dtype: torch.dtype) -> Batch:
        """Return the batch with its floating tensors in `dtype`."""

        def to(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        args, kwargs = _mapped(to, (self.args, self.kwargs))
        return Batch(args, kwargs, self.samples, self.axis, self.enlarged)

    def changed(self, sample: int) -> Iterator[Batch]:
        """Yield the batch with one sample changed, in ways to try until the model takes one.

        Floating entries shrink, each by its own random share, so that none leaves the range of its
        input; rows of tokens are rolled. Tokens stay in the second way. One number a sample (a label, a
        length) is taken from another sample, and only where nothing else can be changed.
        """
        ways: list[Callable[[Tensor], Tensor | None]] = [
            lambda tensor: (
                _shrunk(tensor, self.axis, sample)
                if tensor.is_floating_point()
                else _rolled(tensor, self.axis, sample)
            ),
            lambda tensor: _shrunk(tensor, self.axis, sample),
            lambda tensor: _borrowed(tensor, self.axis, sample),
        ]
        found = False
        for number, way in enumerate(ways):
            made = self._with(way)
            if made is not None and not (found and number == len(ways) - 1):
                found = True
                yield made

    def _with(self, way: Callable[[Tensor], Tensor | None]) -> Batch | None:
        written = False

        def apply(tensor: Tensor) -> Tensor:
            nonlocal written
            if not _is_batched(tensor, self.axis, self.samples):
                return tensor
            new = way(tensor)
            if new is None or torch.equal(new, tensor):
                return tensor
            written = True
            return new

        args, kwargs = _mapped(apply, (self.args, self.kwargs))
        return Batch(args, kwargs, self.samples, self.axis) if written else None


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], axis: int = 0) -> Batch:
    """Make a batch of at least two samples of example inputs.

    The first floating input says how many samples there are, else the first integer one. Inputs of
    another size along the axis belong to no sample and are left alone.

    Raises:
        UsageError: no tensor has such an axis, one holds NaN, or there is nothing in them to change.

    >>> batch_of((torch.randn(1, 4),), {}).samples, batch_of((torch.randn(5, 4),), {}).samples
    (3, 5)
    """
    given = (tuple(args), dict(kwargs))
    _refuse_nan(given)
    samples = _samples(given, axis)
    batch = Batch(*given, samples, axis)
    if samples == 1:
        larger = _mapped(lambda tensor: _repeated(tensor, axis), given)
        batch = Batch(larger[0], larger[1], _ENLARGED, axis, enlarged=True)
    if next(batch.changed(0), None) is None:
        what = "no input has anything in it that can be changed for one sample and not the others"
        raise UsageError(Problem("example_inputs", what, "give varied inputs, e.g. torch.randn"))
    return batch


def _samples(given: Any, axis: int) -> int:
    tensors = [tensor for _, tensor in tensors_in(given) if tensor.dim() > axis]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    first = next(iter(floats or tensors), None)
    if first is None:
        what = f"no input is a tensor with an axis {axis}, which would hold the samples"
        raise UsageError(Problem("example_inputs", what, "give a batch of samples"))
    if not first.shape[axis]:
        what = f"an input of shape {tuple(first.shape)} holds no sample"
        raise UsageError(Problem("example_inputs", what, "give at least one"))
    return int(first.shape[axis])


def _refuse_nan(given: Any) -> None:
    for number, (_, tensor) in enumerate(tensors_in(given)):
        if tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any()):
            what = f"tensor {number}, of shape {tuple(tensor.shape)}, holds NaN: nothing can be compared"
            raise UsageError(Problem("example_inputs", what, "give inputs without NaN"))


def _mapped(function: Callable[[Tensor], Tensor], given: Any) -> Any:
    """Apply to every tensor once: one that is given twice stays one."""
    made: dict[int, Tensor] = {}

    def apply(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = function(tensor)
        return made[id(tensor)]

    return pytree.tree_map_only(Tensor, apply, given)


def _is_batched(tensor: Tensor, axis: int, samples: int) -> bool:
    return tensor.dim() > axis and tensor.shape[axis] == samples


def _repeated(tensor: Tensor, axis: int) -> Tensor:
    if not _is_batched(tensor, axis, 1):
        return tensor
    made = torch.cat([tensor] * _ENLARGED, axis)
    for sample in range(1, _ENLARGED):
        new = _shrunk(made, axis, sample)
        new = _rolled(made, axis, sample) if new is None else new
        made = made if new is None else new
    return made


def _shrunk(tensor: Tensor, axis: int, sample: int) -> Tensor | None:
    if not tensor.is_floating_point():
        return None
    new = tensor.detach().clone()
    row = new.select(axis, sample)
    generator = torch.Generator().manual_seed(sample)
    share = torch.rand(row.shape, generator=generator, dtype=torch.float64).to(row.device)
    scale = float(torch.nan_to_num(tensor.double(), posinf=0.0, neginf=0.0).abs().mean()) or 1.0
    # A zero stays in the range too: it moves to the side on which the others are.
    moved = torch.where(row == 0, share * scale, row.double() * (_LEAST_SHARE + 0.6 * share))
    row.copy_(torch.where(row.isinf(), row.double(), moved))
    return new


def _rolled(tensor: Tensor, axis: int, sample: int) -> Tensor | None:
    if tensor.is_floating_point() or tensor.dim() < 2 or tensor.dtype == torch.bool:
        return None
    if len(Counter(tensor.flatten().tolist())) <= _TOKENS:
        return None
    new = tensor.detach().clone()
    row = new.select(axis, sample)
    row.copy_(row.roll(1, dims=-1))
    return new


def _borrowed(tensor: Tensor, axis: int, sample: int) -> Tensor | None:
    """What another sample has is a value that the model takes."""
    for other in range(tensor.shape[axis]):
        new = tensor.detach().clone()
        new.select(axis, sample).copy_(tensor.select(axis, other))
        if not torch.equal(new, tensor):
            return new
    return None
