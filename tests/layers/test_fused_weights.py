"""Computed weights go through fused kernels as they lie in memory, and into one compiled graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normconv.layers import Reparametrised, weight_norm_, weight_standardize_
from normconv.numerics import relative_l2

WRAPS: dict[str, Callable[[Any], Any]] = {"wn": weight_norm_, "ws": weight_standardize_}
every_form = pytest.mark.parametrize("form", WRAPS)


class Net(nn.Module):
    """Convolutions, grouped and transposed ones, and a Linear."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ConvTranspose2d(8, 6, 3),
            nn.ConvTranspose2d(6, 4, 3, groups=2),
            nn.Flatten(),
            nn.Linear(4 * 8 * 8, 5),
        )
        for layer in self.layers:
            if not isinstance(layer, nn.Flatten):
                WRAPS[form](layer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out

    def weights(self) -> list[Tensor]:
        return [layer.computed() for layer in self.layers if isinstance(layer, Reparametrised)]


class Copies(TorchDispatchMode):
    """Counts the operations that move a weight in memory, and all that touch one."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.copies += name in ("aten::clone", "aten::copy_", "aten::_to_copy")
        self.all += not func.is_view
        return func(*args, **(kwargs or {}))


@every_form
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_needs_one_kernel_each_way(
    form: str, memory_format: torch.memory_format, groups: int
) -> None:
    layer = WRAPS[form](nn.Conv2d(4, 6, 3, groups=groups)).to(memory_format=memory_format)
    with Copies() as seen:
        weight = layer.computed()
    assert (seen.copies, seen.all) == (0, 1)
    assert weight.stride() == layer.weight_v.stride()
    grad = torch.randn_like(weight)
    with Copies() as seen:
        weight.backward(grad)
    assert seen.copies == 0
    assert layer.weight_v.grad.stride() == layer.weight_v.stride()
    with Copies() as seen:
        layer.weight_v.transpose(0, 1).clone()
    assert seen.copies == 1  # it can count them


def test_transposed_weight_norm_is_fused_where_channels_are_last() -> None:
    layer = weight_norm_(nn.ConvTranspose2d(4, 6, 3)).to(memory_format=torch.channels_last)
    with Copies() as seen:
        weight = layer.computed()
    assert (seen.copies, seen.all) == (0, 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@every_form
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_compute_the_same(form: str, memory_format: torch.memory_format) -> None:
    net = Net(form).double()
    last = copy.deepcopy(net).to(memory_format=memory_format)
    x = torch.randn(2, 3, 8, 8).double()
    for model in (net, last):
        model(x).square().sum().backward()
    for one, other in zip(net.weights(), last.weights(), strict=True):
        assert other.dim() != 4 or other.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    for one, other in zip(net.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12)


@every_form
def test_autocast_leaves_the_norm_in_float32(form: str) -> None:
    net, x = Net(form), torch.randn(2, 3, 8, 8)
    expected = net.weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, out = net.weights(), net(x)
    assert out.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert relative_l2(out.float(), net(x)) < 0.02
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@every_form
def test_attention_computes_its_weight_once_a_call(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = WRAPS[form](nn.MultiheadAttention(4, 2)), torch.randn(3, 2, 4)
    calls: list[str] = []
    original = type(layer).computed

    def computed(self: Any, name: str = "weight") -> Tensor:
        calls.append(name)
        return original(self, name)

    monkeypatch.setattr(type(layer), "computed", computed)
    expected = layer(x, x, x)[0]
    assert calls == ["in_proj_weight"]
    with torch.no_grad():
        layer.in_proj_weight_v.mul_(2).add_(torch.randn_like(layer.in_proj_weight_v))
    assert not torch.equal(layer(x, x, x)[0], expected)
    assert "computed" not in layer.__dict__
    with pytest.raises(TypeError):
        layer(x)
    assert "computed" not in layer.__dict__


@every_form
def test_a_network_compiles_into_one_graph_forward_and_backward(form: str) -> None:
    net, x = Net(form), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled: Any = torch.compile(twin, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, net(x))
    out.square().sum().backward()
    net(x).square().sum().backward()
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@every_form
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_can_be_differentiated(form: str, transposed: bool) -> None:
    """A gradient penalty goes through the weight twice, and torch's own weight norm is wrong there."""
    made = WRAPS[form]((nn.ConvTranspose1d if transposed else nn.Conv1d)(4, 4, 2, groups=2))
    parts = made.double().gain_and_v()

    def weight(*values: Tensor) -> Tensor:
        with parametrize(made, values):
            out: Tensor = made.computed()
            return out

    @contextlib.contextmanager
    def parametrize(layer: Any, values: tuple[Tensor, ...]) -> Iterator[None]:
        own, names = dict(layer._parameters), layer.parts("weight")
        layer._parameters.update(zip(names, values, strict=True))
        try:
            yield
        finally:
            layer._parameters.update(own)

    assert torch.autograd.gradcheck(weight, parts)
    assert torch.autograd.gradgradcheck(weight, parts)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's forward mode about itself
def test_transforms_of_torch_func_see_the_formula() -> None:
    layer = weight_norm_(nn.Linear(3, 2).double())
    x = torch.randn(5, 3).double()
    own = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, values, (sample,))
        return out.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x)
    loss(own, x).backward()
    tangents = {name: torch.randn_like(p) for name, p in own.items()}
    _, along = torch.func.jvp(lambda values: loss(values, x), (own,), (tangents,))
    expected = sum((p.grad * tangents[name]).sum() for name, p in own.items() if p.grad is not None)
    torch.testing.assert_close(along, expected)
    for name, p in own.items():
        torch.testing.assert_close(each[name].sum(0), p.grad)
