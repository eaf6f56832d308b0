"""One name for every module and tensor of a model, however many paths lead to it."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

__all__ = ["Names"]


class Names:
    """First names and aliases, by identity.

    Args:
        model: read, not kept in step with later edits.

    >>> block = nn.Linear(1, 1)
    >>> names = Names(nn.ModuleDict({"a": block, "b": block}))
    >>> names.canonical("b"), names.aliases("a"), names.owners(block.weight)
    ('a', ('b',), ('a',))
    """

    def __init__(self, model: nn.Module) -> None:
        self._module_paths: dict[int, list[str]] = defaultdict(list)
        self._by_path: dict[str, nn.Module] = {}
        self._owners: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self._module_paths[id(module)].append(path)
            self._by_path[path] = module
        for module in model.modules():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    self._owners[id(tensor)].append(self._module_paths[id(module)][0])

    def canonical(self, path: str) -> str:
        """Return the first name of the module at `path`."""
        return self._module_paths[id(self._by_path[path])][0]

    def known(self, path: str) -> bool:
        """Say whether a module stands at `path`."""
        return path in self._by_path

    def aliases(self, path: str) -> tuple[str, ...]:
        """Return the module's other names."""
        return tuple(self._module_paths[id(self._by_path[path])][1:])

    def owners(self, tensor: Tensor | torch.nn.Parameter) -> tuple[str, ...]:
        """Return the modules that register this tensor; more than one means it is tied."""
        return tuple(self._owners.get(id(tensor), ()))

    def owners_of_attribute(self, path: str) -> tuple[str, ...]:
        """Return the modules that register the tensor at `path`: all of them, where it is tied."""
        owner, _, name = path.rpartition(".")
        module = self._by_path.get(owner)
        tensor = None if module is None else getattr(module, name, None)
        return self.owners(tensor) if isinstance(tensor, Tensor) else ()

    def owner_of_attribute(self, path: str) -> str | None:
        """Return the first name of the module whose tensor is read as `path`, e.g. ``bn.weight``."""
        owner, _, _ = path.rpartition(".")
        return self.canonical(owner) if owner in self._by_path else None
