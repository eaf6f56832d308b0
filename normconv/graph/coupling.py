"""Where samples of a batch would still see each other after a conversion."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normconv.graph.calls import CallGraph
from normconv.layers import MeanOnlyBatchNorm

__all__ = ["batch_norm_calls", "couples_in_training"]


def couples_in_training(norm: nn.Module) -> bool:
    """Say whether the norm, left as it is, lets samples see each other in training mode.

    BatchNorm does, mean-only or not; InstanceNorm normalizes each sample by itself, and a frozen norm
    by constants.

    >>> couples_in_training(nn.BatchNorm2d(1)), couples_in_training(nn.InstanceNorm2d(1))
    (True, False)
    """
    mixes = isinstance(norm, (_BatchNorm, MeanOnlyBatchNorm))
    return mixes and not isinstance(norm, _InstanceNorm)


def batch_norm_calls(graph: CallGraph) -> int:
    """Count the calls of `F.batch_norm` that normalize activations with their own batch.

    Weight standardization by `F.batch_norm` is none: what it takes does not come from the model's input.
    """
    derived: set[int] = set()
    for call in graph.calls:
        if call.kind == "input" or derived.intersection(call.inputs):
            derived.add(call.index)
    calls = [c for c in graph.calls if c.kind == "function" and c.target == "batch_norm"]
    # Those with fixed statistics are counted apart.
    return max(0, sum(c.index in derived for c in calls) - len(graph.functional_norms))
