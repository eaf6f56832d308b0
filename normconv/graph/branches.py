"""Training mode for the sake of its branches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from normconv.graph.families import is_norm
from normconv.layers import MeanOnlyBatchNorm
from normconv.numerics import evaluating

__all__ = ["train_branches_", "training_branches"]

_NOT_TRAINING = (MeanOnlyBatchNorm, nn.modules.dropout._DropoutNd)


@contextmanager
def training_branches(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode, its norms and dropout apart; everything is restored after.

    What calls what is then as in training, and the norms compute as in eval mode: one value a channel is
    enough for them, and a momentum of None asks for no count.
    """
    with evaluating(model):
        train_branches_(model)
        yield


def train_branches_(model: nn.Module) -> None:
    """Set the flags that `training_branches` runs under."""
    model.train()
    for module in model.modules():
        if is_norm(module) or isinstance(module, _NOT_TRAINING):
            module.eval()
