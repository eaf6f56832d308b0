"""What data-dependent initialisation sets: gain and bias of a layer, γ and β, running statistics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.graph import Names, couples_in_training, norm_names
from normconv.layers import WeightNormed, layout_of
from normconv.layers.operators import OPERATORS
from normconv.numerics import (
    Moments,
    evaluating,
    moments_of,
    relative_l2,
    wide_dtype,
    wide_row_norms,
)

__all__ = ["InitSite", "LayerSite", "divide_tied", "init_sites"]

_ROUNDING = 64  # of so many roundings a deviation may be made
_KNOWN = tuple(kind.forward for kind in OPERATORS)


@dataclass
class InitSite(ABC):
    """A module of which every channel shall have mean 0 and deviation 1 on the data.

    A channel keeps what it has where nothing can make it so: it is *closed* where its gain is 0, as that
    of a branch that is meant to start as nothing, and *dead* where it does not vary.

    Args:
        name: in the model.
        module: its numbers are set in place.
        calls: how often a forward calls it.
        sets_gain: whether its gain is its own to set.
        sets_bias: whether its bias is.
        closed: (C,) bool, as last seen.
        dead: (C,) bool, as last seen.
    """

    name: str
    module: Any
    calls: int = 1
    sets_gain: bool = True
    sets_bias: bool = True
    closed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    dead: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @abstractmethod
    def values(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what shall be standard, (N, C, *), from what the module gets and gives."""

    @abstractmethod
    def set_(self, moments: Moments, power: float) -> None:
        """Set the module's numbers by the moments of those values, in place."""

    @abstractmethod
    def errors(self, moments: Moments) -> tuple[float, float]:
        """Return the largest |mean| and |deviation − 1|, of channels and numbers that are set."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What its numbers are rounded to."""

    @property
    @abstractmethod
    def action(self) -> str:
        """What is set, in the words of a report."""

    def error(self, moments: Moments) -> float:
        """Return the largest of the errors; NaN is the largest."""
        return float(torch.tensor(self.errors(moments), dtype=torch.float64).max())

    @property
    def bound(self) -> float:
        """The largest error that rounding excuses."""
        return max(1e-5, math.sqrt(torch.finfo(self.dtype).eps))

    def moments(self, x: Tensor, y: Tensor) -> Moments:
        """Return the moments of one call."""
        return moments_of(self.values(x, y))

    def standardise_(self, moments: Moments, power: float = 1.0) -> None:
        """Bring every channel nearer to mean 0 and deviation 1; in place, and all the way with power 1.

        Args:
            moments: of the values as they are, mean m and deviation s.
            power: p; the mean becomes (1 − p) · m, the deviation s^(1 − p).

        Raises:
            UsageError: the moments are not finite, or of a single number a channel.
        """
        if not bool((moments.mean.isfinite() & moments.deviation.isfinite()).all()):
            what = "what it puts out on the data holds NaN or infinity"
            raise UsageError(Problem(self.name, what, "scale the data, or set v_std=0.05"))
        if moments.number < 2:
            what = "the data has a single number a channel there, which has no deviation"
            raise UsageError(Problem(self.name, what, "give more samples"))
        with torch.no_grad():
            self.set_(moments, power)

    def _judge(self, gain: Tensor, bias: Tensor, moments: Moments, groups: int) -> Tensor:
        """Find the channels that keep what they have; those of a group see inputs of one size."""
        self.closed = gain == 0
        own = torch.where(self.closed, torch.ones_like(gain), gain)
        spread = torch.where(self.closed, torch.zeros_like(gain), moments.std / own)
        size = ((moments.mean - bias) / own).square().add(spread.square()).sqrt()
        size = torch.where(self.closed, torch.zeros_like(size), size)
        largest = size.unflatten(0, (groups, -1)).amax(1, keepdim=True)
        least = _ROUNDING * torch.finfo(wide_dtype(self.dtype)).eps * largest
        self.dead = ~self.closed & (spread.unflatten(0, (groups, -1)) <= least).flatten()
        return self.kept

    @property
    def kept(self) -> Tensor:
        """(C,) bool: closed or dead."""
        return self.closed | self.dead


class _ScaledSite(InitSite):
    """g and b of y = g · t + b, whatever holds them: g ← g / s, b ← (b − m) / s."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """How many groups of its channels see inputs of different size."""

    @abstractmethod
    def gain(self) -> Tensor:
        """|g|, (C,) float64."""

    @abstractmethod
    def multiply_(self, factor: Tensor) -> None:
        """Multiply g by (C,) float64."""

    def bias(self) -> nn.Parameter | None:
        """The parameter b, (C,)."""
        found: nn.Parameter | None = self.module._parameters.get("bias")
        return found

    def set_(self, moments: Moments, power: float) -> None:
        bias = self.bias()
        shift = torch.zeros_like(moments.mean) if bias is None else bias.double()
        kept = self._judge(self.gain(), shift, moments, self.groups)
        one = torch.ones_like(moments.mean)
        factor = torch.where(kept, one, moments.std) ** -power if self.sets_gain else one
        if self.sets_gain:
            self.multiply_(factor)
        if bias is not None and self.sets_bias:
            bias.copy_(torch.where(kept, shift, (shift - power * moments.mean) * factor))
            bias.grad = None

    def errors(self, moments: Moments) -> tuple[float, float]:
        return _largest(
            self.kept,
            moments.mean if self.bias() is not None and self.sets_bias else None,
            moments.std if self.sets_gain else None,
        )


class LayerSite(_ScaledSite):
    """Gain and bias of a weight-normed Linear or convolution.

    Source: Salimans & Kingma 2016, equations 5 and 6: g = 1 / σ[t], b = −μ[t] / σ[t], t = v · x / ‖v‖.
    """

    module: Any  # a WeightNormed, which is an nn.Module as well

    @property
    def action(self) -> str:
        """Gain and bias, or the gain alone."""
        return "g and b" if self.bias() is not None else "g"

    @property
    def groups(self) -> int:
        """Those of a convolution."""
        return int(getattr(self.module, "groups", 1))

    @property
    def dtype(self) -> torch.dtype:
        """That of v."""
        dtype: torch.dtype = self.module.weight_v.dtype
        return dtype

    def values(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what the layer gives, channels on axis 1."""
        if isinstance(self.module, nn.Linear):
            return y.reshape(-1, y.shape[-1])
        return y if y.dim() == self.module.weight_v.dim() else y.unsqueeze(0)

    def gain(self) -> Tensor:
        """‖w‖, whatever computes w, (O,) float64."""
        return wide_row_norms(self.module.computed().detach(), self.module.row_layout())

    def multiply_(self, factor: Tensor) -> None:
        """Multiply the gain by (O,) float64; where that is 1 no bit of it changes."""
        held, _ = self.module.gain_and_v()
        before = held.clone()
        self.module.multiply_rows_(factor)
        same = (factor == 1).reshape(held.shape)
        held.copy_(torch.where(same, before, held))  # e^log may be off by a bit
        held.grad = None

    @property
    def has_known_forward(self) -> bool:
        """Whether it computes with torch's own forward."""
        return "forward" not in vars(self.module) and type(self.module).forward in _KNOWN

    def obeys(self, x: Tensor) -> bool:
        """Say whether what it puts out is g · t + b: with 2g and 2b + 1 it must double and rise by 1.

        A forward of the user's may have an activation in it, or rescale the weight.
        """
        held, bias = self.module.gain_and_v()[0], self.bias()
        kept = [(p, p.detach().clone()) for p in (held, bias) if p is not None]
        with evaluating(self.module):
            before = self.module(x)
            self.module.multiply_rows_(held.new_full((held.numel(),), 2.0, dtype=torch.float64))
            if bias is not None:
                bias.mul_(2).add_(1)
            after = self.module(x)
            for parameter, value in kept:
                parameter.copy_(value)
        wanted = 2 * before + (0 if bias is None else 1)
        return relative_l2(after, wanted) <= math.sqrt(torch.finfo(self.dtype).eps)


class _GroupNormSite(_ScaledSite):
    """γ and β of a GroupNorm."""

    module: nn.GroupNorm

    @property
    def action(self) -> str:
        return "γ and β"

    @property
    def groups(self) -> int:
        return self.module.num_groups

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    def values(self, x: Tensor, y: Tensor) -> Tensor:
        norm = self.module  # of a subclass with an activation inside y would be too late
        scale, shift = norm.weight.double(), norm.bias.double()
        return F.group_norm(x.double(), norm.num_groups, scale, shift, norm.eps)

    def gain(self) -> Tensor:
        return self.module.weight.double().abs()

    def multiply_(self, factor: Tensor) -> None:
        self.module.weight.copy_(self.module.weight.double() * factor)
        self.module.weight.grad = None


class _StatisticsSite(InitSite):
    """Running statistics of a BatchNorm, mean-only or not, which training replaces by the batch's."""

    @property
    def action(self) -> str:
        return "running statistics"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.module.running_mean.dtype
        return dtype

    def values(self, x: Tensor, y: Tensor) -> Tensor:
        return x

    def set_(self, moments: Moments, power: float) -> None:
        one, zero = torch.ones_like(moments.mean), torch.zeros_like(moments.mean)
        variance = getattr(self.module, "running_var", None)
        self._judge(one, zero, moments, one.numel())
        self.module.running_mean.copy_(moments.mean)
        if variance is not None:
            variance.copy_(torch.where(self.dead, variance.double(), moments.std.square()))

    def errors(self, moments: Moments) -> tuple[float, float]:
        mean, std = self.module.running_mean.double(), moments.std
        variance = getattr(self.module, "running_var", None)
        if variance is None:
            return _largest(self.dead, (moments.mean - mean) / std, None)
        norm = variance.double().sqrt()
        return _largest(self.dead, (moments.mean - mean) / norm, std / norm)


def _largest(kept: Tensor, mean: Tensor | None, std: Tensor | None) -> tuple[float, float]:
    """The largest |mean| and |std − 1| of channels that are not kept; NaN is the largest."""
    if bool(kept.all()):
        return 0.0, 0.0
    off = 0.0 if mean is None else float(mean[~kept].abs().max())
    return off, 0.0 if std is None else float((std[~kept] - 1).abs().max())


def init_sites(model: nn.Module) -> dict[str, InitSite]:
    """Find all that can be set, by name.

    >>> from normconv.layers import weight_norm_
    >>> net = nn.Sequential(weight_norm_(nn.Linear(2, 4)), nn.GroupNorm(2, 4), nn.Linear(4, 1))
    >>> list(init_sites(net))
    ['0', '1']
    """
    found: dict[str, InitSite] = {}
    for name, module in model.named_modules():
        if layout_of(module) is not None and isinstance(module, WeightNormed):
            found[name] = LayerSite(name, module)
        elif isinstance(module, nn.GroupNorm) and module.affine:
            found[name] = _GroupNormSite(name, module)
    for name in norm_names(model, couples_in_training):
        norm: Any = model.get_submodule(name)
        if norm.running_mean is not None:
            found[name] = _StatisticsSite(name, norm)
    return found


def divide_tied(model: nn.Module, order: Sequence[InitSite]) -> dict[str, str]:
    """Let the first of several modules that share a gain or bias set it, and the others leave it.

    What is also a parameter of a module that is not initialised, as an embedding, nobody sets.

    Args:
        model: read only.
        order: in which they are initialised.

    Returns:
        By name of the site which gain or bias it leaves, and whose that is.
    """
    names, ours = Names(model), {site.name for site in order}
    setter: dict[int, str] = {}
    left: dict[str, str] = {}

    def own(site: InitSite, what: str, parameter: Tensor) -> bool:
        strangers = [owner for owner in names.owners(parameter) if owner not in ours]
        first = strangers[0] if strangers else setter.setdefault(id(parameter), site.name)
        if first != site.name:
            left[site.name] = f"its {what} is that of {first}"
        return first == site.name

    for site in order:
        if isinstance(site, LayerSite):
            site.sets_gain = own(site, "gain", site.module.gain_and_v()[0])
        if isinstance(site, _ScaledSite) and (bias := site.bias()) is not None:
            site.sets_bias = own(site, "bias", bias)
    return left
