"""A model as it was, and what is different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["assert_unchanged", "snapshot", "tensors_of"]


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that hangs on a model, plain attributes included."""
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers, module.__dict__):
            for key, value in store.items():
                if isinstance(value, Tensor):
                    yield f"{path}.{key}", value


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Modules, modes, hooks, attributes; tensors with their values."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        found[path] = (id(module), module.training, tuple(module.__dict__), tuple(map(id, hooks)))
    for path, tensor in tensors_of(model):
        found[f"{path} tensor"] = (id(tensor), tensor.requires_grad, tensor.detach().clone())
    return found


def assert_unchanged(before: Mapping[str, Any], model: nn.Module, what: str) -> None:
    """Hold a model against its snapshot."""
    after = snapshot(model)
    assert before.keys() == after.keys(), f"{what} changes the model"
    for key, (*flags, value) in before.items():
        *flags_now, now = after[key]
        same = torch.equal(now, value) if isinstance(value, Tensor) else now == value
        same = same and flags == flags_now
        assert same, f"{what} changes {key}"
