"""Moment matching: each channel of a norm's output gets the mean and deviation that it had before."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.calibration.ranks import of_all_ranks
from normconv.graph import NormState
from normconv.numerics import Moments, apply_affine, moments_of

__all__ = ["Match", "candidates", "match_"]

_PRIOR = 16  # samples that the trained statistics are worth against those of the data
_DEAD = 1e-6  # a deviation that is none, where the trained one is 1


@dataclass
class Match:
    """What is gathered of one site: moments before and after, and how both go together.

    Args:
        norm: the norm of the converted model.
        state: that of the original.
        groups: the numbers of groups that are tried.
    """

    norm: nn.GroupNorm
    state: NormState
    groups: tuple[int, ...]
    samples: int = 0
    wanted: Moments | None = None
    found: dict[int, Moments] = field(default_factory=dict)
    together: dict[int, Tensor] = field(default_factory=dict)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take in one batch.

        Args:
            before: input of the original norm, (N, C, *).
            after: input of the new one.
        """
        self.samples += before.shape[0]
        target = apply_affine(before.double(), self.state.affine)
        self.wanted = _plus(self.wanted, moments_of(target))
        for groups in self.groups:
            ours = F.group_norm(after.double(), groups, eps=self.norm.eps)
            self.found[groups] = _plus(self.found.get(groups), moments_of(ours))
            product = (ours * target).transpose(0, 1).flatten(1).sum(1)
            self.together[groups] = self.together.get(groups, torch.zeros_like(product)) + product

    def put_together(self) -> None:
        """Add what other processes gathered of the site, on all of them."""
        parts = of_all_ranks((self.samples, self.wanted, self.found, self.together))
        self.samples, self.wanted, self.found, self.together = 0, None, {}, {}
        for samples, wanted, found, together in parts:
            self.samples += samples
            if wanted is not None:
                self.wanted = _plus(self.wanted, wanted)
            for groups, moments in found.items():
                self.found[groups] = _plus(self.found.get(groups), moments)
                product = together[groups]
                self.together[groups] = (
                    self.together.get(groups, torch.zeros_like(product)) + product
                )

    def error(self, groups: int) -> float:
        """Return the mean squared error of the output, relative, once the moments match."""
        wanted, found = self.wanted, self.found[groups]
        assert wanted is not None
        slope = _slope(wanted.std, found.std)
        covariance = self.together[groups] / found.number - wanted.mean * found.mean
        sign = self.norm.weight.detach().double().sign()
        error = wanted.std**2 + (slope * found.std) ** 2 - 2 * slope * sign * covariance
        scale = (wanted.std**2 + wanted.mean**2).sum().clamp_min(1e-30)
        return float(error.clamp_min(0).sum() / scale)


def match_(match: Match) -> tuple[int, dict[int, float]]:
    """Choose the number of groups and set γ and β, in place; return it and the error of each tried.

    γ' = ±s_t / s, β' = m_t − γ' m, where s_t and m_t are the moments of the original's output on the
    same data, s and m those of the normalized activation. With few samples both stay nearer to what
    they were: shrinkage 16 / (16 + samples).

    Source: Jordan et al. 2023 (REPAIR), section 3; the shrinkage is of Stein's kind.
    """
    errors = {groups: match.error(groups) for groups in match.groups}
    best = min(errors, key=errors.__getitem__)
    norm, wanted, found = match.norm, match.wanted, match.found[best]
    assert wanted is not None
    keep = _PRIOR / (_PRIOR + match.samples)
    with torch.no_grad():
        old_scale, old_shift = norm.weight.double(), norm.bias.double()
        ours = old_scale.abs() * found.std
        slope = _slope(wanted.std, ours) ** (1 - keep)
        scale = old_scale * slope
        centred = wanted.mean - scale * found.mean
        shift = (1 - keep) * centred + keep * old_shift
        norm.num_groups = best
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
    return best, errors


def _slope(wanted: Tensor, found: Tensor) -> Tensor:
    """Wanted / found; 1 where the channel is dead on either side."""
    alive = (found > _DEAD) & (wanted > _DEAD)
    return torch.where(alive, wanted / found.clamp_min(_DEAD), torch.ones_like(found))


def candidates(norm: nn.GroupNorm, search: bool) -> tuple[int, ...]:
    """Return the numbers of groups to try: its own, and with `search` 1, and 32 and 16 channels each.

    >>> candidates(nn.GroupNorm(2, 64), search=True)
    (2, 1, 4)
    """
    own, channels = norm.num_groups, norm.num_channels
    if not search:
        return (own,)
    more = (1, *(channels // size for size in (32, 16) if channels % size == 0))
    return tuple(dict.fromkeys((own, *more)))


def _plus(one: Moments | None, other: Moments) -> Moments:
    return other if one is None else one + other
