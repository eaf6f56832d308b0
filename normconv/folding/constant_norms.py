"""Norms that look at each sample: which they are, what they compute, and constants in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normconv.errors import PlanError, Problem
from normconv.graph import Names, is_norm, norm_names, trailing_of
from normconv.graph.rewrite import replace_norm_
from normconv.layers import ConstantNorm
from normconv.numerics import relative_l2

__all__ = ["is_sampled", "normalized", "put_constant_norms_", "sampled_norms"]

_BOUND = 1e-5  # rel-L2: a class may compute in float32 inside; another map is off by far more


def is_sampled(module: nn.Module) -> bool:
    """Say whether a norm takes its statistics from each sample, over groups of channels of axis 1.

    >>> [is_sampled(m) for m in (nn.GroupNorm(1, 4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4))]
    [True, True, False]
    """
    if isinstance(module, _InstanceNorm):
        return not is_norm(module)
    return isinstance(module, nn.GroupNorm)


def sampled_norms(model: nn.Module) -> list[str]:
    """Return the names of the norms that can be frozen.

    Raises:
        PlanError: some class computes something else than its base class; names each.

    >>> sampled_norms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)))
    ['1']
    """
    names = norm_names(model, is_sampled)
    problems = [
        Problem(name, why, "replace it by its base class, or leave the norms as they are")
        for name in names
        if (why := _why_not(model.get_submodule(name)))
    ]
    if problems:
        raise PlanError(problems)
    return names


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """Return what the norm itself makes of (N, C, *), in float64, without what its class does after."""
    any_norm: Any = norm
    groups = any_norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
    weight, bias = (None if t is None else t.double() for t in (any_norm.weight, any_norm.bias))
    return F.group_norm(x.double(), groups, weight, bias, float(any_norm.eps))


@torch.no_grad()
def _why_not(norm: nn.Module) -> str:
    """Say how the norm differs from its base class followed by its children; empty where it does not."""
    if isinstance(norm, _InstanceNorm) and norm.num_features == 0:
        return "it is lazy and has no parameters yet"
    twin: Any = copy.deepcopy(norm).to(device="cpu", dtype=torch.float64).eval()
    channels = twin.num_channels if isinstance(twin, nn.GroupNorm) else twin.num_features
    rng = torch.Generator().manual_seed(0)
    axes = twin._get_no_batch_dim() - 1 if isinstance(twin, _InstanceNorm) else 2
    x = torch.randn(2, channels, *(3,) * axes, generator=rng, dtype=torch.float64)
    try:
        expected = normalized(twin, x)
        for child in trailing_of(twin).values():
            expected = child(expected)
        off = relative_l2(twin(x.clone()), expected)
    except Exception as reason:  # the class is the user's: whatever it raises is the answer
        return f"its forward could not be probed ({type(reason).__name__}: {reason})"
    return "" if off <= _BOUND else f"its forward differs from its base class's by {off:.1e}"


def put_constant_norms_(model: nn.Module, names: Iterable[str]) -> None:
    """Put a `ConstantNorm` with γ and β of the norm, μ = 0 and σ² = 1 into each slot, in place."""
    known = Names(model)
    for name in names:
        was: Any = model.get_submodule(name)
        channels = was.num_channels if isinstance(was, nn.GroupNorm) else was.num_features
        like = next((t for t in (was.weight, *model.parameters()) if t is not None), None)
        place: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
        made = ConstantNorm(channels, eps=was.eps, **place)
        with torch.no_grad():
            for mine, theirs in ((made.weight, was.weight), (made.bias, was.bias)):
                if theirs is not None:
                    mine.copy_(theirs)
                    mine.requires_grad_(theirs.requires_grad)
        replace_norm_(model, (name, *known.aliases(name)), made, None)
