"""The patches of an input that the filters of a linear operator are multiplied by."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["can_refit", "filters_of", "patches_of", "weight_of"]

_LARGEST = 8192  # elements of a filter: its covariance then takes 512 MiB
_DIRECT = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# A forward of the user's may see other patches: one that pads by itself, or scales.
_KNOWN = tuple(kind.forward for kind in (nn.Linear, *_DIRECT, *_TRANSPOSED))


def can_refit(layer: nn.Module) -> bool:
    """Say whether the layer's patches are known: Linear and convolutions with their own forward.

    >>> can_refit(nn.Conv2d(4, 4, 3)), can_refit(nn.Conv2d(4, 4, 1, groups=4))
    (True, False)
    """
    weight = layer._parameters.get("weight", layer._parameters.get("weight_v"))
    if weight is None or not isinstance(layer, (nn.Linear, *_DIRECT, *_TRANSPOSED)):
        return False
    known = "forward" not in vars(layer) and type(layer).forward in _KNOWN
    return known and 1 < filters_of(layer, weight).shape[2] <= _LARGEST


def filters_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as (groups, O / groups, n): each filter as a row of the group's patches.

    >>> filters_of(nn.ConvTranspose1d(4, 6, 3, groups=2), torch.empty(4, 3, 3)).shape
    torch.Size([2, 3, 6])
    """
    groups = _groups(layer)
    split: Tensor = weight.unflatten(0, (groups, -1))
    return (split.transpose(1, 2) if isinstance(layer, _TRANSPOSED) else split).flatten(2)


def weight_of(layer: nn.Module, filters: Tensor, like: Tensor) -> Tensor:
    """Return what `filters_of` takes apart, in the shape of a weight."""
    if isinstance(layer, _TRANSPOSED):
        split: Tensor = filters.unflatten(2, (-1, *like.shape[2:]))
        return split.transpose(1, 2).reshape(like.shape)
    return filters.reshape(like.shape)


def patches_of(layer: nn.Module, x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Draw patches of an input, (groups, rows, n), and say which of the outputs (N, *places) they make.

    Args:
        layer: see `can_refit`.
        x: its input.
        most: rows at most, drawn at random with a fixed seed: every k-th would be of a few columns of
            an image, which are not like the others.
    """
    every = _unfolded(layer, x)
    kernel = 1 if isinstance(layer, nn.Linear) else every.dim() // 2
    places = every.shape[: every.dim() - kernel]
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randperm(math.prod(places), generator=rng)[:most].to(x.device)
    drawn = every[torch.unravel_index(chosen, places)]
    patches = drawn.flatten(1).unflatten(1, (_groups(layer), -1))
    return patches.transpose(0, 1), chosen


def _groups(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Linear) else int(layer.groups)  # type: ignore[arg-type]


def _unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """A view of the padded input as (N, *places, C, *kernel); of a Linear (N, *places, C)."""
    if isinstance(layer, nn.Linear):
        return x
    if isinstance(layer, _TRANSPOSED):
        x, stride = _spread(layer, x), (1,) * len(layer.kernel_size)
    else:
        assert isinstance(layer, _DIRECT)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, stride = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), layer.stride
    dims = len(layer.kernel_size)
    for axis, (size, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        x = x.unfold(axis + 2, dilation * (size - 1) + 1, stride[axis])[..., ::dilation]
    if isinstance(layer, _TRANSPOSED):
        x = x.flip([*range(2 + dims, 2 + 2 * dims)])
    return x.movedim(1, 1 + dims)


def _spread(layer: nn.Module, x: Tensor) -> Tensor:
    """The input with the stride's zeros between its values, padded: a convolution makes the rest."""
    assert isinstance(layer, _TRANSPOSED)
    stride, sizes = layer.stride, x.shape[2:]
    spread = x.new_zeros(
        *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(sizes, stride, strict=True))
    )
    every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    spread[every] = x
    padding: list[int] = []
    for axis in reversed(range(len(stride))):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - int(layer.padding[axis])
        padding += [reach, reach + layer.output_padding[axis]]
    return F.pad(spread, padding)
