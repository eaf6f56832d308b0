"""Example inputs: as given, as configured, as inferred; each verdict is run for real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from normconv.errors import LoadError, UsageError
from normconv.sources import example_inputs


def lenet(channels: int = 1, width: int = 256) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


def torchvision_model(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None)


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


@pytest.mark.parametrize(
    ("make", "shape", "origin"),
    [
        (lambda: torchvision_model("resnet18"), (2, 3, 224, 224), "first layer, a Conv2d"),
        (lambda: torchvision_model("mobilenet_v3_small"), (2, 3, 224, 224), "first layer"),
        (lambda: timm_model("resnet18"), (2, 3, 224, 224), "the model's pretrained_cfg"),
        (lambda: nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3)), (2, 7), "a Linear"),
        (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), (2, 4, 1024), "a Conv1d"),
        (lambda: lenet(), (2, 1, 28, 28), "a Conv2d"),
        (lambda: lenet(3, 400), (2, 3, 32, 32), "a Conv2d"),
        (lambda: nn.Sequential(nn.BatchNorm2d(5)), (2, 5, 224, 224), "a BatchNorm2d"),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 3)).half(), (2, 1, 16, 16, 16), "a Conv3d"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(4), nn.Flatten(),
                               nn.Linear(4 * 13 * 13, 2)), (2, 3, 52, 52), "a Conv2d"),
    ],
)  # fmt: skip
def test_inputs_are_found_and_run(make, shape: tuple[int, ...], origin: str) -> None:
    model = make()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = example_inputs(model)
    assert given.args[0].shape == shape
    assert given.args[0].dtype == next(model.parameters()).dtype
    assert origin in given.origin
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()(*given.args, **given.kwargs)


def test_transformers_models_are_asked() -> None:
    transformers = pytest.importorskip("transformers")
    text = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=50,
    )  # fmt: skip
    bert = transformers.BertModel(text).eval()
    given = example_inputs(bert)
    assert given.kwargs["input_ids"].shape == (2, 16)
    bert(**given.kwargs)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    given = example_inputs(transformers.ResNetForImageClassification(config))
    assert given.kwargs["pixel_values"].shape == (2, 3, 224, 224)


def test_what_the_forward_keeps_stays_out_of_the_model() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.last: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.fc(x)
            return self.last

    model = Keeps()
    example_inputs(model)
    assert model.last is None


def test_shapes_as_given_are_always_the_same_numbers() -> None:
    model = nn.Linear(3, 3).double()
    first, second = example_inputs(model, "2x3,4"), example_inputs(model, "2x3,4")
    assert [value.shape for value in first.args] == [(2, 3), (4,)]
    assert torch.equal(first.args[0], second.args[0])
    assert first.args[0].dtype == torch.float64
    assert first.args[0].std() > 0


@pytest.mark.parametrize("spec", ["2x0x3", "", "2xax3", "x", "-1x3", "99999999x99999999", "a.txt"])
def test_bad_shapes_are_usage_errors(spec: str) -> None:
    with pytest.raises(UsageError, match="--input"):
        example_inputs(nn.Linear(3, 3), spec)


def test_files_of_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x * mask

    torch.save((torch.ones(2), torch.zeros(2)), tmp_path / "t.pt")
    assert len(example_inputs(Two(), str(tmp_path / "t.pt")).args) == 2
    torch.save({"x": torch.ones(2), "mask": torch.zeros(2)}, tmp_path / "d.pt")
    assert set(example_inputs(Two(), str(tmp_path / "d.pt")).kwargs) == {"x", "mask"}
    np.savez(tmp_path / "n.npz", first=np.ones(2, "f4"), mask=np.zeros(2, "f4"))
    given = example_inputs(Two(), str(tmp_path / "n.npz"))
    assert len(given.args) == 1
    assert set(given.kwargs) == {"mask"}
    Two()(*given.args, **given.kwargs)
    with pytest.raises(UsageError, match="no such file"):
        example_inputs(Two(), str(tmp_path / "none.npz"))
    torch.save(3, tmp_path / "i.pt")
    with pytest.raises(LoadError, match="not a tensor"):
        example_inputs(Two(), str(tmp_path / "i.pt"))


def test_nothing_known_is_refused_with_the_way_out() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.fc(a) + b

    for model in (nn.ReLU(), Two()):
        with pytest.raises(LoadError, match="--input"):
            example_inputs(model, source="net.pt")


def test_noise_has_the_moments_that_images_have_for_the_model() -> None:
    """Trained with mean and deviation 0.5, a model sees photographs as -0.03 ± 0.45, not as 0 ± 1."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for given in (example_inputs(net), example_inputs(net, "2x3x64x64")):
        image = given.args[0]
        assert image.mean((0, 2, 3)).tolist() == pytest.approx([-0.03, -0.09, -0.19], abs=0.02)
        assert image.std((0, 2, 3)).tolist() == pytest.approx([0.458, 0.448, 0.45], rel=0.05)
    net.pretrained_cfg |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    plain = example_inputs(nn.Sequential(nn.Conv2d(3, 4, 3)), "2x3x64x64").args[0]
    assert torch.equal(example_inputs(net).args[0], plain)
