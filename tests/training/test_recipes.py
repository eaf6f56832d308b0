"""Every built-in recipe learns, under every normalization it compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.errors import UsageError
from normconv.sources.datasets import Labelled, Samples
from normconv.training import Budget, compare, recipe_of
from normconv.training.recipe import scaled_to_one
from normconv.training.recipes import RECIPES
from normconv.training.recipes.cifar_convpool_cnn_c import whitened
from normconv.training.recipes.conv_vae import binary, gaussian_divergence
from normconv.training.recipes.q_network import QLearning

CLASSES = 4


def patterns(count: int = 512, side: int = 12, channels: int = 1, seed: int = 0) -> Labelled:
    """Bytes: one coarse pattern a class, under noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(2, (CLASSES, channels, 4, 4), generator=rng).float()
    templates = F.interpolate(coarse, size=(side, side), mode="nearest")

    def some(number: int) -> Samples:
        labels = torch.randint(CLASSES, (number,), generator=rng)
        noise = 0.1 * torch.randn(number, channels, side, side, generator=rng)
        images = (templates[labels] + noise).clamp(0, 1) * 255
        return Samples(images.to(torch.uint8), labels)

    return Labelled(some(count), some(count // 4), CLASSES, "patterns")


IMAGES = {  # epochs, width, batch size
    "digits": (4, 0.5, 16),
    "tfa-tutorial": (5, 0.5, 16),
    "mnist-dense": (4, 0.25, 16),
    "fashion-microbatch": (3, 0.25, 16),
    "cifar-convpool-cnn-c": (7, 0.25, 16),
}


@pytest.mark.parametrize("name", IMAGES)
def test_classifiers_learn(name: str) -> None:
    epochs, width, batch_size = IMAGES[name]
    data = patterns(256, side=16 if name == "tfa-tutorial" else 12)
    recipe = replace(recipe_of(name), prepare=scaled_to_one)  # whitening takes more samples
    found = compare(recipe, budget=Budget(epochs, None, width, (batch_size,)), data=data, timing=0)
    for normalization in recipe.normalizations:
        rows = [row for row in found.rows if row["normalization"] == normalization]
        assert len(rows) == epochs
        assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"], (normalization, rows)
        assert rows[-1]["train_accuracy"] > 0.5, (normalization, rows)


@pytest.mark.parametrize(("name", "width"), [("conv-vae", 0.25), ("recurrent", 0.0625)])
def test_bounds_rise(name: str, width: float) -> None:
    data = patterns(256)
    found = compare(name, budget=Budget(7, None, width, (16,)), data=data, timing=0)
    for normalization in recipe_of(name).normalizations:
        rows = [row for row in found.rows if row["normalization"] == normalization]
        assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"], (normalization, rows)
        assert rows[-1]["test_loss"] < rows[0]["test_loss"]
        assert rows[-1]["test_kl"] > 0.5, "the latent variables say nothing of the image"


def test_the_q_network_learns_to_balance() -> None:
    pytest.importorskip("gymnasium")
    recipe = recipe_of("q-network")
    recipe = replace(
        recipe,
        optimizer=lambda parameters: torch.optim.Adamax(parameters, lr=5e-3),
        task=replace(recipe.task, exploring=800, renewal=100, episodes=2),
    )
    budget = Budget(2, 500, 0.5, (32,))
    found = compare(recipe, normalizations=("plain", "wn"), budget=budget, timing=0)
    for normalization in ("plain", "wn"):
        returns = [r["test_return"] for r in found.rows if r["normalization"] == normalization]
        assert len(returns) == 2
        assert max(returns) > 2 * 9.5, "a pole that is left alone falls after some 9.5 steps"


def test_the_names_are_those_of_the_recipes() -> None:
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    with pytest.raises(UsageError, match="did you mean tfa-tutorial"):
        recipe_of("tfa_tutorial")


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "q-network"])
def test_the_published_networks_take_their_data(name: str) -> None:
    """At full width the layers have the published sizes, and every plain one a bias."""
    shape = (3, 32, 32) if recipe_of(name).data == "cifar10" else (1, 28, 28)
    width = 1.0 if name not in ("conv-vae", "recurrent") else 0.25
    network = recipe_of(name).network(width, shape, 10)
    sizes = [
        tuple(layer.weight.shape)
        for layer in network.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    published = {
        "tfa-tutorial": [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)],
        "mnist-dense": [(128, 784), (10, 128)],
        "fashion-microbatch": [
            *((32, 1, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3)),
            *((512, 3136), (10, 512)),
        ],
        "cifar-convpool-cnn-c": [
            *((96, 3, 3, 3), (96, 96, 3, 3), (96, 96, 3, 3)),
            *((192, 96, 3, 3), (192, 192, 3, 3), (192, 192, 3, 3)),
            *((192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1), (10, 192)),
        ],
    }
    assert published.get(name, sizes) == sizes
    out = network.eval()(torch.zeros(2, *shape))
    assert (out if isinstance(out, Tensor) else out[0]).shape[0] == 2


def test_the_schedule_holds_then_falls_to_zero() -> None:
    recipe = recipe_of("cifar-convpool-cnn-c")
    optimizer = recipe.optimizer([nn.Parameter(torch.zeros(1))])
    seen = []
    for share in (0.0, 0.49, 0.75, 1.0):
        assert recipe.schedule is not None
        recipe.schedule(optimizer, share)
        (group,) = optimizer.param_groups
        seen.append((round(group["lr"], 6), group["betas"][0]))
    assert seen == [(0.001, 0.9), (0.001, 0.9), (0.0005, 0.5), (0.0, 0.5)]


def test_whitened_pixels_are_uncorrelated() -> None:
    data = whitened(patterns(2000, side=8))
    rows = data.train.inputs.flatten(1).double()
    assert rows.mean(0).abs().max() < 1e-4
    covariance = rows.T @ rows / len(rows)
    assert (covariance - torch.eye(64)).abs().max() < 0.02
    assert data.test.inputs.shape == (500, 1, 8, 8)


def test_binary_pixels_follow_their_grey_and_stay() -> None:
    data = patterns(400)
    made = binary(data)
    assert set(made.train.inputs.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(made.train.inputs, binary(data).train.inputs)
    shares = made.train.inputs.mean((0, 1)) - data.train.inputs.float().mean((0, 1)) / 255
    assert shares.abs().max() < 0.12


def test_the_divergence_is_that_of_the_distributions() -> None:
    mean, log_deviation = torch.randn(5, 3).double(), 0.3 * torch.randn(5, 3).double()
    ours = gaussian_divergence(mean, log_deviation)
    q = torch.distributions.Normal(mean, log_deviation.exp())
    p = torch.distributions.Normal(torch.zeros(5, 3).double(), torch.ones(5, 3).double())
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(q, p).sum(1))


def test_replay_remembers_the_latest() -> None:
    task = QLearning(capacity=3)
    memory: dict[str, object] = {"seen": 0}
    for number in range(5):
        task._remember(memory, (torch.full((4,), float(number)), number, 1.0, torch.ones(4), False))
    assert sorted(memory["actions"].tolist()) == [2.0, 3.0, 4.0]  # type: ignore[attr-defined]
    assert memory["seen"] == 5
