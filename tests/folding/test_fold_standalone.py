"""`fold(standalone=True)`: what is left loads where normconv cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normconv as nc
from normconv.errors import UsageError
from normconv.folding import rebuild
from normconv.layers import (
    ChannelAffine,
    Clone,
    Cloned,
    MeanOnlyBatchNorm,
    Normed,
    weight_norm_,
    weight_standardize_,
)
from normconv.numerics import relative_l2
from normconv.plan import history_of
from tests.zoo import ZOO

BLOCKED = """
import sys
import torch

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "normconv":
            raise ImportError("normconv is blocked")

sys.meta_path.insert(0, Blocker())
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert not any(n.partition(".")[0] == "normconv" for n in sys.modules)
with torch.no_grad():
    got = model.eval()(x)
assert torch.equal(got, expected), (got - expected).abs().max()
"""


def loads_alone(model: nn.Module, x: Tensor, folder: Path) -> None:
    """Load and run a model in a process where importing normconv fails."""
    with torch.no_grad():
        expected = model.eval()(x)
    torch.save((model, x, expected), folder / "m.pt")
    command = [sys.executable, "-I", "-c", BLOCKED, str(folder / "m.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def normal(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for name, buffer in module.named_buffers():
        if name != "num_batches_tracked":
            nn.init.normal_(buffer)
    return module


def everything() -> nn.Module:
    return nn.Sequential(
        normal(ChannelAffine(3)),
        nn.ReLU(),
        Normed.of(weight_norm_(nn.Conv2d(3, 4, 3)), nn.GroupNorm(2, 4)),
        nn.ReLU(),
        normal(MeanOnlyBatchNorm(4)),
        nn.ReLU(),
        normal(ChannelAffine(4, trainable=False)),
        nn.ReLU(),
        Cloned.of(weight_standardize_(nn.Conv2d(4, 2, 3))),
        nn.Flatten(),
        nn.ReLU(),
        normal(ChannelAffine(32)),
    )


def test_no_class_of_normconv_is_left(tmp_path: Path) -> None:
    net, x = everything().eval(), torch.randn(2, 3, 8, 8)
    folded, report = nc.fold(net, example_inputs=(x,), standalone=True)
    assert [type(folded[at]) for at in (0, 2, 4, 6, 8, 11)] == [
        nn.Conv2d, nn.Sequential, nn.BatchNorm2d, nn.Conv2d, nn.Conv2d, nn.BatchNorm1d
    ]  # fmt: skip
    assert folded[0].groups == 3
    assert folded[0].weight.requires_grad
    assert not folded[6].weight.requires_grad
    assert not folded[6].bias.requires_grad
    assert torch.allclose(folded[4].running_var, torch.tensor(1 - folded[4].eps))
    assert relative_l2(folded(x), net(x)) <= 1e-6
    assert report.notes == (
        "0: the ChannelAffine became a Conv2d",
        "4: the MeanOnlyBatchNorm became a BatchNorm2d (in training it takes the batch's statistics)",
        "6: the ChannelAffine became a Conv2d",
        "11: the ChannelAffine became a BatchNorm1d (in training it takes the batch's statistics)",
    )
    loads_alone(folded, x, tmp_path)
    again, second = nc.fold(folded, example_inputs=(x,), standalone=True)
    assert second.notes == ()
    assert torch.equal(again(x), folded(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "conv", "norm"),
    [
        ((2, 3), None, nn.BatchNorm1d),
        ((2, 3, 4), nn.Conv1d, nn.BatchNorm1d),
        ((2, 3, 4, 5), nn.Conv2d, nn.BatchNorm2d),
        ((2, 3, 4, 5, 2), nn.Conv3d, nn.BatchNorm3d),
    ],
)
def test_the_class_follows_the_rank(
    shape: tuple[int, ...], conv: Any, norm: Any, dtype: torch.dtype
) -> None:
    net = nn.Sequential(
        nn.ReLU(), normal(ChannelAffine(3)), nn.ReLU(), normal(MeanOnlyBatchNorm(3))
    )
    net, x = net.to(dtype), torch.randn(shape).to(dtype)
    folded = nc.fold(net.eval(), example_inputs=(x,), standalone=True).model
    assert type(folded[1]) is (conv or norm)
    assert type(folded[3]) is norm
    assert folded(x).dtype == dtype
    assert relative_l2(folded(x), net.double()(x.double())) <= 4 * torch.finfo(dtype).eps


def test_the_class_follows_the_dtypes() -> None:
    """A convolution takes no input of another dtype; a BatchNorm does."""
    net, x = nn.Sequential(nn.ReLU(), normal(ChannelAffine(3))), torch.randn(2, 3, 4, 4).bfloat16()
    folded = nc.fold(net, example_inputs=(x,), standalone=True).model
    assert type(folded[1]) is nn.BatchNorm2d
    assert relative_l2(folded.eval()(x), net(x)) <= 1e-2


def test_a_model_that_is_itself_an_affine_map() -> None:
    net, x = normal(ChannelAffine(3)), torch.randn(2, 3, 4)
    folded = nc.fold(nn.Sequential(net), example_inputs=(x,), standalone=True).model
    assert relative_l2(folded(x), net(x)) <= 1e-6


def test_the_rank_comes_from_the_plan_where_there_are_no_inputs(tmp_path: Path) -> None:
    case = ZOO["residual_net"]
    args, _ = case.inputs()
    made = nc.convert(case.build(), "frozen", example_inputs=args).model
    assert any(isinstance(module, ChannelAffine) for module in made.modules())
    folded, report = nc.fold(made, standalone=True)
    assert any("became a Conv2d" in note for note in report.notes)
    with torch.no_grad():
        assert relative_l2(folded(*args), made(*args)) <= 1e-5
    fresh = rebuild(case.build(seed=5), history_of(folded))
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(*args), folded.eval()(*args))
    assert [type(m) for m in fresh.modules()] == [type(m) for m in folded.modules()]


def test_a_graph_loads_alone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    graph = nc.convert(net, "wn", example_inputs=(x,), output="graph").model
    folded = nc.fold(graph, example_inputs=(x,), standalone=True).model
    assert isinstance(folded, fx.GraphModule)
    assert history_of(folded)
    loads_alone(folded, x, tmp_path)


def test_without_a_rank_the_modules_are_named() -> None:
    net = nn.Sequential(ChannelAffine(3), nn.ReLU(), MeanOnlyBatchNorm(3))
    with pytest.raises(UsageError, match="give example_inputs") as caught:
        nc.fold(net, standalone=True)
    assert [problem.where for problem in caught.value.problems] == ["0", "2"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.affine, self.unused = ChannelAffine(3), ChannelAffine(3)

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.affine(x.relu())
        return first.mean() + self.affine(x.flatten(2).relu()).mean()


def test_affine_maps_without_a_plain_layer_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        nc.fold(Twice(), example_inputs=(torch.randn(2, 3, 4, 4),), standalone=True)
    first, second = caught.value.problems
    assert (first.where, second.where) == ("affine", "unused")
    assert "3-D, 4-D" in first.what
    assert "do not reach" in second.what


def test_what_else_holds_normconv_is_named() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Sequential(Clone()))
    net[0].note = ChannelAffine.of
    with pytest.raises(UsageError) as caught:
        nc.fold(net, standalone=True)
    assert [problem.where for problem in caught.value.problems] == ["0", "1.0"]
    assert "ChannelAffine" in caught.value.problems[0].what
