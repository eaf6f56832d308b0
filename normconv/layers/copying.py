"""Copying a model whole, whatever hangs on it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["copy_model"]

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, *, share_tensors: bool = False) -> Model:
    """Return a deep copy of a model.

    Legacy weight norm, among others, keeps a computed tensor as a plain attribute; deepcopy refuses
    tensors with a gradient history, so those are detached in the copy. The first forward makes them
    anew.

    Args:
        model: any module.
        share_tensors: the copy's modules are its own, its parameters and buffers are the model's:
            for edits that replace tensors and never write into them.

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
        if share_tensors:
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)
