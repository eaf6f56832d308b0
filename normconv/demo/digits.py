"""A small residual BatchNorm network and scikit-learn's bundled digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.sources.datasets import digits

__all__ = ["Digits", "DigitsResNet", "accuracy", "load_digits", "train"]


class Digits(NamedTuple):
    """8x8 grey images as (N, 1, 8, 8) float32 in 0-1, and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """Load the 1,797 digits that scikit-learn brings: three quarters to train, one to test.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    split = len(labels) * 3 // 4
    return Digits(images[:split], labels[:split], images[split:], labels[split:])


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut.

    Args:
        width_in: channels of the input.
        width: channels of the output.
        stride: of the first convolution and the shortcut.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, H, W) to (N, width, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network for 8x8 digits: 79,000 weights, 9 norms, one of them without a producer.

    >>> DigitsResNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.layer1 = Block(16, 16, 1)
        self.layer2 = Block(16, 32, 2)
        self.layer3 = Block(32, 64, 2)
        self.head_norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, 10)."""
        x = F.relu(self.bn(self.stem(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.head(self.head_norm(x.mean((2, 3))))
        return logits


def train(
    model: nn.Module, data: Digits, *, epochs: int, step: Callable[[float], None], batch: int = 64
) -> None:
    """Train a classifier in place with SGD and a one-cycle schedule.

    Args:
        model: left in eval mode.
        data: the digits.
        epochs: passes over the training part.
        step: called after each step with the loss.
        batch: images a step.
    """
    generator = torch.Generator().manual_seed(0)
    steps = len(data.train_labels) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        for chosen in order[: steps * batch].split(batch):
            loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step(loss.item())
    model.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, 0-1."""
    return (logits.argmax(1) == labels).double().mean().item()
