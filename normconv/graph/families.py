"""Which modules are norms with fixed eval statistics, and what is in them. One table, by isinstance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normconv.layers import ChannelAffine, MeanOnlyBatchNorm, layout_of
from normconv.numerics import Affine, all_finite, norm_affine

__all__ = ["NormState", "has_known_forward", "is_leaf", "is_norm", "norm_state", "trailing_of"]

# Norms whose eval forward is the affine map of their statistics and nothing else, as torch wrote it.
_KNOWN_FORWARDS: tuple[Callable[..., Tensor], ...] = (
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    _InstanceNorm.forward,
    ChannelAffine.forward,
    MeanOnlyBatchNorm.forward,
)


def is_norm(module: nn.Module) -> bool:
    """Say whether the module is a norm that may have fixed statistics in eval mode.

    BatchNorm in all its subclasses, lazy ones included; InstanceNorm that keeps running statistics;
    and look-alikes, such as frozen BatchNorms, which hold 1-D `running_mean` and `running_var`.

    >>> is_norm(nn.SyncBatchNorm(4)), is_norm(nn.InstanceNorm2d(4)), is_norm(nn.GroupNorm(1, 4))
    (True, False, False)
    """
    if isinstance(module, _BatchNorm):
        return True
    if isinstance(module, _InstanceNorm):
        return bool(module.track_running_stats)
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return (
        isinstance(mean, Tensor)
        and isinstance(var, Tensor)
        and mean.dim() == 1
        and mean.shape == var.shape
        and not _is_quantised(module)
    )


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.", "torch.nn.intrinsic"))


def is_leaf(module: nn.Module) -> bool:
    """Say whether a capture must keep calls of the module whole."""
    ours = isinstance(module, (ChannelAffine, MeanOnlyBatchNorm))
    return ours or is_norm(module) or layout_of(module) is not None


def has_known_forward(norm: nn.Module) -> bool:
    """Say whether the norm computes with a forward that torch itself defines."""
    return "forward" not in vars(norm) and getattr(type(norm), "forward", 0) in _KNOWN_FORWARDS


def trailing_of(norm: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside the norm, in order: what a fused norm does after normalizing."""
    return dict(norm.named_children())


@dataclass(frozen=True)
class NormState:
    """The tensors of a norm.

    Args:
        mean: μ, (C,).
        var: σ², (C,).
        weight: γ, (C,) or None.
        bias: β, (C,) or None.
        eps: added to σ².
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def channels(self) -> int:
        """C."""
        return self.mean.numel()

    @property
    def affine(self) -> Affine:
        """The eval map in float64."""
        return norm_affine(self.mean, self.var, self.weight, self.bias, self.eps)

    @property
    def standardizing(self) -> Affine:
        """What the norm does before γ and β, in float64: (x − μ) / √(σ² + eps)."""
        return norm_affine(self.mean, self.var, None, None, self.eps)

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the statistics' and the parameters' dtype."""
        own = self.mean.dtype
        return own if self.weight is None else torch.promote_types(own, self.weight.dtype)

    @property
    def bias_trainable(self) -> bool | None:
        """`requires_grad` of β; None where there is no β."""
        return None if self.bias is None else self.bias.requires_grad

    @property
    def trainable(self) -> bool:
        """Whether γ or β is trained."""
        return any(t is not None and t.requires_grad for t in (self.weight, self.bias))

    @property
    def untrained(self) -> bool:
        """Whether the statistics are still at their initial values, μ = 0 and σ² = 1."""
        if self.mean.is_meta:
            return False
        return bool((self.mean == 0).all()) and bool((self.var == 1).all())


def norm_state(norm: nn.Module) -> NormState | str:
    """Read a norm's tensors, or say in one sentence why they cannot be read.

    A `ChannelAffine` reads as a norm with μ = 0, σ² = 1, eps = 0, a `MeanOnlyBatchNorm` as one with
    σ² = 1, eps = 0.

    >>> norm_state(nn.BatchNorm1d(2, track_running_stats=False))
    'it keeps no running statistics, so eval mode normalizes with the batch'
    """
    if isinstance(norm, ChannelAffine):
        zero, one = torch.zeros_like(norm.scale), torch.ones_like(norm.scale)
        return NormState(zero, one, norm.scale, norm.shift, 0.0)
    if isinstance(norm, MeanOnlyBatchNorm):
        mean = norm.running_mean
        only = NormState(mean, torch.ones_like(mean), None, norm.bias, 0.0)
        return _unusable_values(only) or only
    any_norm: Any = norm
    if isinstance(norm, _LazyNormBase) and norm.has_uninitialized_params():
        return "it is lazy and has no parameters yet"
    mean, var = any_norm.running_mean, any_norm.running_var
    if mean is None or var is None:
        return "it keeps no running statistics, so eval mode normalizes with the batch"
    if is_lazy(mean):
        return "it is lazy and has no parameters yet"
    eps = getattr(norm, "eps", None)
    if not isinstance(eps, (int, float)):
        eps = _eps_inside(norm)
        if eps is None:
            return "it has no number `eps`, and its forward does not tell it"
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape != mean.shape):
            return f"its {name} is not one number a channel"
    if mean.numel() == 0:
        return "it has zero channels"
    state = NormState(mean, var, weight, bias, float(eps))
    return _unusable_values(state) or state


def _eps_inside(norm: nn.Module) -> float | None:
    """Measure the eps of a norm that has it in its code: with γ = 1 and σ² = 0 its slope is 1/√eps.

    Whether the norm is the affine map that this eps makes of it is the probe's business.
    """
    twin: Any = copy.deepcopy(norm)
    if any(t.is_meta for t in [*twin.parameters(), *twin.buffers()]):
        twin = twin.to_empty(device="cpu")
    twin = twin.to(device="cpu", dtype=torch.float64).eval()
    channels = twin.running_mean.numel()
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 0.0}
    try:
        with torch.no_grad():
            for name, value in values.items():
                if isinstance(getattr(twin, name, None), Tensor):
                    getattr(twin, name).fill_(value)
            slope = twin(torch.ones(1, channels, 1, 1, dtype=torch.float64)).flatten()[0].item()
    except Exception:  # the class is the user's
        return None
    eps = slope**-2 if slope else 0.0
    return float(f"{eps:.7g}") if 0 < eps < 1 else None


def _unusable_values(state: NormState) -> str:
    if state.mean.is_meta:
        return ""
    tensors = {"running_mean": state.mean, "running_var": state.var}
    tensors |= {k: t for k, t in (("weight", state.weight), ("bias", state.bias)) if t is not None}
    broken = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if broken:
        return f"{' and '.join(broken)} holds NaN or infinity"
    if bool((state.var.double() + state.eps <= 0).any()):
        return "running_var + eps is not positive everywhere"
    return ""
