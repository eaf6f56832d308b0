"""The main job on real networks: pretrained ResNet-32, and architectures people run."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import normconv as nc
from benchmarks.main_job import MODELS
from normconv.deploy import Session
from normconv.graph import is_norm
from normconv.proof import blind_sites, randomise_norms_
from tests.networks import resnet32

needs_data = pytest.mark.skipif(
    not resnet32.WEIGHTS.exists(), reason=f"no pretrained weights at {resnet32.WEIGHTS.name}"
)


def right(logits: torch.Tensor, labels: torch.Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


@needs_data
def test_pretrained_resnet32_keeps_every_prediction(tmp_path: Path) -> None:
    model = nc.load(resnet32.WEIGHTS, model=resnet32.ResNet32).eval()
    images, labels = resnet32.images(limit=1000)
    converted, report = nc.convert(model, "wn", example_inputs=(images[:8],))
    assert report.passed
    assert not any(is_norm(module) for module in converted.modules())
    folded, _ = nc.fold(converted)
    nc.export_onnx(converted, tmp_path / "r32.onnx", example_inputs=(images[:8],))
    session = Session(tmp_path / "r32.onnx")
    with torch.no_grad():
        reference = model.double()(images.double())
        model.float()
        outputs = [model(images), converted(images), folded(images)]
    outputs.append(torch.from_numpy(session.run({"x": images})["output"]))
    assert 0.78 < right(reference, labels) / len(labels) < 0.88  # the weights are the trained ones
    top = reference.topk(2, dim=1).values
    for logits in outputs:
        error = (logits.double() - reference).abs().max()
        changed = logits.argmax(1) != reference.argmax(1)
        assert bool(((top[:, 0] - top[:, 1])[changed] <= 2 * error).all())
        assert right(logits, labels) == right(reference, labels)


FAST = ("torchvision:resnet18", "torchvision:mobilenet_v3_large", "timm:tf_efficientnet_b0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=() if s in FAST else pytest.mark.zoo) for s in MODELS]
)
def test_architectures_convert_and_export(spec: str, tmp_path: Path) -> None:
    model = nc.load(spec, random_weights=True).eval()
    x = torch.randn(2, 3, 96, 96)
    randomise_norms_(model, (torch.randn(4, 3, 96, 96),))
    for target in ("wn", "plain", "frozen"):
        converted, report = nc.convert(model, target, example_inputs=(x,))
        assert report.passed
        assert not any(is_norm(module) for module in converted.modules())
        assert type(converted) is type(model)
        wide, wide_report = nc.convert(model.double(), target, example_inputs=(x.double(),))
        assert wide_report.passed
        model.float()
        del wide
    exported = nc.export_onnx(
        nc.convert(model, "wn", example_inputs=(x,)).model, tmp_path / "m.onnx", example_inputs=(x,)
    )
    assert exported.facts["norm_nodes"] == 0


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    model = nc.load("torchvision:resnet18", random_weights=True)
    randomise_norms_(model, (torch.randn(4, 3, 64, 64),))
    return model.train()


def test_the_check_can_see_every_site(resnet18: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    names = tuple(n for n, m in resnet18.named_modules() if is_norm(m))
    assert blind_sites(resnet18, names, (x,)) == ()


def test_a_converted_model_trains_copies_compiles_and_stays_its_class(resnet18: nn.Module) -> None:
    converted, _ = nc.convert(resnet18, "wn", example_inputs=(torch.randn(2, 3, 64, 64),))
    assert type(converted) is type(resnet18)
    assert converted.training
    optimizer = torch.optim.SGD(converted.parameters(), lr=1e-3)
    one = torch.randn(1, 3, 64, 64)
    converted(one).square().mean().backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
    optimizer.step()
    converted.eval()
    expected = converted(one)
    assert bool(torch.isfinite(expected).all())
    assert torch.equal(copy.deepcopy(converted)(one), expected)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(one), expected)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(one), expected, rtol=1e-4, atol=1e-5)


def test_weights_load_strictly_into_a_rebuilt_model_in_a_new_process(
    resnet18: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 64, 64)
    converted, _ = nc.convert(resnet18, "wn", example_inputs=(x,))
    nc.save(converted, tmp_path / "m.safetensors")
    torch.save(converted.eval()(x), tmp_path / "expected.pt")
    torch.save(x, tmp_path / "x.pt")
    code = f"""
        import torch
        import normconv as nc
        folder = {str(tmp_path)!r}
        model = nc.load(f"{{folder}}/m.safetensors", model="torchvision:resnet18").eval()
        with torch.no_grad():
            got = model(torch.load(f"{{folder}}/x.pt"))
        torch.testing.assert_close(got, torch.load(f"{{folder}}/expected.pt"), rtol=1e-5, atol=1e-6)
        assert "weight_g" in dict(model.conv1.named_parameters())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
