"""Running a model so that a second run gives the same: eval mode, no gradients, fixed seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating"]

_SEED = 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, without gradients and with a fixed seed; restore everything after.

    The training flag is restored module by module: a model with frozen parts has mixed flags.
    """
    flags = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            yield
    finally:
        for module, training in flags:
            module.training = training
