"""ConvPool-CNN-C on whitened CIFAR-10: the table of the weight normalization paper.

Layers, noise, whitening, schedule and start are those of the authors' code (openai/weightnorm, lasagne).
One thing differs: its plain network trains W / g with g frozen, `plain+init` trains W.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from normconv.sources.datasets import Labelled, Samples
from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes.parts import GaussianNoise, normal_, scaled

__all__ = ["RECIPE", "whitened"]

_RATE = 1e-3
_EPS = 1e-4  # the authors divide by √(v + 1e-8): the same far above and far below this
_RIDGE = 1e-5


def network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Nine convolutions, the mean over pixels, a linear layer; a norm on each of the ten."""
    one, two = scaled(96, width), scaled(192, width)

    def conv(before: int, after: int, size: int, padding: int = 0) -> list[nn.Module]:
        layer = nn.Conv2d(before, after, size, padding=padding)
        return [layer, nn.BatchNorm2d(after, 1e-6), nn.LeakyReLU(0.1)]

    return normal_(
        nn.Sequential(
            GaussianNoise(0.15),
            *(*conv(shape[0], one, 3, 1), *conv(one, one, 3, 1), *conv(one, one, 3, 1)),
            *(nn.MaxPool2d(2), nn.Dropout(0.5)),
            *(*conv(one, two, 3, 1), *conv(two, two, 3, 1), *conv(two, two, 3, 1)),
            *(nn.MaxPool2d(2), nn.Dropout(0.5)),
            *(*conv(two, two, 3), *conv(two, two, 1), *conv(two, two, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(two, classes), nn.BatchNorm1d(classes, 1e-6)),
        )
    )


def whitened(data: Labelled) -> Labelled:
    """Decorrelate pixels: ZCA, fitted to the training part of bytes scaled to (x − 127.5) / 128.

    x ← (x − mean) U (Λ + 1e-5)^(−1/2) Uᵀ with the eigenvectors U and eigenvalues Λ of the covariance,
    which is taken in float64.

    Source: Krizhevsky 2009, appendix A; scale and ridge as in the authors' code.
    """
    parts = [
        part._replace(inputs=(part.inputs.float() - 127.5) / 128)
        if part.inputs.dtype == torch.uint8
        else part
        for part in (data.train, data.test)
    ]
    mean, covariance = _moments(parts[0].inputs.flatten(1))
    values, vectors = torch.linalg.eigh(covariance)
    matrix = ((vectors * (values.clamp_min(0) + _RIDGE).rsqrt()) @ vectors.T).float()

    def through(part: Samples) -> Samples:
        rows = [(rows - mean) @ matrix for rows in part.inputs.flatten(1).split(4096)]
        return part._replace(inputs=torch.cat(rows).view_as(part.inputs))

    return Labelled(through(parts[0]), through(parts[1]), data.classes, f"{data.origin}, whitened")


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, float32, and covariance, float64, of (N, D), a few rows at a time."""
    mean = rows.double().mean(0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for some in rows.split(4096):
        centred = some.double() - mean
        covariance.addmm_(centred.T, centred)
    return mean.float(), covariance / len(rows)


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=_RATE, betas=(0.9, 0.999), eps=_EPS)


def _schedule(optimizer: Optimizer, share: float) -> None:
    """Hold the learning rate for half of the training, then lower it to 0, with β1 = 0.5."""
    for group in optimizer.param_groups:
        group["lr"] = _RATE * min(1.0, 2 * (1 - share))
        group["betas"] = (0.9 if share < 0.5 else 0.5, 0.999)


RECIPE = Recipe(
    name="cifar-convpool-cnn-c",
    reproduces=(
        "Plain, batch norm, weight norm, and weight norm with mean-only batch norm on ConvPool-CNN-C, "
        "CIFAR-10 without augmentation: Salimans & Kingma 2016, section 5.1, table 1."
    ),
    network=network,
    optimizer=_adam,
    schedule=_schedule,
    small=Budget(8, 10_000, 0.125, (100,)),
    full=Budget(200, None, 1.0, (100,)),
    normalizations=("plain+init", "bn", "wn+init", "wn+mobn+init"),
    data="cifar10",
    prepare=whitened,
    whole=True,
)
