"""What the zoos' models are called with: random numbers that survive depth and pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["SAMPLES", "Call", "Make", "picture"]

SAMPLES = 4
"""How many samples set the statistics; a smaller batch is made of the first of them."""


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Make = Callable[[int], Call]
"""From a batch size to inputs."""


def picture(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normal numbers at every scale, always the same ones.

    White noise averages out: deep layers see the same from every sample, and statistics with hardly any
    variance amplify rounding. Coarse noise differs from sample to sample however far it is pooled.

    Args:
        shape: batch of at most `SAMPLES`, channels and at least one spatial axis.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    outer, sizes = (SAMPLES, shape[1]), shape[2:]
    total, octaves, cells = torch.zeros(*outer, *sizes), 0, 1
    while cells <= max(sizes):
        grid = [min(cells, size) for size in sizes]
        noise = torch.randn((*outer, *grid), generator=generator)
        for axis, (size, coarse) in enumerate(zip(sizes, grid, strict=True), start=2):
            noise = noise.index_select(axis, torch.arange(size) * coarse // size)
        total += noise
        cells, octaves = 2 * cells, octaves + 1
    numbers: Tensor = total[: shape[0]] / octaves**0.5
    return numbers
