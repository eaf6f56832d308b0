"""Copying a model whole, whatever hangs on it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["copy_model"]

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """Return a deep copy of a model.

    Legacy weight norm, among others, keeps a computed tensor as a plain attribute; deepcopy refuses
    tensors with a gradient history, so those are detached in the copy. The first forward makes them
    anew.

    >>> import torch, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     layer = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    >>> copy_model(layer).weight.requires_grad
    False
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
