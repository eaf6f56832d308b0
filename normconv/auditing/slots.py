"""Which part of a tensor belongs to one sample, and whether a change stayed in it. Pure tensor maths.

Nothing says which axis of an activation is the batch, and models flatten tokens, cut windows and put
time first. So every layout in which the size allows an axis to hold the samples is tried: a change that
stays inside the changed sample's part in any one of them is that sample's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normconv.numerics import noise_bound

__all__ = ["Change", "Slot", "bound_of", "change_of", "heal_", "relative_change", "slots_of"]

#: Rounding in a batched float64 kernel may depend on what else it is given, by far less than this.
FLOOR = 1e-9

Kind = Literal["same", "own", "mixed", "suspect", "gathered"]


@dataclass(frozen=True)
class Slot:
    """The entries along one axis that belong to one sample.

    Args:
        axis: which axis holds the samples.
        entries: the sample's entries of it.
    """

    axis: int
    entries: slice

    @property
    def index(self) -> tuple[slice, ...]:
        """What indexes a tensor to the sample's part."""
        return (*(slice(None) for _ in range(self.axis)), self.entries)


@dataclass(frozen=True)
class Change:
    """What a change of one sample did to one tensor.

    Args:
        kind: ``same`` where nothing changed; ``own`` where only that sample's part did; ``mixed`` where
            another's did; ``suspect`` where another's did if an axis that is a multiple of the batch
            holds the samples; ``gathered`` where no axis can hold them.
        size: ‖change‖ / ‖value‖ of what is not the sample's.
        slot: the sample's part, in the likeliest layout.
    """

    kind: Kind
    size: float = 0.0
    slot: Slot | None = None


def slots_of(shape: tuple[int, ...], samples: int, sample: int) -> tuple[list[Slot], bool]:
    """List a sample's possible parts of a tensor, the likeliest first, and whether some are certain.

    Certain is an axis of just the batch's size. Where that is not the first axis, axes of a multiple of
    it may hold the samples too: one after the other (tokens, windows) or in turns (time first).

    Args:
        shape: the tensor's.
        samples: how many the batch has.
        sample: which one.

    >>> slots_of((4, 7), 4, 1)
    ([Slot(axis=0, entries=slice(1, 2, None))], True)
    >>> [slot.entries for slot in slots_of((8, 7), 4, 1)[0]]
    [slice(2, 4, None), slice(1, None, 4)]
    """
    exact = [Slot(axis, slice(sample, sample + 1)) for axis, n in enumerate(shape) if n == samples]
    if shape[:1] == (samples,):
        return exact, True
    several: list[Slot] = []
    for axis, n in enumerate(shape):
        if n > samples and n % samples == 0:
            each = n // samples
            several.append(Slot(axis, slice(sample * each, (sample + 1) * each)))
            several.append(Slot(axis, slice(sample, None, samples)))
    return exact + several, bool(exact)


def bound_of(tensor: Tensor) -> float:
    """Return the relative change up to which rounding is the likelier cause.

    >>> bound_of(torch.zeros(1, dtype=torch.float64))
    1e-09
    """
    return max(FLOOR, noise_bound(tensor.dtype)) if tensor.is_floating_point() else FLOOR


def change_of(base: Tensor, now: Tensor, samples: int, sample: int, bound: float) -> Change:
    """Say what became of a tensor when one sample was changed.

    Args:
        base: before.
        now: after; the same shape.
        samples: how many the batch has.
        sample: which one was changed.
        bound: the largest relative change that counts as none.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> y = torch.tensor([[9.0], [2.0], [3.0]])
    >>> change_of(x, y, 3, 0, 1e-6).kind, change_of(x - x.mean(0), y - y.mean(0), 3, 0, 1e-6).kind
    ('own', 'mixed')
    """
    if torch.equal(base, now):
        return Change("same")
    difference, value = _finite_difference(base, now), _finite(base)
    everywhere = _ratio(difference, value)
    if everywhere <= bound:
        return Change("same")
    slots, certain = slots_of(tuple(base.shape), samples, sample)
    if not slots:
        return Change("gathered", everywhere)
    sizes = [_ratio(_without(difference, slot), _without(value, slot)) for slot in slots]
    for slot, size in zip(slots, sizes, strict=True):
        if size <= bound:
            return Change("own", size, slot)
    return Change("mixed" if certain else "suspect", sizes[0], slots[0])


def relative_change(base: Tensor, now: Tensor) -> float:
    """Return ‖now − base‖ / ‖base‖; entries that are not finite in the same way change nothing.

    >>> relative_change(torch.tensor([2.0, float("nan")]), torch.tensor([3.0, float("nan")]))
    0.5
    """
    return _ratio(_finite_difference(base, now), _finite(base))


def heal_(now: Tensor, base: Tensor, slot: Slot | None) -> bool:
    """Put back what is not the sample's, in place, so that what comes after is judged by itself.

    Returns:
        False where the tensor cannot be written to (an expanded one).
    """
    kept = None if slot is None else now[slot.index].clone()
    try:
        now.copy_(base)
    except RuntimeError:
        return False
    if slot is not None and kept is not None:
        now[slot.index] = kept
    return True


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().abs().double() if tensor.is_complex() else tensor.detach().double()


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(_wide(tensor), nan=0.0, posinf=0.0, neginf=0.0)


def _finite_difference(base: Tensor, now: Tensor) -> Tensor:
    """Zero where both are the same, infinities and NaN included; 1 where only one is finite."""
    if base.is_complex():
        return _finite(now - base)
    a, b = _wide(base), _wide(now)
    same = (a == b) | (a.isnan() & b.isnan())
    odd = ~same & ~(a.isfinite() & b.isfinite())
    return torch.where(same, 0.0, torch.where(odd, 1.0, b - a))


def _without(tensor: Tensor, slot: Slot) -> Tensor:
    rest = tensor.clone()
    rest[slot.index] = 0.0
    return rest


def _ratio(difference: Tensor, value: Tensor) -> float:
    top = float(torch.linalg.vector_norm(difference))
    scale = float(torch.linalg.vector_norm(value))
    return top / scale if scale else top
