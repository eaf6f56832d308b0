"""One computed weight for several uses of it: across calls, layers and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.layers import Reparametrised

__all__ = ["CachedWeights", "cached_weights"]


class _Entry(NamedTuple):
    """A weight that is in use.

    Args:
        name: of the weight, for errors.
        computed: with its graph, back to its parts.
        leaf: what the layers get, which collects the gradient.
        parts: what the weight is computed from.
        versions: those of the parts when it was computed.
    """

    name: str
    computed: Tensor
    leaf: Tensor
    parts: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @property
    def stale(self) -> bool:
        """Whether a part was written since."""
        return self.versions != _versions(self.parts)


def _versions(parts: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(part._version for part in parts)


class CachedWeights:
    """The weights in use within `cached_weights`."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def flush(self) -> None:
        """Add what was collected to the gradients of the parameters, and forget the weights.

        One backward pass through each weight, however often it was used.

        Raises:
            UsageError: parameters changed since their weights were computed; nothing was added.
        """
        used = [entry for entry in self._entries.values() if entry.leaf.grad is not None]
        changed = [entry.name for entry in used if entry.stale]
        self._entries.clear()
        if changed:
            what = "its parameters were written before the gradient of the weight came to them"
            way_out = "call flush() before optimizer.step(), or step outside of cached_weights"
            raise UsageError([Problem(name, what, way_out) for name in changed])
        if used:
            computed, grads = [e.computed for e in used], [e.leaf.grad for e in used]
            torch.autograd.backward(computed, grads)

    def _weight(self, path: str, layer: Reparametrised, name: str) -> Tensor:
        parts = layer.gain_and_v(name)
        key = (*map(id, parts), layer.row_layout(name))
        entry = self._entries.get(key)
        if entry is not None and entry.stale and entry.leaf.grad is None:
            entry = None
        if entry is None:
            with torch.enable_grad():
                computed = type(layer).computed(layer, name)
            leaf = computed.detach().requires_grad_(computed.requires_grad)
            full = f"{path}.{name}".lstrip(".")
            entry = self._entries[key] = _Entry(full, computed, leaf, parts, _versions(parts))
        return entry.leaf


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[CachedWeights]:
    """Compute each reparametrised weight once, and differentiate it once, until the end of the block.

    All calls of a layer, of the steps of a recurrent one, and of layers that share their parameters use
    one tensor. It collects the gradient of every backward pass; at the end, or when `flush()` is called,
    that is pulled back to g and v, or gain and v, in one piece. What the parameters hold then is what
    they would without the block, up to the order of sums.

    Args:
        model: with reparametrised layers; their parameters must not change while a gradient is collected.
            A block within a block of the same layers leaves all to the outer one.

    Returns:
        A context manager that gives a `CachedWeights`.

    Raises:
        UsageError: parameters are sharded over processes, which gather them for each call; at the end or
            at `flush()`: parameters changed before their gradient came.

    >>> from normconv.layers import weight_norm_
    >>> net = nn.Sequential(weight_norm_(nn.Linear(2, 1)))
    >>> with cached_weights(net):
    ...     for _ in range(4):
    ...         net(torch.ones(1, 2)).sum().backward()
    ...     seen = net[0].weight_v.grad
    >>> seen is None, net[0].weight_v.grad.shape
    (True, torch.Size([1, 2]))
    """
    _check_whole(model)
    cache, taken = CachedWeights(), []
    for path, layer in model.named_modules():
        # What an outer block has taken stays its own.
        if isinstance(layer, Reparametrised) and "computed" not in layer.__dict__:
            layer.__dict__["computed"] = _Reader(cache, path, layer)
            taken.append(layer)
    try:
        yield cache
    finally:
        for layer in taken:
            del layer.__dict__["computed"]
        cache.flush()


def _check_whole(model: nn.Module) -> None:
    """Refuse parameters that a call gathers and gives back before a cached weight is pulled back."""
    problems = []
    for path, layer in model.named_modules():
        for name in layer.weights if isinstance(layer, Reparametrised) else ():
            if any(hasattr(part, "placements") for part in layer.gain_and_v(name)):
                full = f"{path}.{name}".lstrip(".")
                way_out = "leave cached_weights out, or keep plain weights and use reparametrise()"
                problems.append(Problem(full, "its parameters are sharded over processes", way_out))
    if problems:
        raise UsageError(problems)


class _Reader:
    """Stands in for the method `computed` of one layer."""

    def __init__(self, cache: CachedWeights, path: str, layer: Reparametrised) -> None:
        self.cache, self.path, self.layer = cache, path, layer

    def __call__(self, name: str = "weight") -> Tensor:
        if torch.is_inference_mode_enabled():
            return type(self.layer).computed(self.layer, name)
        return self.cache._weight(self.path, self.layer, name)

    def __reduce__(self) -> Any:
        what = "a layer within cached_weights is tied to the block"
        raise UsageError(Problem(self.path, what, "copy or save the model outside of it"))
