"""Running a model so that a second run gives the same: eval mode, no gradients, fixed seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "in_training_mode"]

_SEED = 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, without gradients and with a fixed seed; restore everything after.

    The training flag is restored module by module: a model with frozen parts has mixed flags.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with _flags_kept(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        model.eval()
        torch.manual_seed(_SEED)
        yield


@contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode; restore each module's flag after."""
    with _flags_kept(model):
        model.train()
        yield


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
