"""A whole private step of converted library models: validated, made private, taken."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normconv as nc
from normconv.layers import Reparametrised
from normconv.privacy import register_grad_samplers, without_in_place
from tests.privacy.test_without_in_place import from_library, student

opacus = pytest.importorskip("opacus")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]


RESNETS = ["torchvision:resnet18", "timm:resnet18"]
OTHERS = [f"torchvision:{name}" for name in ("googlenet", "mobilenet_v3_small", "densenet121")]
CASES = [
    *itertools.product(RESNETS, ["gn", "wn"], ["hooks", "ghost"]),
    *((name, "gn", "hooks") for name in OTHERS),
]


@pytest.mark.parametrize(("name", "target", "mode"), CASES)
def test_a_step_of_a_converted_model(name: str, target: str, mode: str) -> None:
    torch.manual_seed(0)
    side = 32 if name in RESNETS else 64
    images, labels = torch.randn(4, 3, side, side), torch.arange(4)
    converted = student(from_library(name), images, target)
    model = without_in_place(converted, example_inputs=(images,)).model.train()
    assert any(isinstance(m, Reparametrised) for m in model.modules()) == (target == "wn")
    register_grad_samplers()
    assert opacus.validators.ModuleValidator.is_valid(model)
    before = copy.deepcopy(model.state_dict())
    watched, optimizer, *criterion, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    ((batch, wanted),) = loader
    (criterion[0] if criterion else nn.CrossEntropyLoss())(watched(batch), wanted).backward()
    optimizer.step()
    trained = watched.to_standard_module()
    for key, value in trained.state_dict().items():
        assert bool(torch.isfinite(value).all()), key
        assert not torch.equal(value, before[key]), key
    folded = nc.fold(trained.eval()).model
    assert not any(isinstance(m, Reparametrised) for m in folded.modules())
    torch.testing.assert_close(folded(images), trained(images), rtol=1e-3, atol=1e-3)
