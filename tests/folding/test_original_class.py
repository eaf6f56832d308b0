"""Back into the original, unmodified class: norms in their slots, weights and biases as they are now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.graph import norm_names
from normconv.layers import MeanOnlyBatchNorm
from normconv.numerics import relative_l2
from normconv.plan import history_of
from normconv.proof import evaluate, randomise_norms_


class PreActivation(nn.Module):
    """Norms before the layers, so that some keep an affine map; one norm is called from two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        self.first = nn.BatchNorm2d(6, momentum=None)
        self.one = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.shared = nn.BatchNorm2d(6, eps=1e-3, momentum=0.2)
        self.bare = nn.BatchNorm2d(6, affine=False)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.one(torch.relu(self.first(x)))
        y = x + self.two(torch.relu(self.shared(y)))
        return self.last(torch.relu(self.bare(y)))


class Shared(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1, bias=bias)
        self.two = nn.Conv2d(3, 4, 1, bias=bias)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.one(x))) + self.norm(self.two(x))


class FlatThenNorm(nn.Module):
    """Each channel of the norm is several features of the Linear before it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 8, bias=bias)
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.fc(x).unflatten(1, (4, 2))))


class BatchNormAct(nn.BatchNorm2d):
    """A norm with more in it, as timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.PReLU()
        self.tag = ("kept", object())

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def forward_bias(bias: bool) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, bias=bias), nn.ReLU())


IMAGE = (4, 3, 6, 6)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pre-activation": (PreActivation, IMAGE),
    "two layers of one norm": (lambda: Shared(bias=True), IMAGE),
    "several features a channel": (lambda: FlatThenNorm(bias=True), (4, 3)),
    "forward": (lambda: forward_bias(bias=True), IMAGE),
    "forward without bias": (lambda: forward_bias(bias=False), IMAGE),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), (4, 3)),
    "fused": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchNormAct(4), nn.Conv2d(4, 2, 1)),
        IMAGE,
    ),
}


def converted(net: nn.Module, to: str, x: Tensor) -> Any:
    """Without the proof, which other tests look at."""
    return nc.apply_plan(net, nc.make_plan(net, to, example_inputs=(x,))).model


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = NETS[name]
    x = torch.randn(shape)
    net = build()
    randomise_norms_(net, (x,))
    return net.eval(), x


def train_a_little(model: nn.Module, x: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("to", ["wn", "wn+mobn", "frozen"])
@pytest.mark.parametrize("name", NETS)
def test_trained_back_and_loaded_strictly(name: str, to: str) -> None:
    net, x = made(name)
    model = converted(net, to, x)
    train_a_little(model, x)
    for source in (model, nc.fold(model, example_inputs=(x,)).model):
        back, report = nc.refactor(source, to="bn", example_inputs=(x,))
        assert report.passed
        assert report.checks
        assert type(back) is type(net)
        assert [(n, type(m)) for n, m in back.named_modules()] == [
            (n, type(m)) for n, m in net.named_modules()
        ]
        assert history_of(back) == []
        fresh = NETS[name][0]()
        fresh.load_state_dict(back.state_dict(), strict=True)
        assert relative_l2(evaluate(fresh, (x,))["output"], evaluate(model, (x,))["output"]) <= 4e-6


@pytest.mark.parametrize("to", ["wn", "plain"])
def test_values_are_the_plainest(to: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.Conv2d(4, 4, 1)
    )
    net.append(nn.BatchNorm2d(4, eps=0.1))
    x = torch.randn(IMAGE)
    randomise_norms_(net, (x,))
    plain = nc.fold(converted(net.eval(), to, x)).model
    back: Any = nc.refactor(plain, to="bn").model
    norm = back[1]
    assert (norm.momentum, norm.eps, norm.affine) == (0.3, 1e-5, True)
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.full((4,), 1 - 1e-5, dtype=torch.float64).float())
    assert torch.equal(norm.weight, torch.ones(4))
    assert norm.weight.requires_grad
    assert torch.equal(norm.bias, plain[0].bias)
    assert torch.equal(back[0].weight, plain[0].weight)
    assert back[0].bias is None
    # A layer with a bias in the original keeps one, of 0.
    assert torch.equal(back[2].bias, torch.zeros(4))
    assert torch.equal(back[3].bias, plain[2].bias)


def test_a_running_mean_goes_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).train()
    x = torch.randn(IMAGE)
    net(x)
    model: Any = converted(net.eval(), "wn+mobn", x)
    train_a_little(model, x)
    assert isinstance(model[1], MeanOnlyBatchNorm)
    back: Any = nc.refactor(model, to="bn").model
    assert torch.equal(back[1].running_mean, model[1].running_mean)
    assert torch.equal(back[1].bias, model[1].bias)
    assert int(back[1].num_batches_tracked) == 4
    assert back[0].bias is None


def test_statistics_carry_what_a_norm_without_parameters_cannot() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.ReLU()).eval()
    x = torch.randn(IMAGE)
    randomise_norms_(net, (x,))
    model: Any = converted(net, "frozen", x)
    scale, shift = torch.tensor([0.5, 2.0, 30.0]), torch.tensor([1.0, -2.0, 0.25])
    model[1].scale.copy_(scale)
    model[1].shift.copy_(shift)
    back: Any = nc.refactor(model, to="bn", example_inputs=(x,)).model
    assert torch.allclose(back[1].running_var, scale.double().pow(-2).sub(1e-5).float())
    assert torch.allclose(back[1].running_mean, -shift / scale)
    assert list(back.state_dict()) == list(net.state_dict())
    model[1].scale[1] = -2.0
    with pytest.raises(nc.PlanError, match="1: it has no γ, and its scale is not positive"):
        nc.refactor(model, to="bn")
    model[1].scale[1] = 1e3
    with pytest.raises(nc.PlanError, match="beside eps = 1e-05 no σ²"):
        nc.refactor(model, to="bn")


def test_a_scale_of_zero_keeps_its_shift() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()).eval()
    nn.init.zeros_(net[1].weight)
    nn.init.normal_(net[1].bias)
    x = torch.randn(IMAGE)
    for to in ("frozen", "wn+mobn"):
        model = converted(net, to, x)
        back = nc.refactor(model, to="bn", example_inputs=(x,)).model
        assert torch.equal(back(x), net(x))


@pytest.mark.parametrize("name", ["two layers", "features"])
def test_biases_that_differ_have_no_place(name: str) -> None:
    net, shape = (
        (Shared(bias=False), IMAGE) if name == "two layers" else (FlatThenNorm(bias=False), (4, 3))
    )
    x = torch.randn(shape)
    randomise_norms_(net, (x,))
    model = converted(net.eval(), "wn", x)
    nc.refactor(model, to="bn", example_inputs=(x,))  # untrained they are one β
    train_a_little(model, x)
    with pytest.raises(nc.PlanError, match=r"norm: the original's (two|fc) has no bias"):
        nc.refactor(model, to="bn")


def test_a_bias_that_nothing_can_take() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(1), nn.Linear(1, 3, bias=False), nn.ReLU()).eval()
    x = torch.randn(8, 1)
    randomise_norms_(net, (x,))
    model = converted(net, "wn", x)
    nc.refactor(model, to="bn", example_inputs=(x,))
    train_a_little(model, x)  # three biases, and one number before them
    with pytest.raises(nc.PlanError, match="a bias that no β before them gives"):
        nc.refactor(model, to="bn")


def without_history(model: nn.Module) -> nn.Module:
    model.__dict__.pop("_normconv_history")
    return model


@pytest.mark.parametrize("to", ["wn+mobn", "plain"])
@pytest.mark.parametrize("name", ["pre-activation", "forward without bias", "fused"])
def test_without_a_history_the_original_says_what_was_there(name: str, to: str) -> None:
    net, x = made(name)
    model = converted(net, to, x)
    train_a_little(model, x)
    plain = without_history(nc.fold(model).model)
    with pytest.raises(nc.UsageError, match="no history of a conversion"):
        nc.refactor(plain, to="bn")
    for like in (net, NETS[name][0]):
        back, report = nc.refactor(plain, to="bn", like=like, example_inputs=(x,))
        assert report.passed
        assert type(back) is type(net)
        NETS[name][0]().load_state_dict(back.state_dict(), strict=True)
    if name == "fused":
        assert back[1].tag[0] == "kept"


def test_an_original_of_other_shapes_is_refused() -> None:
    net, x = made("linear")
    model = converted(net, "wn", x)
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 7))
    with pytest.raises(nc.PlanError, match=r"no original of it: 2\.bias, 2\.weight differ"):
        nc.refactor(model, to="bn", like=other)
    with pytest.raises(nc.PlanError, match=r"the like= \(ReLU\) has no such module"):
        nc.refactor(model, to="bn", like=nn.ReLU())


def test_a_file_without_normconv_goes_back() -> None:
    net, x = made("pre-activation")
    for to in ("frozen", "wn+mobn"):
        model = converted(net, to, x)
        alone = nc.fold(model, example_inputs=(x,), standalone=True).model
        assert nc.refactor(alone, to="bn", example_inputs=(x,)).report.passed
        assert nc.refactor(without_history(alone), to="bn", like=net, example_inputs=(x,))


def test_graph_results_have_no_slots() -> None:
    net, x = made("linear")
    graph = nc.convert(net, "wn", example_inputs=(x,), output="graph").model
    with pytest.raises(nc.UsageError, match="traced graph"):
        nc.refactor(graph, to="bn", like=net)


def test_several_conversions_are_undone_in_turn() -> None:
    net, x = made("pre-activation")
    first = nc.convert(net, "frozen", example_inputs=(x,), include=["shared"]).model
    model = converted(first, "wn", x)
    assert not norm_names(model)
    back, report = nc.refactor(model, to="bn", example_inputs=(x,))
    assert norm_names(back) == norm_names(net)
    assert len(report.sites) == 3


def test_group_norm_has_no_way_back() -> None:
    net, x = made("linear")
    model = converted(net, "gn", x)
    with pytest.raises(nc.PlanError, match="takes statistics of every sample"):
        nc.refactor(model, to="bn")


def test_tied_and_kept_reparametrisations_of_the_original() -> None:
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 4)
    )
    net.append(nn.Linear(4, 4))
    net[3].weight = net[2].weight
    x = torch.randn(4, 3)
    randomise_norms_(net, (x,))
    model = nc.convert(net.eval(), "wn", example_inputs=(x,), layers="all", strict=False).model
    back: Any = nc.refactor(model, to="bn", example_inputs=(x,)).model
    assert list(back.state_dict()) == list(net.state_dict())
    assert back[3].weight is back[2].weight


def test_the_file_of_weights_knows_its_way_back(tmp_path: Path) -> None:
    net, x = made("pre-activation")
    model = converted(net, "wn", x)
    nc.save(model, tmp_path / "m.safetensors")
    loaded = nc.load(tmp_path / "m.safetensors", model=PreActivation)
    back = nc.refactor(loaded, to="bn", example_inputs=(x,)).model
    nc.save(back, tmp_path / "back.safetensors")
    again = nc.load(tmp_path / "back.safetensors", model=PreActivation)
    assert torch.equal(again.eval()(x), back.eval()(x))


def test_a_history_cannot_name_code_to_import() -> None:
    net, x = made("linear")
    model = converted(net, "wn", x)
    text = model.__dict__["_normconv_history"]
    for name in ("antigravity:geohash", "torch.hub:load", "subprocess:Popen"):
        model.__dict__["_normconv_history"] = text.replace(
            "torch.nn.modules.batchnorm:BatchNorm1d", name
        )
        with pytest.raises(nc.PlanError, match="not loaded and in no known library"):
            nc.refactor(model, to="bn")


def test_a_model_on_meta_or_changed_is_refused() -> None:
    net, x = made("linear")
    model: Any = converted(net, "wn", x)
    with pytest.raises(nc.UsageError, match="meta device"):
        nc.refactor(model.to("meta"), to="bn")
    model = converted(net, "wn", x)
    nn.init.constant_(model[0].bias, float("nan"))
    with pytest.raises(nc.UsageError, match=r"0\.bias holds NaN"):
        nc.refactor(model, to="bn")
    model = converted(net, "wn", x)
    model[1] = nn.GroupNorm(1, 5)
    with pytest.raises(nc.PlanError, match="1: is a GroupNorm"):
        nc.refactor(model, to="bn")
    model = converted(net, "wn", x)
    model.append(nn.ReLU())
    with pytest.raises(nc.PlanError, match="not the Sequential that it was"):
        nc.refactor(model, to="bn")


@pytest.mark.parametrize("to", ["wn", "wn+mobn"])
def test_timm_norms_with_activations(to: str) -> None:
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), layers.BatchNormAct2d(4, eps=1e-3))
    x = torch.randn(IMAGE)
    randomise_norms_(net, (x,))
    model = converted(net.eval(), to, x)
    back, report = nc.refactor(model, to="bn", example_inputs=(x,))
    assert report.passed
    assert type(back[1]) is layers.BatchNormAct2d
    net.load_state_dict(back.state_dict())


def test_a_trained_resnet18_loads_into_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    net, x = models.resnet18(num_classes=5), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        net.train()(x)
    model = converted(net.eval(), "wn", x)
    train_a_little(model, x)
    back, report = nc.refactor(nc.fold(model).model, to="bn", example_inputs=(x,))
    assert report.passed
    fresh = models.resnet18(num_classes=5)
    fresh.load_state_dict(back.state_dict(), strict=True)
    assert relative_l2(evaluate(fresh, (x,))["output"], evaluate(model, (x,))["output"]) <= 1e-5


@pytest.mark.parametrize("to", ["wn+mobn", "frozen"])
def test_a_stand_in_for_a_norm_is_not_the_norm(to: str) -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    net, x = nn.Sequential(conv, nn.BatchNorm2d(4, eps=0.1)), torch.randn(8, 3, 6, 6)
    net(x)
    net.eval()
    plain = nc.fold(
        nc.convert(net, to, example_inputs=(x,)).model, example_inputs=(x,), standalone=True
    ).model
    back = nc.refactor(plain, to="bn", like=net).model
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.1)).eval()
    fresh.load_state_dict(back.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), net(x))
