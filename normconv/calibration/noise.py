"""Dropout and other noise of training, left on in runs that are in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from normconv.graph import couples_in_training, is_norm

__all__ = ["noise_on"]


@contextmanager
def noise_on(model: nn.Module, seed: int) -> Iterator[None]:
    """Put what is random in training back into training mode whenever the model is called inside.

    That is every module without parameters, buffers and children that is no norm: dropout of all kinds,
    stochastic depth, noise. Each call of the model begins with the same seed, so that all draw the same.

    Args:
        model: called inside in eval mode, by one who restores flags and the random state.
        seed: of every call.

    >>> net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)).eval(), torch.ones(1, 64)
    >>> with noise_on(net, 0):
    ...     torch.equal(net(x), net(x)), net[0].training, net[1].training
    (True, True, False)
    >>> net[0].eval()(x).sum().item()
    64.0
    """
    random = [module for module in model.modules() if _may_be_random(module)]

    def begin(module: nn.Module, inputs: Any) -> None:
        torch.manual_seed(seed)
        for each in random:
            each.training = True

    handle = model.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()


def _may_be_random(module: nn.Module) -> bool:
    own = (module._parameters, module._buffers, module._modules)
    return not any(own) and not is_norm(module) and not couples_in_training(module)
