"""The networks whose training steps are timed, and the ways to train each."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.layers import weight_norm_, weight_standardize_
from normconv.surgery import apply_plan, make_plan
from normconv.training import reparametrise
from normconv.training.normalizations import normalized

__all__ = ["CONTENDERS", "FLOORS", "NETWORKS", "Contender", "Network"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LSTM, nn.MultiheadAttention)
# Networks without norms keep any activations finite only while their weights stay what they were.
RATE = 1e-8


@dataclass(frozen=True)
class Network:
    """One architecture.

    Args:
        make: with fresh BatchNorms where it has some.
        sample: shape of one input.
        classes: of its outputs.
        normed: whether it has BatchNorm.
        resizable: whether it takes images of another size.
    """

    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    classes: int = 1000
    normed: bool = True
    resizable: bool = True


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    model: nn.Module = models.get_model(name)
    return model


class LastStep(nn.Module):
    """Two layers of LSTM, and a Linear on what they put out last."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(64, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, 1000), of sequences (N, T, 64)."""
        logits: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return logits


def _hybrid() -> Any:
    """A small vision transformer on a stem of convolutions with BatchNorm (Xiao et al. 2021)."""
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    stem = [ConvStemConfig(width, 3, 2) for width in (24, 48, 96, 192)]
    model = VisionTransformer(
        image_size=128,
        patch_size=16,
        num_layers=6,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        conv_stem_configs=stem,
    )
    # Rows of zeros are NaN with the weight norm of torch.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


NETWORKS: dict[str, Network] = {
    "resnet18": Network(functools.partial(_torchvision, "resnet18"), (3, 128, 128)),
    "resnet50": Network(functools.partial(_torchvision, "resnet50"), (3, 224, 224)),
    "mobilenet_v3": Network(functools.partial(_torchvision, "mobilenet_v3_large"), (3, 224, 224)),
    "lstm": Network(LastStep, (32, 64), normed=False, resizable=False),
    "vit-hybrid": Network(_hybrid, (3, 128, 128), resizable=False),
}


def _plain(network: nn.Module, samples: Tensor) -> nn.Module:
    """The network after ``--to plain``."""
    if not any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        return copy.deepcopy(network)
    return apply_plan(network, make_plan(network, "plain", example_inputs=(samples[:2],))).model


def _each(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], change: Callable[[Any], Any]
) -> nn.Module:
    for layer in list(model.modules()):
        if isinstance(layer, kinds):
            change(layer)
    return model


def _torch_weight_norm_(layer: nn.Module) -> None:
    for name in [n for n, p in layer.named_parameters(recurse=False) if p.dim() > 1]:
        torch.nn.utils.parametrizations.weight_norm(layer, name)


def _hooked_weight_norm_(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in [n for n, p in layer.named_parameters(recurse=False) if p.dim() > 1]:
            torch.nn.utils.weight_norm(layer, name)


class _WrittenPlainly(nn.Conv2d):
    """Weight standardization as the tutorials write it."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardized weight."""
        w = self.weight
        w = w - w.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
        out: Tensor = self._conv_forward(input, w, self.bias)
        return out


def _plainly_standardized_(layer: nn.Module) -> None:
    layer.__class__ = _WrittenPlainly


def _timm_standardized_(layer: Any) -> None:
    from timm.layers import StdConv2d

    layer.__class__, layer.eps = StdConv2d, 1e-6


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Args:
        make: from the network with BatchNorm and some inputs, what is trained.
        form: the form that the optimizer steps weights in; empty for torch's own.
        fused: how, see `WNSGD`.
        cached: one weight for all micro-batches of a step.
    """

    make: Callable[[nn.Module, Tensor], nn.Module]
    form: str = ""
    fused: str = "auto"
    cached: bool = False

    def optimizer(self, model: nn.Module, rule: str) -> torch.optim.Optimizer:
        """Return the optimizer of a model, the same for all contenders."""
        plain: torch.optim.Optimizer
        if rule == "sgd":
            plain = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
        else:
            plain = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
        if not self.form:
            return plain
        to: Any = self.form
        return reparametrise(plain, model, to, fused=self.fused)


def _on_plain(
    change: Callable[[Any], Any] | None = None,
) -> Callable[[nn.Module, Tensor], nn.Module]:
    def make(network: nn.Module, samples: Tensor) -> nn.Module:
        model = _plain(network, samples)
        return model if change is None else _each(model, LAYERS, change)

    return make


def _on_gn(change: Callable[[Any], Any] | None = None) -> Callable[[nn.Module, Tensor], nn.Module]:
    def make(network: nn.Module, samples: Tensor) -> nn.Module:
        model = normalized(network, "gn", samples)
        return model if change is None else _each(model, (nn.Conv2d,), change)

    return make


# By the contender that each is compared with.
FLOORS = {"wn": "plain", "ws": "gn"}
CONTENDERS: dict[str, Contender] = {
    "plain": Contender(_on_plain()),
    "bn": Contender(lambda network, samples: copy.deepcopy(network)),
    "wn in the optimizer": Contender(_on_plain(), "wn"),
    "wn in the optimizer, not compiled": Contender(_on_plain(), "wn", "loop"),
    "wn in the graph": Contender(_on_plain(weight_norm_)),
    "wn in the graph, cached": Contender(_on_plain(weight_norm_), cached=True),
    "wn, torch's parametrization": Contender(_on_plain(_torch_weight_norm_)),
    "wn, torch's hook": Contender(_on_plain(_hooked_weight_norm_)),
    "gn": Contender(_on_gn()),
    "ws in the optimizer": Contender(_on_gn(), "ws"),
    "ws in the graph": Contender(_on_gn(weight_standardize_)),
    "ws in the graph, cached": Contender(_on_gn(weight_standardize_), cached=True),
    "ws, timm's StdConv2d": Contender(_on_gn(_timm_standardized_)),
    "ws, written plainly": Contender(_on_gn(_plainly_standardized_)),
}


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy in float32."""
    logits = model(inputs).float()
    return F.cross_entropy(logits, labels)
