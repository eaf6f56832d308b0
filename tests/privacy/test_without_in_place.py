"""Models whose code writes into activations train under Opacus once they have copies to write into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconv as nc
from normconv.errors import CaptureError
from normconv.layers import Cloned
from normconv.privacy import register_grad_samplers, without_in_place
from tests.test_contract import assert_same_state, assert_unchanged, snapshot


class Writes(nn.Module):
    """Adds a shortcut in place, and applies two activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        z = self.bn2(self.conv2(y))
        z += y
        return self.head(F.relu(z, True).mean((2, 3)))


IMAGES = torch.randn(4, 3, 8, 8)


def student(model: nn.Module, images: Tensor = IMAGES, target: str = "gn") -> nn.Module:
    model(images)
    return nc.convert(model.eval(), target, example_inputs=(images,)).model


@pytest.mark.parametrize("target", ["gn", "gn+ws", "wn"])
def test_copies_are_put_in_and_taken_out(target: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = student(Writes(), target=target)
    before = snapshot(model)
    result = without_in_place(model, example_inputs=(IMAGES,))
    assert_unchanged(before, model)
    assert result.report.passed
    # Of `wn` the layers are convolutions: its norms are gone.
    wanted = ["conv2"] if target == "wn" else ["bn2"]
    assert result.report.facts["layers with a copy after them"] == wanted
    assert result.report.facts["flags set to False"] == ["act"]
    assert isinstance(result.model.get_submodule(wanted[0]), Cloned)
    folded = nc.fold(result.model).model
    assert not any(isinstance(module, Cloned) for module in folded.modules())
    assert torch.allclose(folded(IMAGES), model(IMAGES), atol=1e-5)
    for name in ("m.safetensors", "m.pt"):
        nc.save(result.model, tmp_path / name)
    assert_same_state(nc.load(tmp_path / "m.safetensors", model=Writes), result.model)


def test_an_exported_file_knows_nothing_of_the_copies(tmp_path: Any) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    plain = student(Writes())
    ready = without_in_place(plain, example_inputs=(IMAGES,)).model
    assert any(isinstance(module, Cloned) for module in ready.modules())
    kinds, names = [], []
    for model, path in ((plain, tmp_path / "plain.onnx"), (ready, tmp_path / "ready.onnx")):
        nc.export_onnx(model, path, example_inputs=(IMAGES,))
        graph = onnx.load(path).graph
        kinds.append(sorted(node.op_type for node in graph.node))
        names.append({tensor.name for tensor in graph.initializer})
        session = runtime.InferenceSession(str(path))
        (got,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), plain(IMAGES), rtol=1e-4, atol=1e-5)
    assert kinds[0] == kinds[1]
    assert names[0] == names[1]


def test_the_probe_sees_each_kind_and_nothing_else() -> None:
    clean = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    facts = without_in_place(clean, example_inputs=(IMAGES,)).report.facts
    assert facts == {"flags set to False": [], "layers with a copy after them": []}

    class OnlyInTraining(Writes):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.mul_(2) if self.training else y

    facts = without_in_place(OnlyInTraining(), example_inputs=(IMAGES,)).report.facts
    assert facts["layers with a copy after them"] == ["conv"]
    with pytest.raises(CaptureError):
        without_in_place(Writes(), example_inputs=(IMAGES[:, :2],))


def per_sample_gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """One sample at a time."""
    rows = []
    for image in images:
        model.zero_grad()
        first(model(image[None])).square().sum().backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def from_library(name: str) -> nn.Module:
    library, _, name = name.partition(":")
    if library == "timm":
        return pytest.importorskip("timm").create_model(name, num_classes=5)
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None, num_classes=5, **more)


NAMES = [
    "torchvision:resnet18",
    "timm:resnet18",
    "torchvision:googlenet",
    "torchvision:mobilenet_v3_small",
    "torchvision:densenet121",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients_are_those_of_one_sample_at_a_time(name: str) -> None:
    opacus = pytest.importorskip("opacus")
    from opacus.validators import ModuleValidator

    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    model = from_library(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ready = (
        without_in_place(student(model, images), example_inputs=(images,)).model.double().train()
    )
    images = images.double()
    assert ModuleValidator.is_valid(ready)
    wanted = per_sample_gradients(ready, images)
    register_grad_samplers()
    sampled = opacus.GradSampleModule(ready, loss_reduction="sum")
    sampled.zero_grad()
    first(sampled(images)).square().sum().backward()
    for parameter_name, parameter in ready.named_parameters():
        if parameter_name in wanted:
            got, reference = parameter.grad_sample, wanted[parameter_name]
            assert (got - reference).norm() <= 1e-5 * reference.norm() + 1e-12, parameter_name
