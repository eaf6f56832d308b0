"""The CIFAR ResNet-32 of He et al. 2015, with the pretrained weights and images in `shared/data`."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
_DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA = Path(os.environ.get("NORMCONV_DATA", _DEFAULT))
WEIGHTS = DATA / "resnet32-d509ac18.th"
TEST_IMAGES = DATA / "cifar10-jpeg-test.zip"


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *[self.padding] * 2))
        return F.relu(y + x)


class ResNet32(nn.Module):
    """Three stages of five blocks, 16, 32 and 64 channels, on 32x32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(width_in: int, width: int, stride: int) -> nn.Sequential:
        first = Block(width_in, width, stride)
        return nn.Sequential(first, *(Block(width, width, 1) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def images(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return test images (N, 3, 32, 32), normalised, and labels (N,); every k-th under a limit."""
    from PIL import Image

    with zipfile.ZipFile(TEST_IMAGES) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith((".jpg", ".jpeg", ".png")))
        classes = sorted({Path(name).parent.name for name in names})
        if limit is not None:
            names = names[:: max(1, len(names) // limit)]
        pixels = np.stack(
            [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names]
        )
    labels = torch.tensor([classes.index(Path(name).parent.name) for name in names])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN) / STD, labels
