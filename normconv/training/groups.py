"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from normconv.errors import Problem, UsageError
from normconv.graph import is_norm
from normconv.layers import ChannelAffine, MeanOnlyBatchNorm, Reparametrised

__all__ = ["param_groups"]


def param_groups(model: nn.Module, weight_decay: float, **options: Any) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: the weights, which decay, and the rest, which does not.

    Gains (g, s, gain; torch's weight norms too), biases, and what norms and channel affines multiply and
    add do not decay: with w = g v / ‖v‖ decay of g pulls the function to 0, decay of v only changes the
    step that v takes. Each trained parameter is in one group, once.

    Args:
        model: read only.
        weight_decay: of the first group; the second has 0.
        options: for both groups, such as ``lr``.

    Raises:
        UsageError: the decay is negative, or nothing in the model is trained.

    >>> from normconv.layers import weight_norm_
    >>> net = nn.Sequential(weight_norm_(nn.Linear(3, 2)), nn.LayerNorm(2), nn.Linear(2, 1))
    >>> [len(group["params"]) for group in param_groups(net, 1e-4)]
    [2, 5]
    """
    if not weight_decay >= 0:
        raise UsageError(Problem("weight_decay", f"{weight_decay} is not 0 or more"))
    kept = {id(parameter) for module in model.modules() for parameter in _undecayed(module)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UsageError(Problem(type(model).__name__, "none of its parameters is trained"))
    decayed = [parameter for parameter in trained if id(parameter) not in kept]
    rest = [parameter for parameter in trained if id(parameter) in kept]
    return [
        {"params": decayed, "weight_decay": weight_decay, **options},
        {"params": rest, "weight_decay": 0.0, **options},
    ]


def _undecayed(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters that are gains, biases or the affine of a norm."""
    gains = {hook.name + "_g" for hook in _hooks(module)}
    if isinstance(module, Reparametrised):
        gains |= {module.parts(name)[0] for name in module.weights}
    if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], _WeightNorm):
        gains.add("original0")
    affine = isinstance(module, (ChannelAffine, MeanOnlyBatchNorm)) or _is_a_norm(module)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        bias = name.startswith("bias") or name.endswith("bias")
        if name in gains or bias or (affine and parameter.dim() < 2):
            yield parameter


def _hooks(module: nn.Module) -> list[WeightNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]


def _is_a_norm(module: nn.Module) -> bool:
    """BatchNorm and its like, and whatever calls itself a norm: LayerNorm, RMSNorm, GroupNorm."""
    return is_norm(module) or any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
