"""Small networks, one per way an export can go wrong."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions around a skip connection, one of them grouped."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm if norm is not None else nn.Identity()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = self.up(h + self.grouped(h))
        return self.head(h.mean(dim=(2, 3)))


class Tokens(nn.Module):
    """A linear layer on (N, T, C): the exporter writes a MatMul with a transposed weight."""

    def __init__(self, width: int = 300) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.second = nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(tokens)))


class TwoInputs(nn.Module):
    """Two inputs, a keyword input, a nested output with None and a number in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 7)

    def forward(self, image: Tensor, scale: Tensor, *, shift: Tensor | None = None) -> dict:
        h = self.conv(image) * scale[:, None, None, None]
        if shift is not None:
            h = h + shift[:, :, None, None]
        return {"logits": self.head(h.mean((2, 3))), "aux": [h, None], "count": 3}


@dataclasses.dataclass
class Pair:
    mean: Tensor
    spread: Tensor


class DataclassOut(nn.Module):
    """A dataclass that torch.export has never heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Pair:
        h = self.linear(x)
        return Pair(h, h.square())


class FixedBatch(nn.Module):
    """Cannot be captured with a free batch: the loop depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 4:
            raise ValueError("only four samples at a time")
        return self.linear(x)


class MixesSamples(nn.Module):
    """A sample's output depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(dim=0, keepdim=True) + 1.0)


def quiet_weight_norm(layer: nn.Module) -> nn.Module:
    """Torch's own weight norm, not folded."""
    return torch.nn.utils.parametrizations.weight_norm(layer)
