"""Opacus refuses what lets samples see each other, and takes what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normconv as nc
from normconv.layers import MeanOnlyBatchNorm, weight_norm_
from normconv.privacy import register_grad_samplers

opacus = pytest.importorskip("opacus")
validators = pytest.importorskip("opacus.validators")


pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")


class Subclass(nn.BatchNorm2d):
    """As timm's BatchNormAct2d is one."""


@pytest.fixture(autouse=True)
def registered() -> None:
    register_grad_samplers()


@pytest.mark.parametrize("norm", [MeanOnlyBatchNorm(4), Subclass(4), nn.BatchNorm2d(4)])
def test_norms_over_the_batch_are_refused_by_every_door(norm: nn.Module) -> None:
    model = nn.Sequential(weight_norm_(nn.Conv2d(3, 4, 3)), norm)
    assert not validators.ModuleValidator.is_valid(model)
    with pytest.raises(NotImplementedError, match=type(norm).__name__):
        opacus.GradSampleModule(model)
    with pytest.raises(validators.errors.UnsupportedModuleError):
        opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(4, 3, 8, 8)), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


@pytest.mark.parametrize("norm", [MeanOnlyBatchNorm(4), Subclass(4)])
def test_the_refusal_names_layer_reason_and_way_out(norm: nn.Module) -> None:
    (error,) = validators.ModuleValidator.validate(nn.Sequential(norm))
    assert str(error).startswith(f"{norm}: ")
    assert "samples see each other; convert the BatchNorm model with to='wn'" in str(error)


def test_what_opacus_says_of_its_own_classes_stays() -> None:
    (error,) = validators.ModuleValidator.validate(nn.Sequential(nn.BatchNorm2d(4)))
    assert str(error).startswith("BatchNorm cannot support training with differential privacy")
    assert validators.ModuleValidator.is_valid(nn.Sequential(nn.InstanceNorm2d(4, affine=True)))


def test_the_audit_finds_what_opacus_does_not_look_at() -> None:
    """It looks at layers with trained parameters, and only at their class."""

    class Centred(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y - y.mean(0)

    frozen = MeanOnlyBatchNorm(4)
    frozen.bias.requires_grad_(False)
    for module in (frozen, nn.BatchNorm2d(4, affine=False), Centred(4, 4, 1)):
        model = nn.Sequential(weight_norm_(nn.Conv2d(3, 4, 3)), module)
        assert validators.ModuleValidator.is_valid(model)
        report = nc.audit(model, (torch.randn(5, 3, 8, 8),))
        assert not report.passed
        assert {row.site for row in report.sites} == {"1"}


def test_norms_that_no_sample_sees_others_through_are_taken() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    model = nn.Sequential(weight_norm_(nn.Conv2d(3, 4, 3)), nn.GroupNorm(2, 4), Alone())
    assert validators.ModuleValidator.is_valid(model)
