"""A hash of a model's structure: does a plan fit it?"""

from __future__ import annotations

import hashlib

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over names, classes and shapes of a model; weights do not enter.

    Classes count by their bare name, so that a model class may move between files.

    >>> fingerprint(nn.Linear(2, 3)) == fingerprint(nn.Linear(2, 3))
    True
    >>> fingerprint(nn.Linear(2, 3)) == fingerprint(nn.Linear(3, 2))
    False
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{path}:{type(module).__qualname__.rpartition('.')[2]}\n".encode())
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                shape = None if tensor is None or is_lazy(tensor) else tuple(tensor.shape)
                digest.update(f"  {name}:{shape}\n".encode())
    return digest.hexdigest()
