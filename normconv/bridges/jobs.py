"""The pieces of a conversion: which tensors come out, what they are made from, how."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from normconv.bridges.gains import GainRows, log_split, plain_weight, split
from normconv.bridges.standardized import StandardizedBy, standardized_weight
from normconv.bridges.tensors import Spec, Tensors
from normconv.numerics import all_finite
from normconv.report import SiteRow

__all__ = ["Findings", "Job", "Origin", "Parts", "Read", "copied", "reformed"]

Read = Callable[[str], Tensor]


@dataclass
class Findings:
    """What the numbers showed, by weight, as sentences."""

    said: dict[str, str] = field(default_factory=dict)

    def zero_rows(self, weight: str, zero: Tensor, became: str) -> None:
        """Note rows without direction."""
        if number := 0 if zero.is_meta else int(zero.sum()):
            self.said[weight] = f"{number} rows without direction {became}"

    def check(self, weight: str, *tensors: Tensor) -> None:
        """Note NaN and infinity."""
        if not all(tensor.is_meta or all_finite(tensor) for tensor in tensors):
            self.said[weight] = "holds NaN or infinity"


@dataclass(frozen=True)
class Job:
    """Tensors that are made together.

    Args:
        outputs: what comes out.
        inputs: every key that is used up; the first says where in the order, and in which shard.
        make: reads the inputs, returns the outputs, and says what the numbers showed.
        same: equal for jobs that make the same tensors; None for one that is like no other.
        row: for the report; None for what passes through.
    """

    outputs: Mapping[str, Spec]
    inputs: tuple[str, ...]
    make: Callable[[Read, Findings], dict[str, Tensor]]
    same: Hashable = None
    row: SiteRow | None = None


@dataclass(frozen=True)
class Parts:
    """A weight as gain and direction.

    Args:
        gain: the key of g, or of s.
        v: the key of v.
        rows: which elements share a gain.
        c: of g = e^(c·s); None for g itself.
    """

    gain: str
    v: str
    rows: GainRows
    c: float | None = None

    def same_maths(self, other: Parts) -> bool:
        """Whether the numbers are the same under other names."""
        slices = (self.rows.axis, self.rows.groups, prod(self.rows.shape), self.c)
        return slices == (other.rows.axis, other.rows.groups, prod(other.rows.shape), other.c)


Origin = Parts | StandardizedBy | None


def copied(name: str, tensors: Tensors) -> Job:
    """Pass a tensor through."""
    same = ("copy", tensors.identity(name))
    spec = tensors.specs[name]
    return Job({name: spec}, (name,), lambda read, _: {name: read(name)}, same)


def reformed(
    weight: str, origin: Origin, wanted: Parts | None, tensors: Tensors, row: SiteRow
) -> Job:
    """Take a weight from one form into another.

    Args:
        weight: its plain name.
        origin: the form it is in; None for plain.
        wanted: the form it gets; None for plain.
        tensors: where it stands.
        row: for the report.
    """
    inputs = (weight,) if origin is None else tuple(filter(None, (origin.gain, origin.v)))
    spec = tensors.specs[inputs[-1]]
    outputs = {weight: spec}
    renamed = isinstance(origin, Parts) and wanted is not None and origin.same_maths(wanted)
    if wanted is not None:
        dtype = tensors.specs[inputs[0]].dtype if renamed else spec.dtype
        outputs = {wanted.gain: Spec(wanted.rows.shape, dtype), wanted.v: spec}

    def make(read: Read, found: Findings) -> dict[str, Tensor]:
        if wanted is not None and renamed:
            gain, v = map(read, inputs)
            found.check(weight, gain, v)
            return {wanted.gain: gain.reshape(wanted.rows.shape), wanted.v: v}
        plain = _plain(weight, origin, read, found)
        if wanted is None:
            found.check(weight, plain)
            return {weight: plain}
        gain, v = split(plain, wanted.rows)
        found.check(weight, gain, v)
        found.zero_rows(weight, gain == 0, "have v = 1/√n and g = 0")
        if wanted.c is not None:
            gain, v, floored = log_split(gain, v, wanted.rows, wanted.c, weight)
            found.zero_rows(weight, floored, "have a g within rounding: 0 is no e^(c·s)")
        return {wanted.gain: gain, wanted.v: v}

    identities = tuple(tensors.identity(name) for name in inputs)
    rows = None if wanted is None else (wanted.rows, wanted.c)
    return Job(outputs, inputs, make, ("reform", identities, rows), row)


def _plain(weight: str, origin: Origin, read: Read, found: Findings) -> Tensor:
    if origin is None:
        return read(weight)
    v = read(origin.v)
    if isinstance(origin, StandardizedBy):
        return standardized_weight(read(origin.gain) if origin.gain else None, v, origin)
    gain = read(origin.gain).double()
    if origin.c is not None:
        gain = (gain * origin.c).exp()
    value, zero = plain_weight(gain, v, origin.rows)
    found.zero_rows(weight, zero, "became 0")
    return value
