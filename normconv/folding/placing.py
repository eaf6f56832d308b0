"""Putting a plain weight into the place of what it was computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normconv.layers import row_layouts

__all__ = ["Folded", "Left", "Made", "Outcome", "place_", "plain_weight", "rounded"]

#: Plain weights made so far, by the identities of what they were computed from.
Made = dict[tuple[int, ...], nn.Parameter]


class Folded(NamedTuple):
    """A tensor that became plain.

    Args:
        kind: how it was computed, as reports count it.
        reason: what is to be said about it; empty for nothing.
    """

    kind: str
    reason: str = ""


class Left(NamedTuple):
    """A tensor that is computed as before.

    Args:
        what: which, and why it was left.
        way_out: what the user can do.
    """

    what: str
    way_out: str = "take it off with the code that put it on, then fold"


Outcome = Folded | Left


@torch.no_grad()
def rounded(value: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Round a wide value once, into memory laid out as that of `like` where the shapes agree."""
    if value.shape == like.shape:
        return torch.empty_like(like, dtype=dtype).copy_(value)
    return value.to(device=like.device, dtype=dtype or like.dtype, copy=True)


def plain_weight(
    value: Tensor, sources: Sequence[Tensor], made: Made, *, trainable: bool
) -> nn.Parameter:
    """Return the parameter of a value; the same sources and the same value give the same parameter."""
    key = tuple(id(source) for source in sources)
    known = made.get(key)
    if known is not None and _same(known, value):
        return known
    parameter = nn.Parameter(value, requires_grad=trainable)
    return made.setdefault(key, parameter) if known is None else parameter


def _same(known: Tensor, value: Tensor) -> bool:
    if known.shape != value.shape or known.dtype != value.dtype:
        return False
    return value.is_meta or torch.equal(known, value)


def place_(module: nn.Module, old: Sequence[str], name: str, parameter: nn.Parameter) -> None:
    """Register a weight where a plain layer has it among its parameters, and drop what it came from."""
    for store in (module._parameters, module._buffers):
        for gone in (*old, name):
            store.pop(gone, None)
    module.__dict__.pop(name, None)  # what a hook put there: the value of the last forward
    have = {**module._parameters, name: parameter}
    usual = _order(module)
    first = [n for n in usual if n in have] if name in usual else [name]
    module._parameters.clear()
    module._parameters.update({n: have[n] for n in [*first, *(n for n in have if n not in first)]})


def _order(module: nn.Module) -> Sequence[str]:
    if isinstance(module, nn.RNNBase):
        names: list[str] = module._flat_weights_names
        return names
    return list(row_layouts(module))
