"""Per-sample gradients in Opacus equal those of one sample at a time."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normconv.errors import MissingDependency
from normconv.layers import weight_norm_, weight_standardize_
from normconv.numerics import DIALECTS, Pullback, relative_l2
from normconv.privacy import register_grad_samplers

opacus = pytest.importorskip("opacus.grad_sample")

# Torch's word on the first layer's hook where the input needs no gradient; what Opacus says of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]


class Own(nn.Conv2d):
    """A class that Opacus has no sampler for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear, sequence": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "linear, rank 4": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2, bias=False), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 7, 6)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), (4, 8, 8)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=(2, 0), groups=4), (4, 7, 7)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 4, (3, 2), dilation=2, padding=(1, 2)), (3, 8, 8)),
    "conv2d, reflected": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (3, 7, 7)),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 4, 2, padding="same", padding_mode="circular"),
        (3, 7, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), groups=2, padding=1), (2, 4, 4, 4)),
    "conv3d, few places": (
        lambda: nn.Conv3d(12, 32, (3, 2, 1), padding=(1, 0, 2), dilation=(1, 2, 3), groups=2),
        (12, 2, 3, 1),
    ),
    "conv2d, few places": (
        lambda: nn.Conv2d(16, 32, 3, 2, padding=1, groups=2, padding_mode="circular"),
        (16, 4, 4),
    ),
    "conv1d, few places": (lambda: nn.Conv1d(16, 24, 3, padding="same", bias=False), (16, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2), (4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (3, 5, 5)),
    "own class": (lambda: Own(3, 4, 3), (3, 6, 6)),
}
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "wn": weight_norm_,
    **{
        name: lambda layer, name=name: weight_standardize_(layer, dialect=name) for name in DIALECTS
    },
}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def registered() -> None:
    register_grad_samplers()


def one_by_one(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of each sample alone, by autograd alone."""
    samples: dict[str, list[Tensor]] = {}
    for sample in x:
        model.zero_grad()
        loss_of(model(sample[None])).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                samples.setdefault(name, []).append(parameter.grad.clone())
    return {name: torch.stack(grads) for name, grads in samples.items()}


def loss_of(out: Tensor) -> Tensor:
    return (out.square() * torch.linspace(0.5, 2, out[0].numel()).view(out[0].shape)).sum()


def per_sample(model: nn.Module, x: Tensor, **options: bool) -> dict[str, Tensor]:
    watched = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum", **options)
    loss_of(watched(x)).backward()
    return {
        name.removeprefix("_module."): parameter.grad_sample
        for name, parameter in watched.named_parameters()
        if parameter.requires_grad
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, grads in expected.items():
        assert found[name].shape == grads.shape
        for one, other in zip(found[name], grads, strict=True):
            assert relative_l2(one, other) <= 1e-5, name


@every_kind
@every_layer
def test_per_sample_gradients_are_those_of_single_samples(layer: str, kind: str) -> None:
    make, shape = LAYERS[layer]
    model, x = nn.Sequential(KINDS[kind](make())), torch.randn(4, *shape)
    assert_same(per_sample(model, x), one_by_one(model, x))


@pytest.mark.parametrize("kind", ["wn", "timm"])
def test_our_samplers_are_the_ones_in_use(kind: str) -> None:
    known = opacus.GradSampleHooks.GRAD_SAMPLERS
    for name, (make, _) in LAYERS.items():
        expected = type(make()) in known
        assert (type(KINDS[kind](make())) in known) == expected
        assert expected == (not name.startswith(("own", "conv_transpose")))


def test_classes_made_later_and_registered_later_are_taken() -> None:
    class Later(nn.Linear):
        pass

    layer = weight_norm_(Later(3, 2))
    assert type(layer) not in opacus.GradSampleHooks.GRAD_SAMPLERS
    opacus.register_grad_sampler(Later)(opacus.GradSampleHooks.GRAD_SAMPLERS[nn.Linear])
    register_grad_samplers()
    model, x = nn.Sequential(layer), torch.randn(4, 3)
    assert type(layer) in opacus.GradSampleHooks.GRAD_SAMPLERS
    assert_same(per_sample(model, x), one_by_one(model, x))


@pytest.mark.parametrize("kind", ["wn", "qiao"])
@pytest.mark.parametrize("frozen", ["gain", "v", "bias", "gain, v"])
def test_frozen_parameters_get_nothing(kind: str, frozen: str) -> None:
    layer = KINDS[kind](nn.Conv2d(3, 4, 3))
    parameters = dict(zip(("gain", "v", "bias"), layer.parameters(), strict=True))
    for name in frozen.split(", "):
        parameters[name].requires_grad_(False)
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Conv2d(4, 2, 3)), torch.randn(3, 3, 8, 8)
    assert_same(per_sample(model, x), one_by_one(model, x))


@pytest.mark.parametrize("kind", ["wn", "timm"])
def test_a_gain_of_zero_and_channels_last_inputs(kind: str) -> None:
    layer = KINDS[kind](nn.Conv2d(3, 4, 3, padding=1))
    with torch.no_grad():
        next(layer.parameters())[1] = 0
    x = torch.randn(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(layer)
    assert_same(per_sample(model, x), one_by_one(model, x))


@pytest.mark.parametrize("kind", ["wn", "timm"])
def test_a_layer_called_twice_sums_its_calls(kind: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = KINDS[kind](nn.Conv2d(3, 3, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x).tanh())

    model, x = Twice(), torch.randn(3, 3, 6, 6)
    assert_same(per_sample(model, x), one_by_one(model, x))


@every_kind
@every_layer
def test_ghost_norms_are_those_of_the_gradients(layer: str, kind: str) -> None:
    make, shape = LAYERS[layer]
    model, x = nn.Sequential(KINDS[kind](make())), torch.randn(4, *shape)
    expected = one_by_one(model, x)
    ghost = opacus.GradSampleModuleFastGradientClipping(copy.deepcopy(model), loss_reduction="sum")
    assert (type(model[0]) in ghost.NORM_SAMPLERS) == layer.startswith(
        ("linear", "conv1", "conv2", "conv3")
    )
    loss_of(ghost(x)).backward()
    for name, parameter in ghost.named_parameters():
        norms = expected[name.removeprefix("_module.")].flatten(1).norm(dim=1)
        assert relative_l2(parameter._norm_sample, norms) <= 1e-5, name
    total = torch.cat([grads.flatten(1) for grads in expected.values()], dim=1).norm(dim=1)
    assert relative_l2(ghost.get_norm_sample(), total) <= 1e-5


def test_no_gradients_are_made_where_places_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: object) -> None:
        raise AssertionError("the gradient of each sample was made")

    monkeypatch.setattr(Pullback, "both_", made)
    for layer, (make, shape) in LAYERS.items():
        model = nn.Sequential(weight_norm_(make()))
        ghost = opacus.GradSampleModuleFastGradientClipping(model, loss_reduction="sum")
        loss = loss_of(ghost(torch.randn(4, *shape)))
        if layer.endswith("few places"):
            loss.backward()
        elif layer == "conv2d":
            with pytest.raises(AssertionError, match="was made"):
                loss.backward()


@pytest.mark.parametrize("frozen", ["gain", "v", "bias", "gain, v"])
def test_frozen_parameters_get_no_norms(frozen: str) -> None:
    layer = weight_norm_(nn.Conv2d(3, 4, 3))
    parameters = dict(zip(("gain", "v", "bias"), layer.parameters(), strict=True))
    for name in frozen.split(", "):
        parameters[name].requires_grad_(False)
    model, x = nn.Sequential(layer), torch.randn(3, 3, 8, 8)
    expected = one_by_one(model, x)
    ghost = opacus.GradSampleModuleFastGradientClipping(copy.deepcopy(model), loss_reduction="sum")
    loss_of(ghost(x)).backward()
    for name, parameter in ghost.named_parameters():
        assert hasattr(parameter, "_norm_sample") == parameter.requires_grad
        if parameter.requires_grad:
            norms = expected[name.removeprefix("_module.")].flatten(1).norm(dim=1)
            assert relative_l2(parameter._norm_sample, norms) <= 1e-5


@every_kind
@pytest.mark.parametrize("layer", [n for n in LAYERS if not n.startswith(("own", "conv_trans"))])
def test_an_empty_batch_as_poisson_sampling_draws_them(layer: str, kind: str) -> None:
    make, shape = LAYERS[layer]
    model, x = nn.Sequential(KINDS[kind](make())), torch.empty(0, *shape)
    sampled = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    ghost = opacus.GradSampleModuleFastGradientClipping(model, loss_reduction="sum")
    for watched in (sampled, ghost):
        watched(x).sum().backward()
    assert all(len(parameter.grad_sample) == 0 for parameter in sampled.parameters())
    assert ghost.get_norm_sample().shape == (0,)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_private_step_is_taken(mode: str) -> None:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Sequential(
        weight_norm_(nn.Conv2d(1, 4, 3)), nn.ReLU(), weight_standardize_(nn.Conv2d(4, 4, 3)),
        nn.Flatten(), weight_norm_(nn.Linear(64, 2)),
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 2), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )
    watched, optimizer, *criterion, loader = made
    loss_function = criterion[0] if criterion else nn.CrossEntropyLoss()
    for x, y in loader:
        optimizer.zero_grad()
        loss_function(watched(x), y).backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("kind", ["wn", "timm", "qiao"])
def test_functorch_alone_gives_the_same(kind: str) -> None:
    model, x = nn.Sequential(KINDS[kind](nn.Conv2d(3, 4, 3))), torch.randn(3, 3, 6, 6)
    assert_same(per_sample(model, x, force_functorch=True), per_sample(model, x))


def test_without_opacus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingDependency, match=r"Opacus .* pip install 'normconv\[privacy\]'"):
        register_grad_samplers()
