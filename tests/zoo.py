"""Tiny models, one per case that breaks tools of this kind, as data.

A case says what each target must do with it: convert it, with how many sites folded and how many left
as an affine map in their slot, or refuse it with a reason that holds a given word.
"""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.cases import Case as Case
from tests.cases import x as x
from tests.zoo_flows import FLOWS
from tests.zoo_forms import FORMS


def _conv_bn(conv: nn.Module, norm: nn.Module, *rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(conv=conv, norm=norm, act=nn.ReLU(), rest=nn.Sequential(*rest))
    )


class SharedConv(nn.Module):
    """One conv, called once, feeds two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.tanh(self.bn1(y)) + self.bn2(y)


class ConvTwice(nn.Module):
    """One conv, called twice, each call with its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(torch.relu(self.bn1(self.conv(x)))))


class BlockTwice(nn.Module):
    """A conv and its norm, both called twice, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(self.bn(self.conv(x)))
        return x


class SharedNorm(nn.Module):
    """One norm after two convs (one of them without bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv1(x))) - self.bn(self.conv2(x))


class SharedNormMixed(nn.Module):
    """One norm after a conv and after a sum: no layer can absorb the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.relu(self.bn(self.conv(x))) + x)


class TwoNames(nn.Module):
    """One norm under two names, one of them in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([self.conv, self.bn])
        self.also = self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.also(self.blocks[0](x)).relu()


class OtherUser(nn.Module):
    """The conv's output goes around the norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) * torch.sigmoid(y)


class ReturnsFeature(OtherUser):
    """The conv's output is an output of the model."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class InPlaceBetween(OtherUser):
    """The conv's output is changed in place, by a call whose result nobody takes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)


class InPlaceAfter(OtherUser):
    """The norm's output is changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y.mul_(2).add_(1)
        return F.relu(y, inplace=True)


class ViewOfInput(OtherUser):
    """A view of the conv's output is taken before, and used after, the norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        first = y[:, 0]
        return self.bn(y).sum(1) + first


class AfterConcat(nn.Module):
    """The norm follows a concatenation of two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.a(x), self.b(x)], dim=1)).relu()


class AfterAdd(nn.Module):
    """The norm follows a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + x).relu()


class AfterReshape(nn.Module):
    """A reshape makes other channels of the conv's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.flat = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm1d(8),
            nn.BatchNorm1d(4 * 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.bn(y.reshape(y.shape[0], 8, 8))
        return self.flat(y.flatten(1))


class AfterTranspose(nn.Module):
    """Linear on (N, L, C), brought to (N, C, L) for the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x).transpose(1, 2)).relu()


class AfterLSTM(nn.Module):
    """The norm follows an LSTM: linear layers inside, none to fold into."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.bn = nn.LSTM(5, 4, batch_first=True), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.bn(y.transpose(1, 2))


class PreAct(nn.Module):
    """A pre-activation residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class Containers(nn.Module):
    """ModuleList, ModuleDict and nested Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)})
        self.tail = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms.values(), strict=True):
            x = torch.relu(norm(conv(x)))
        return self.tail(x)


class TiedConvs(nn.Module):
    """Two convs with one weight, each with its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.conv2.weight = self.conv1.weight
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class TiedNorms(nn.Module):
    """Two norms that share γ and β but not their statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bn2.weight, self.bn2.bias = self.bn1.weight, self.bn1.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class ConvBiasIsNormBias(nn.Module):
    """The conv's bias is also the norm's shift."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bn.bias = self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class HandFrozenNorm(nn.Module):
    """A frozen BatchNorm as people write it: four buffers."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class OddEpsNorm(HandFrozenNorm):
    """A frozen BatchNorm that adds eps outside of the root: not the map we know."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var.sqrt() + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class RenamedBatchNorm(nn.BatchNorm2d):
    """A subclass that adds nothing."""


class PlusOne(nn.BatchNorm2d):
    """A subclass with one more operation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class BatchNormRelu(nn.BatchNorm2d):
    """A subclass with a functional activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class CircularConv(nn.Conv2d):
    """A subclass with its own `forward`, still linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), self.weight, self.bias)


class ConvRelu(nn.Conv2d):
    """A subclass with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Functional(nn.Module):
    """`F.batch_norm` over the model's own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gamma, self.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, self.training, 0.1, 1e-3)
        return y.relu()


class FunctionalAndModule(Functional):
    """Both a functional norm and a module."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(super().forward(x))


class ControlFlow(nn.Module):
    """Python control flow on a size: only export passes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.big = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if y.shape[-1] > 4:
            y = torch.relu(y)
        return self.big(y) if y.mean(dim=0).dim() == 3 else y


class OptionalArgument(nn.Module):
    """An optional argument that is left at None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.bn(self.conv(x))
        if mask is not None:
            y = y * mask
        return y * scale


class CastsInput(OptionalArgument):
    """Takes bytes and makes float32 of them, whatever its own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.float() / 255))


class KeywordInput(OptionalArgument):
    """Inputs by name, one of them only by name."""

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * mask


class SeveralInputs(OptionalArgument):
    """Two inputs, one of them nested."""

    def forward(self, x: Tensor, more: tuple[Tensor, Tensor]) -> Tensor:
        return self.bn(self.conv(x + more[0])) + more[1]


class Pair(NamedTuple):
    """A named output."""

    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Fields:
    """A dataclass output."""

    logits: Tensor
    extra: Tensor


class ReturnsDict(OptionalArgument):
    """A dict output with a list in it."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.bn(self.conv(x))
        return {"y": y, "more": [y.mean(dim=(2, 3)), y.amax(dim=(2, 3))]}


class ReturnsPair(OptionalArgument):
    """A namedtuple output."""

    def forward(self, x: Tensor) -> Pair:
        y = self.bn(self.conv(x))
        return Pair(y, y.relu())


class ReturnsDataclass(OptionalArgument):
    """A dataclass output."""

    def forward(self, x: Tensor) -> Fields:
        y = self.bn(self.conv(x))
        return Fields(logits=y, extra=y.relu())


class AuxHead(nn.Module):
    """An auxiliary head that only training mode calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.aux = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = torch.relu(self.bn(self.conv(x)))
        return (y, self.aux(y)) if self.training else y


class AuxShares(nn.Module):
    """A training-only norm whose conv eval mode calls too: it must not absorb it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.main = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if self.training else self.main(torch.relu(y))


class Unreached(nn.Module):
    """A norm that neither mode calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.spare = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class ReadsNorm(OtherUser):
    """γ is read outside of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn.weight.sum()


class ReadsConv(OtherUser):
    """The conv's weight is read outside of the conv."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.weight.pow(2).mean()


class ListReference(nn.Module):
    """The forward goes through a plain list of modules that are registered elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.steps = [self.conv, self.bn]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x.relu()


class DictReference(nn.Module):
    """As `ListReference`, with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.by_name = {"norm": self.bn}

    def forward(self, x: Tensor) -> Tensor:
        return self.by_name["norm"](self.conv(x)).relu()


class BoundMethod(nn.Module):
    """The norm is called through a bound method that the model keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.normalise = self.bn.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(self.conv(x)).relu()


class AliasedSequential(nn.Module):
    """A Sequential that holds a norm, reachable by three paths."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.same = self.block
        self.inner = nn.ModuleList([self.block[1]])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](self.same[0](x)).relu()


class OutputSize(nn.Module):
    """A transposed convolution that is told its output size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up, self.bn = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.up(self.down(x), output_size=[6, 6])).relu()


class KeywordNorm(OtherUser):
    """Conv and norm are called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(input=x)).relu()


class Unbatched(nn.Module):
    """Conv1d takes (C, L) as one sample; BatchNorm1d takes its output as (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class UnbatchedInstance(nn.Module):
    """InstanceNorm1d takes (C, L) as one sample: its channels are then axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(8, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


class HalfWithFloatNorm(nn.Module):
    """Half-precision layers around a float32 norm, as apex and amp leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class ResidualNet(nn.Module):
    """Two stages with a strided shortcut and a head: a small real network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)
        )
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = self.relu(y + self.shortcut(x))
        return self.head(y.mean(dim=(2, 3)))


def keep(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing; at module level, so that it pickles."""


def with_hook(on: str) -> nn.Module:
    net = _conv_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net.get_submodule(on).register_forward_hook(keep)
    return net


def legacy_weight_norm(layer: nn.Module) -> nn.Module:
    """torch's older weight norm, without its deprecation warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def no_shift() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("bias", None)
    return _conv_bn(nn.Conv2d(3, 4, 3), norm)


def zero_rows() -> nn.Module:
    net = _conv_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        net.conv.weight[1].zero_()
        net.conv.weight[3].zero_()
    return net


def all_zero() -> nn.Module:
    net = _conv_bn(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        net.conv.weight.zero_()
    return net


def zero_gammas(net: nn.Module) -> None:
    """Three of the cases that a gain of ‖w‖ cannot hold: zero, negative, both zero and its shift."""
    norm = net.get_submodule("norm")
    with torch.no_grad():
        norm.weight[:3] = torch.tensor([0.0, -1.5, 0.0])
        norm.bias[2] = 0.0


def dead_channel(net: nn.Module) -> None:
    norm = net.get_submodule("norm")
    norm.running_var[1] = 0.0
    norm.running_var[2] = 1e-12


def set_functional(net: nn.Module) -> None:
    with torch.no_grad():
        net.mean.copy_(x(4, seed=1) * 0.3)
        net.var.copy_(x(4, seed=2).abs() + 0.2)
        net.gamma.copy_(torch.tensor([1.2, -0.7, 0.0, 0.9]))
        net.beta.copy_(x(4, seed=3) * 0.2)


def mixed_flags() -> nn.Module:
    net = ResidualNet().train()
    net.stem.eval()
    net.bn2.eval()
    for parameter in net.stem.parameters():
        parameter.requires_grad_(False)
    net.bn1.weight.requires_grad_(False)
    return net


def frozen_all() -> nn.Module:
    net = _conv_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    net.requires_grad_(False)
    net.rest[0].requires_grad_(True)
    return net.eval()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())


def graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(ResidualNet())


def tv_frozen() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return _conv_bn(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4))


def tv_block() -> nn.Module:
    from torchvision.models.mobilenetv2 import InvertedResidual

    return InvertedResidual(4, 4, stride=1, expand_ratio=2)


def tv_bottleneck() -> nn.Module:
    from torchvision.models.resnet import Bottleneck

    return Bottleneck(8, 2)


def timm_norm_act(**more: Any) -> nn.Module:
    from timm.layers import BatchNormAct2d

    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=BatchNormAct2d(4, **more)))


def timm_std_conv() -> nn.Module:
    from timm.layers import StdConv2d

    return _conv_bn(StdConv2d(3, 4, 3), nn.BatchNorm2d(4))


def timm_same_conv() -> nn.Module:
    from timm.layers import Conv2dSame

    return _conv_bn(Conv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4))


def timm_depthwise_separable() -> nn.Module:
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv

    return DepthwiseSeparableConv(4, 4, se_layer=None)


def timm_split_norm() -> nn.Module:
    from timm.layers import SplitBatchNorm2d

    return _conv_bn(nn.Conv2d(3, 4, 3), SplitBatchNorm2d(4, num_splits=2))


C1, C2, C3 = x(3, 3, 9), x(2, 3, 6, 6), x(2, 3, 4, 5, 5)


def _c2(conv: Callable[[], nn.Module], channels: int, **more: Any) -> Case:
    """A conv over images with a BatchNorm2d after it."""
    expected = {"fold": 1} if not {"fold", "affine", "refused"} & more.keys() else {}
    return Case(
        lambda: _conv_bn(conv(), nn.BatchNorm2d(channels), nn.Conv2d(channels, 2, 1)),
        (C2,),
        **{**expected, **more},
    )


def _norm2(norm: Callable[[], nn.Module], **more: Any) -> Case:
    """A plain conv with some norm after it."""
    expected = {"fold": 1} if not {"fold", "affine", "refused"} & more.keys() else {}
    return Case(lambda: _conv_bn(nn.Conv2d(3, 4, 3), norm()), (C2,), **{**expected, **more})


ZOO: dict[str, Case] = {
    # operators
    "conv1d": Case(
        lambda: _conv_bn(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 2, 1)), (C1,), fold=1
    ),
    "conv2d": _c2(lambda: nn.Conv2d(3, 6, 3), 6),
    "conv2d_no_bias": _c2(lambda: nn.Conv2d(3, 6, 3, bias=False), 6),
    "conv2d_strided_dilated": _c2(lambda: nn.Conv2d(3, 6, 2, stride=2, dilation=2), 6),
    "conv2d_reflect": _c2(lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), 6),
    "conv2d_same": _c2(lambda: nn.Conv2d(3, 6, 3, padding="same"), 6),
    "conv2d_grouped": _c2(lambda: nn.Conv2d(3, 6, 3, groups=3), 6),
    "conv2d_depthwise": _c2(lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), 3),
    "conv2d_one_element_filters": _c2(lambda: nn.Conv2d(3, 3, 1, groups=3), 3),
    "conv2d_one_channel": _c2(lambda: nn.Conv2d(3, 1, 1), 1),
    "conv3d": Case(
        lambda: _conv_bn(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 1)), (C3,), fold=1
    ),
    "conv_transpose1d": Case(
        lambda: _conv_bn(nn.ConvTranspose1d(3, 6, 3), nn.BatchNorm1d(6)), (C1,), fold=1
    ),
    "conv_transpose1d_grouped": Case(
        lambda: _conv_bn(nn.ConvTranspose1d(3, 6, 3, groups=3, bias=False), nn.BatchNorm1d(6)),
        (C1,),
        fold=1,
    ),
    "conv_transpose2d": _c2(lambda: nn.ConvTranspose2d(3, 5, 3), 5),
    "conv_transpose2d_grouped": Case(
        lambda: _conv_bn(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (x(2, 4, 5, 5),),
        fold=1,
    ),
    "conv_transpose2d_depthwise": _c2(lambda: nn.ConvTranspose2d(3, 3, 2, stride=2, groups=3), 3),
    "conv_transpose2d_output_padding": _c2(
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), 4
    ),
    "conv_transpose2d_output_size": Case(OutputSize, (C2,), fold=1),
    "conv_transpose3d_grouped": Case(
        lambda: _conv_bn(nn.ConvTranspose3d(4, 4, 2, groups=2), nn.BatchNorm3d(4)),
        (x(2, 4, 3, 3, 3),),
        fold=1,
    ),
    "linear": Case(
        lambda: _conv_bn(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)), (x(16, 5),), fold=1
    ),
    "linear_no_bias": Case(
        lambda: _conv_bn(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7)), (x(16, 5),), fold=1
    ),
    "linear_3d": Case(
        lambda: _conv_bn(nn.Linear(5, 7), nn.BatchNorm1d(4)), (x(2, 4, 5),), affine=1
    ),
    "linear_3d_square": Case(
        lambda: _conv_bn(nn.Linear(5, 4), nn.BatchNorm1d(4)), (x(2, 4, 5),), affine=1
    ),
    "linear_3d_transposed": Case(AfterTranspose, (x(2, 3, 5),), fold=1),
    "lstm": Case(AfterLSTM, (x(2, 3, 5),), affine=1),
    # kinds and states of norms
    "affine_false": _norm2(lambda: nn.BatchNorm2d(4, affine=False)),
    "no_shift": Case(no_shift, (C2,), fold=1),
    "momentum_none": _norm2(lambda: nn.BatchNorm2d(4, momentum=None)),
    "large_eps": _norm2(lambda: nn.BatchNorm2d(4, eps=1e-3)),
    "no_running_stats": _norm2(
        lambda: nn.BatchNorm2d(4, track_running_stats=False), refused="running statistics"
    ),
    "no_running_stats_among_others": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        ),
        (C2,),
        refused="running statistics",
    ),
    "zero_and_negative_gamma": Case(
        lambda: _conv_bn(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
        (C2,),
        fold=1,
        after=zero_gammas,
    ),
    "dead_channel": Case(
        lambda: _conv_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (C2,), fold=1, after=dead_channel
    ),
    "nan_statistics": _norm2(lambda: _poisoned(float("nan")), refused="NaN"),
    "negative_variance": _norm2(lambda: _poisoned(-1.0), refused="positive"),
    "sync": _norm2(lambda: nn.SyncBatchNorm(4)),
    "lazy": Case(
        lazy,
        (C2,),
        refused="lazy",
    ),
    "instance_norm": _norm2(lambda: nn.InstanceNorm2d(4, track_running_stats=True)),
    "instance_norm_affine": _norm2(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    ),
    "instance_norm_alone": _norm2(
        lambda: nn.InstanceNorm2d(4), refused="no BatchNorm", plan={"layers": "normed"}
    ),
    "group_norm_alone": _norm2(
        lambda: nn.GroupNorm(2, 4), refused="no BatchNorm", plan={"layers": "normed"}
    ),
    "frozen_torchvision": Case(tv_frozen, (C2,), fold=1),
    "frozen_by_hand": _norm2(lambda: HandFrozenNorm(4)),
    "frozen_odd_eps": _norm2(lambda: OddEpsNorm(4, eps=1e-2), refused="differs"),
    "subclass_same": _norm2(lambda: RenamedBatchNorm(4)),
    "subclass_unknown": _norm2(lambda: PlusOne(4), refused="differs"),
    "subclass_functional_act": _norm2(lambda: BatchNormRelu(4), refused="differs"),
    "norm_act_timm": Case(timm_norm_act, (C2,), fold=1),
    "norm_act_timm_silu": Case(lambda: timm_norm_act(act_layer=nn.SiLU), (C2,), fold=1),
    "norm_act_timm_not_applied": Case(lambda: timm_norm_act(apply_act=False), (C2,), fold=1),
    "split_norm_timm": Case(timm_split_norm, (C2,), refused="probed"),
    # weights
    "zero_rows": Case(zero_rows, (C2,), fold=1),
    "zero_weight": Case(all_zero, (C2,), fold=1),
    "channels_last": Case(
        lambda: _conv_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).to(
            memory_format=torch.channels_last
        ),
        (C2.to(memory_format=torch.channels_last),),
        fold=1,
    ),
    "half": _c2(lambda: nn.Conv2d(3, 8, 3), 8, dtype=torch.float16),
    "bfloat16": _c2(lambda: nn.Conv2d(3, 8, 3), 8, dtype=torch.bfloat16),
    "double": _c2(lambda: nn.Conv2d(3, 8, 3), 8, dtype=torch.float64),
    "bfloat16_with_float_norm": Case(HalfWithFloatNorm, (C2.bfloat16(),), fold=1),
    "tied_convs": Case(TiedConvs, (C2,), affine=2),
    "tied_norms": Case(TiedNorms, (C2,), fold=2),
    "conv_bias_is_norm_bias": Case(ConvBiasIsNormBias, (C2,), affine=1),
    "parametrized_producer": Case(
        lambda: _conv_bn(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        (C2,),
        affine=1,
        pickles=False,
    ),
    "spectral_producer": Case(
        lambda: _conv_bn(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        (C2,),
        affine=1,
        pickles=False,
    ),
    "legacy_weight_norm_producer": Case(
        lambda: _conv_bn(legacy_weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        (C2,),
        affine=1,
    ),
    "weight_standardized_producer": Case(timm_std_conv, (C2,), affine=1),
    "conv_same_timm": Case(timm_same_conv, (C2,), fold=1),
    "conv_own_forward": _c2(lambda: CircularConv(3, 4, 3), 4),
    "conv_with_act_inside": _c2(lambda: ConvRelu(3, 4, 3), 4, affine=1),
    # dataflow
    "shared_conv": Case(SharedConv, (C2,), affine=2),
    "conv_twice": Case(ConvTwice, (C2,), affine=2),
    "block_twice": Case(BlockTwice, (C2,), fold=1),
    "shared_norm": Case(SharedNorm, (C2,), fold=1),
    "shared_norm_mixed": Case(SharedNormMixed, (C2,), affine=1),
    "two_names": Case(TwoNames, (C2,), fold=1),
    "other_user": Case(OtherUser, (C2,), affine=1),
    "returns_feature": Case(ReturnsFeature, (C2,), affine=1),
    "in_place_between": Case(InPlaceBetween, (C2,), affine=1),
    "in_place_after": Case(InPlaceAfter, (C2,), fold=1),
    "view_of_input": Case(ViewOfInput, (C2,), affine=1),
    "after_concat": Case(AfterConcat, (C2,), fold=1),
    "after_add": Case(AfterAdd, (C2,), affine=1),
    "after_reshape": Case(AfterReshape, (C2,), affine=2),
    "after_input": Case(
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (C2,), forward=1
    ),
    "after_max_pool": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)),
        (C2,),
        affine=1,
    ),
    "after_relu": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (C2,), affine=1
    ),
    "after_in_place_relu": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)),
        (C2,),
        affine=1,
    ),
    "after_dropout": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4)),
        (C2,),
        affine=1,
    ),
    "after_flatten": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(64)), (C2,), affine=1
    ),
    "after_identity": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Identity(), nn.BatchNorm2d(4)),
        (C2,),
        fold=1,
    ),
    "norm_after_norm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        (C2,),
        fold=1,
        affine=1,
    ),
    "before_padded_conv": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
        (C2,),
        affine=1,
    ),
    "in_place_relu": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        (C2,),
        fold=1,
    ),
    "keyword_calls": Case(
        KeywordNorm,
        (C2,),
        fold=1,
    ),
    "unbatched": Case(
        Unbatched,
        (x(3, 8),),
        affine=1,
        couples=True,
    ),
    "unbatched_instance_norm": Case(UnbatchedInstance, (x(8, 8),), refused="batch"),
    "pre_activation": Case(PreAct, (x(2, 4, 5, 5),), fold=1, affine=1),
    "root_is_norm": Case(
        lambda: nn.BatchNorm2d(3),
        (C2,),
        affine=1,
        captures=("hooks",),
    ),
    "containers": Case(Containers, (C2,), fold=3),
    "aliased_sequential": Case(AliasedSequential, (C2,), fold=1),
    "list_reference": Case(
        ListReference,
        (C2,),
        refused="outside",
    ),
    "dict_reference": Case(
        DictReference,
        (C2,),
        refused="outside",
    ),
    "bound_method": Case(BoundMethod, (C2,), refused="batch_norm"),
    "reads_norm": Case(ReadsNorm, (C2,), refused="read outside"),
    "reads_conv": Case(ReadsConv, (C2,), affine=1),
    "hook_on_conv": Case(lambda: with_hook("conv"), (C2,), affine=1),
    "hook_on_norm": Case(lambda: with_hook("norm"), (C2,), affine=1),
    # forms of models
    "functional": Case(Functional, (C2,), refused='output="graph"', after=set_functional),
    "functional_and_module": Case(
        FunctionalAndModule, (C2,), refused='output="graph"', after=set_functional
    ),
    "functional_as_graph": Case(
        Functional, (C2,), fold=1, after=set_functional, graph=True, no_grad_of=("gamma", "beta")
    ),
    "casts_input": Case(
        CastsInput,
        (torch.randint(0, 255, (2, 3, 6, 6), generator=torch.Generator().manual_seed(0)).byte(),),
        fold=1,
        float64=False,
    ),
    "control_flow": Case(ControlFlow, (C2,), fold=1, captures=("export", "hooks")),
    "optional_argument": Case(OptionalArgument, (C2,), fold=1),
    "keyword_input": Case(KeywordInput, (C2,), {"mask": x(2, 4, 4, 4, seed=1)}, fold=1),
    "several_inputs": Case(
        SeveralInputs, (C2, (x(2, 3, 6, 6, seed=1), x(2, 4, 4, 4, seed=2))), fold=1
    ),
    "returns_dict": Case(ReturnsDict, (C2,), fold=1),
    "returns_namedtuple": Case(ReturnsPair, (C2,), fold=1),
    "returns_dataclass": Case(ReturnsDataclass, (C2,), fold=1),
    "auxiliary_head": Case(AuxHead, (C2,), fold=2),
    "auxiliary_shares_conv": Case(
        AuxShares, (C2,), affine=2, no_grad_of=("main.scale", "main.shift")
    ),
    "unreached": Case(Unreached, (C2,), refused="neither"),
    "unreached_dropped": Case(Unreached, (C2,), fold=1, drop=1, plan={"drop_unreached": True}),
    "mixed_flags": Case(mixed_flags, (C2,), fold=4),
    "frozen_parameters": Case(frozen_all, (C2,), fold=1),
    "graph_module": Case(graph_module, (C2,), fold=4),
    "residual_net": Case(ResidualNet, (C2,), fold=4),
    "inverted_residual_torchvision": Case(tv_block, (x(2, 4, 6, 6),), fold=3),
    "bottleneck_torchvision": Case(tv_bottleneck, (x(2, 8, 6, 6),), fold=3),
    "depthwise_separable_timm": Case(timm_depthwise_separable, (x(2, 4, 6, 6),), fold=2),
    **FLOWS,
    **FORMS,
    "wrapped": Case(
        lambda: nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))),
        (C2,),
        refused="wrapped",
    ),
}


def _poisoned(value: float) -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_var[1] = value
    return norm


def norm_with_scale() -> nn.Module:
    """An attribute of the user's has the name of a parameter of `ChannelAffine`."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    net[2].scale = 2.0
    return net


def _relu_after(self: nn.Module, y: Tensor) -> Tensor:
    return type(self).forward(self, y).relu()


def patched_conv() -> nn.Module:
    """One layer's forward is patched, not its class's."""
    net = _conv_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net.conv.forward = types.MethodType(_relu_after, net.conv)
    return net


ZOO |= {
    "attribute_named_scale": Case(norm_with_scale, (C2,), affine=1),
    "patched_conv": Case(patched_conv, (C2,), affine=1, pickles=False),
}
