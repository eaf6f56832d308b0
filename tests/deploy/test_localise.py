"""Where a candidate first leaves the bound: a moved weight is named, and its module alone."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import normconv as nc
from normconv.proof import randomise_norms_

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two convolutions with norms and one activation that is used twice, around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.conv1(x)))
        return self.act(x + self.bn2(self.conv2(h)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    randomise_norms_(net, (IMAGE,))
    return net.eval()


@pytest.fixture(scope="module")
def converted(net: nn.Module) -> nn.Module:
    return nc.convert(net, "wn", example_inputs=(IMAGE,)).model


@pytest.fixture(scope="module")
def file(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("localise") / "net.onnx"
    nc.export_onnx(converted, path, example_inputs=(IMAGE,), check=False)
    return path


WEIGHTS = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head"]


def test_nothing_is_said_of_a_right_candidate(
    net: nn.Module, converted: nn.Module, file: Path
) -> None:
    for candidate in (converted, file):
        report = nc.verify(net, candidate, IMAGE)
        assert report.passed
        assert "first to leave the bound" not in report.facts


@pytest.mark.parametrize("name", ["stem", "blocks.0.conv2", "head"])
def test_the_module_of_a_moved_weight_is_named_in_a_file(
    net: nn.Module, file: Path, tmp_path: Path, name: str
) -> None:
    proto = onnx.load(file)
    (tensor,) = (t for t in proto.graph.initializer if t.name == f"{name}.weight")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1e-2 * np.linalg.norm(values)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    report = nc.verify(net, tmp_path / "wrong.onnx", IMAGE, provider="cpu")
    (failed,) = [check for check in report.failed_checks if check.name == "output"]
    assert failed.way_out.startswith(f"{name} is the first to leave the bound")
    assert ("(Gemm)" if name == "head" else "(Conv)") in failed.way_out
    assert report.facts["first to leave the bound"] == {"the inputs": failed.way_out}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_module_of_a_moved_weight_is_named_in_a_module(
    net: nn.Module, converted: nn.Module, name: str
) -> None:
    twin = copy.deepcopy(nc.fold(converted).model)
    weight = twin.get_parameter(f"{name}.weight")
    with torch.no_grad():
        weight.view(-1)[0] += 1e-2 * weight.norm()
    report = nc.verify(net, twin, IMAGE)
    (failed,) = [check for check in report.failed_checks if check.name == "output"]
    assert failed.way_out.startswith(f"{name} is the first to leave the bound")


def test_what_no_module_computes_is_told_apart(net: nn.Module) -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    twin = Scaled()
    twin.load_state_dict(net.state_dict())
    report = nc.verify(net, twin, IMAGE)
    (failed,) = [check for check in report.failed_checks if check.name == "output"]
    assert failed.way_out.startswith("no module's output leaves its bound")
