"""torch's own weight norm, in both of its forms: read, never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["fold_hooked_", "fold_parametrized_", "hooked_names", "parametrized_names"]


def hooked_names(module: nn.Module) -> tuple[str, ...]:
    """Return the tensors under `torch.nn.utils.weight_norm` (a forward pre-hook)."""
    return tuple(h.name for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm))


def parametrized_names(module: nn.Module) -> tuple[str, ...]:
    """Return the tensors under `torch.nn.utils.parametrizations.weight_norm` and nothing else."""
    if not parametrize.is_parametrized(module):
        return ()
    lists: Any = module.parametrizations
    return tuple(
        n for n, chain in lists.items() if len(chain) == 1 and isinstance(chain[0], _WeightNorm)
    )


def fold_hooked_(module: nn.Module, name: str) -> Tensor:
    """Replace a hooked weight by its plain value, in place; return which slices were repaired."""
    key, hook = next(
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, WeightNorm) and hook.name == name
    )
    g, v = getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
    value, repaired = _value(g, v, hook.dim)
    trainable = g.requires_grad or v.requires_grad
    del module._forward_pre_hooks[key]
    module.__dict__.pop(name, None)  # the value of the last forward, or a stale one
    _replace(module, (f"{name}_g", f"{name}_v"), name, nn.Parameter(value, requires_grad=trainable))
    return repaired


def fold_parametrized_(module: nn.Module, name: str) -> Tensor:
    """Replace a parametrized weight by its plain value, in place; return which slices were repaired."""
    chain: Any = getattr(module.parametrizations, name)
    g, v = chain.original0, chain.original1
    value, repaired = _value(g, v, chain[0].dim)
    trainable = g.requires_grad or v.requires_grad
    # torch makes one class per layer, deepcopy shares it, and removing deletes a property from it:
    # on a class of its own the copy leaves the layer it was copied from whole.
    shared: Any = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    # On a frozen model torch leaves a buffer there, else a Parameter of its own making.
    module._buffers.pop(name, None)
    module._parameters.pop(name, None)
    _replace(module, (), name, nn.Parameter(value, requires_grad=trainable))
    # torch leaves behind a local function, with which no module can be pickled.
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        inner = getattr(hook, "hook", hook)
        if "_weight_norm_compat_hook" in getattr(inner, "__qualname__", ""):
            del hooks[key]
    return repaired


def _value(g: Tensor, v: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """Return the float64 value of g · v / ‖v‖ rounded once, and where ‖v‖ = 0.

    Args:
        g: one gain a slice.
        v: the direction.
        dim: the axis that is not summed over; None or -1 takes the norm of the whole tensor, as
            torch does.
    """
    with torch.no_grad():
        wide = v.double()
        if dim is None or dim == -1:
            norms = torch.linalg.vector_norm(wide)
        else:
            axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
            norms = torch.linalg.vector_norm(wide, dim=axes, keepdim=True) if axes else wide.abs()
        zero = norms == 0
        factor = g.double().reshape(norms.shape) / torch.where(zero, torch.ones_like(norms), norms)
        value = torch.empty_like(v)
        value.copy_(wide * factor)
        return value, zero.flatten()


def _replace(module: nn.Module, old: tuple[str, ...], name: str, parameter: nn.Parameter) -> None:
    """Register the plain weight first, where layers of torch have it."""
    rest = {n: p for n, p in module._parameters.items() if n not in old}
    module._parameters.clear()
    module._parameters.update({name: parameter, **rest})
