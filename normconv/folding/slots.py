"""What stands in the slot of a norm that was converted, read as one affine map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normconv.graph import is_norm, norm_state
from normconv.layers import ChannelAffine, MeanOnlyBatchNorm
from normconv.numerics import response_to_shift

__all__ = ["Slot", "fill_norm_", "read_slot", "responses"]


@dataclass
class Slot:
    """y = scale · x − mean + shift, then whatever the norm did after normalizing.

    Args:
        scale: (C,) float64.
        mean: of what is subtracted, the part that training keeps as a running mean; (C,) float64.
        shift: (C,) float64.
        plain: nothing stands there: scale 1, mean and shift 0.
        centers: a norm stands there that takes a batch's mean in training.
        seen: its batches.
        trailing: the modules that follow, by name.
        module: what stands there.
        like: a tensor with the dtype and device of the map; None where nothing stands there.
    """

    scale: Tensor
    mean: Tensor
    shift: Tensor
    plain: bool
    centers: bool
    seen: int
    trailing: dict[str, nn.Module]
    module: nn.Module
    like: Tensor | None


def read_slot(module: nn.Module, channels: int, trailing: Sequence[str]) -> Slot | str:
    """Read a slot, or say in one sentence why what stands there is no such map.

    Args:
        module: what stands there.
        channels: C.
        trailing: the names of the norm's own children.

    >>> slot = read_slot(nn.Identity(), 2, ())
    >>> isinstance(slot, Slot) and slot.plain
    True
    """
    parts: dict[str, nn.Module] = {"": module}
    after: dict[str, nn.Module] = {}
    if type(module) is nn.Sequential:
        children = dict(module.named_children())
        after = {name: child for name, child in children.items() if name in trailing}
        parts = {name: child for name, child in children.items() if name not in trailing}
    if len(after) < len(trailing):
        return f"its {', '.join(name for name in trailing if name not in after)} is gone"
    one = torch.ones(channels, dtype=torch.float64)
    slot = Slot(one, 0 * one, 0 * one, True, False, 0, after, module, None)
    for name, part in parts.items():
        if type(part) is nn.Identity:
            continue
        if reason := _read(slot, part):
            return f"{name} {reason}".strip()
    if slot.like is not None and len(slot.scale) != channels:
        return f"it has {len(slot.scale)} channels, the norm had {channels}"
    return slot


def _read(slot: Slot, part: nn.Module) -> str:
    """Put a part's map after what the slot has; say why it is none."""
    if isinstance(part, nn.modules.conv._ConvNd):  # a channel affine in a file without normconv
        size, bias = part.weight[0].numel(), part.bias
        if part.groups != part.out_channels or size != 1 or part.transposed or any(part.padding):
            return f"is a {type(part).__name__}, no map of single channels"
        scale = part.weight.detach().double().flatten()
        shift = torch.zeros_like(scale) if bias is None else bias.detach().double()
        mean, like = torch.zeros_like(scale), part.weight
    elif isinstance(part, (ChannelAffine, MeanOnlyBatchNorm)) or is_norm(part):
        state = norm_state(part)
        if isinstance(state, str):
            return f"is a {type(part).__name__}: {state}"
        scale, mean = state.affine.scale, state.mean.double() * state.affine.scale
        shift = torch.zeros_like(scale) if state.bias is None else state.bias.detach().double()
        like = state.mean
    else:
        return f"is a {type(part).__name__}, whose statistics are no constants"
    before = [scale * t.to(scale.device) for t in (slot.scale, slot.mean, slot.shift)]
    slot.scale, slot.mean, slot.shift = before[0], before[1] + mean, before[2] + shift
    if isinstance(part, MeanOnlyBatchNorm) or is_norm(part):
        # What the map before it added goes out again with the running mean.
        slot.mean, slot.shift = slot.mean - before[2], shift
        seen = getattr(part, "num_batches_tracked", None)
        slot.centers, slot.seen = True, 0 if seen is None else int(seen)
    slot.plain, slot.like = False, like
    return ""


@torch.no_grad()
def fill_norm_(norm: nn.Module, slot: Slot, eps: float) -> str:
    """Give a norm, in place, the values with which it is the slot's map; or say why it has none.

    With γ: σ² = 1 − eps (so that the root is 1), γ = scale. Without: σ² = 1/scale² − eps. With β:
    μ = mean / scale and β = shift. Without: μ = (mean − shift) / scale.

    >>> slot = read_slot(nn.Identity(), 2, ())
    >>> norm = nn.BatchNorm1d(2)
    >>> fill_norm_(norm, slot, norm.eps), norm.running_mean.tolist()
    ('', [0.0, 0.0])
    """
    held = {
        name: tensor
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        if isinstance(tensor := getattr(norm, name, None), Tensor)
    }
    root, scale = 1.0, slot.scale
    if "weight" in held:
        var = torch.full_like(scale, 1 - eps if eps < 1 else 1.0)
        root = 1.0 if eps < 1 else (1 + eps) ** 0.5
        held["weight"].copy_(scale * root)
    else:
        var = scale.square().reciprocal() - eps
        if not bool((scale > 0).all()):
            return "it has no γ, and its scale is not positive everywhere now"
        if not bool((var > 0).all()):
            return f"it has no γ, and beside eps = {eps} no σ² gives its scale now"
    if not {"running_mean", "running_var"} <= held.keys():
        return "the original keeps no running statistics"
    zero = scale == 0
    away = slot.mean if "bias" in held else slot.mean - slot.shift
    if "bias" in held:
        held["bias"].copy_(torch.where(zero, slot.shift - slot.mean, slot.shift))
    elif bool((zero & (away != 0)).any()):
        return "it has no β, and puts out a constant now"
    mean = torch.where(zero, torch.zeros_like(away), away / torch.where(zero, 1.0, scale))
    held["running_mean"].copy_(mean)
    held["running_var"].copy_(var)
    if "num_batches_tracked" in held:
        held["num_batches_tracked"].fill_(slot.seen)
    return ""


def responses(layer: Any, channels: Tensor, count: int) -> Tensor:
    """Return the matrix, (O, C), by which a layer answers to a shift of each channel before it.

    Args:
        layer: Linear or convolution, with a plain weight.
        channels: which channel each input feature is.
        count: C.

    >>> responses(nn.Linear(2, 3), torch.tensor([0, 0]), 1).shape
    torch.Size([3, 1])
    """
    groups = getattr(layer, "groups", 1)
    answers = [
        response_to_shift(layer.weight, (channels == channel).double(), groups)
        for channel in range(count)
    ]
    return torch.stack(answers, 1)
