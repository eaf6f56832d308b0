"""Which tensors are under torch's own weight norm, in both of its forms."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["hooked_names", "parametrized_names"]


def hooked_names(module: nn.Module) -> tuple[str, ...]:
    """Return the tensors under `torch.nn.utils.weight_norm` (a forward pre-hook)."""
    return tuple(h.name for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm))


def parametrized_names(module: nn.Module) -> tuple[str, ...]:
    """Return the tensors under `torch.nn.utils.parametrizations.weight_norm` and nothing else."""
    if not parametrize.is_parametrized(module):
        return ()
    lists: Any = module.parametrizations
    return tuple(
        n for n, chain in lists.items() if len(chain) == 1 and isinstance(chain[0], _WeightNorm)
    )
