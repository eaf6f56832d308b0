"""The classes that random networks are made of, by short names."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

__all__ = ["KINDS", "NORMS", "OPERATORS"]


class AnyRankNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm that takes any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class NormAct(AnyRankNorm):
    """A BatchNorm with dropout and activation inside, as timm has it, for any rank."""

    def __init__(self, channels: int, act: str = "relu", p: float = 0.0) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(p), KINDS[act]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class OwnForwardNorm(AnyRankNorm):
    """A forward of its own, and yet the affine map."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        assert self.running_mean is not None
        assert self.running_var is not None
        y = (x - self.running_mean.view(shape)) / (self.running_var + self.eps).sqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape)


class OddNorm(AnyRankNorm):
    """A forward of its own, and not the affine map: no target may take it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.sin()


class FrozenNorm(nn.Module):
    """A frozen BatchNorm: four buffers, any rank."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            fill = torch.ones if name in ("weight", "running_var") else torch.zeros
            self.register_buffer(name, fill(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * scale.reshape(shape) + shift.reshape(shape)


class FunctionalNorm(nn.Module):
    """`F.batch_norm` over tensors under other names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)
        self.beta = nn.Parameter(torch.randn(channels) * 0.2)
        self.register_buffer("mean", torch.randn(channels) * 0.3)
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, False, 0.1, 1e-3)


OPERATORS: dict[str, Any] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
NORMS: dict[str, Any] = {
    "bn1d": nn.BatchNorm1d,
    "bn2d": nn.BatchNorm2d,
    "bn3d": nn.BatchNorm3d,
    "sync": nn.SyncBatchNorm,
    "in1d": nn.InstanceNorm1d,
    "in2d": nn.InstanceNorm2d,
    "in3d": nn.InstanceNorm3d,
    "norm act": NormAct,
    "timm act": timm.layers.BatchNormAct2d,
    "own forward": OwnForwardNorm,
    "frozen": FrozenNorm,
    "torchvision frozen": torchvision.ops.FrozenBatchNorm2d,
    "odd": OddNorm,
    "functional": FunctionalNorm,
}
KINDS: dict[str, Any] = {
    **OPERATORS,
    **NORMS,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "leaky": nn.LeakyReLU,
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "group norm": nn.GroupNorm,
    "flatten": nn.Flatten,
    "upsample": nn.Upsample,
    "max1d": nn.MaxPool1d,
    "max2d": nn.MaxPool2d,
    "max3d": nn.MaxPool3d,
    "avg1d": nn.AvgPool1d,
    "avg2d": nn.AvgPool2d,
    "avg3d": nn.AvgPool3d,
}
