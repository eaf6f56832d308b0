"""Plain weights in the form in which a class keeps them: back into the g and v of its weight norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from normconv.errors import LoadError, Problem
from normconv.numerics import RowLayout, split_weight

__all__ = ["refill_weight_norms_"]


def refill_weight_norms_(model: nn.Module, folded: nn.Module) -> int:
    """Set every weight norm of a model from the plain weights of a folded one: v = w and g = ‖w‖.

    A row of zeros gets g = 0 and a v of length 1, for which torch's weight norm is finite. All other
    tensors stay.

    Args:
        model: with torch's weight norms, in either form; changed.
        folded: the same architecture with plain weights.

    Returns:
        How many weights were split.

    Raises:
        LoadError: the folded model lacks such a weight.
    """
    plain = folded.state_dict()
    split = 0
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for tensor_name, g, v, dim in _weight_norms(module):
                name = f"{prefix}.{tensor_name}" if prefix else tensor_name
                if name not in plain:
                    raise LoadError(Problem(name, "the folded model has no such weight"))
                gain, direction = _split(plain[name], dim)
                g.copy_(gain.reshape(g.shape))
                v.copy_(direction)
                split += 1
    return split


def _weight_norms(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, int | None]]:
    """Yield tensor name, g, v and dim of each of torch's weight norms, in both of its forms."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            g, v = getattr(module, f"{hook.name}_g"), getattr(module, f"{hook.name}_v")
            yield hook.name, g, v, hook.dim
    chains: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    for name, chain in chains.items():
        if len(chain) == 1 and isinstance(chain[0], _WeightNorm):
            yield name, chain.original0, chain.original1, chain[0].dim


def _split(weight: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """Split along torch's `dim`: the axis that is not summed over, None or -1 for none."""
    if dim is None or dim == -1:
        g, v = split_weight(weight.reshape(1, -1), None, RowLayout())
        return g, v.reshape(weight.shape)
    rows = weight.movedim(dim, 0)
    g, v = split_weight(rows.reshape(rows.shape[0], -1), None, RowLayout())
    return g, v.reshape(rows.shape).movedim(0, dim)
