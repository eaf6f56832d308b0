"""What a module puts out, kept small enough to keep it for every site of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["record_outputs"]

# A wrong fold is wrong in whole channels: a few positions of each are enough to see it.
_POSITIONS = 16
_SAMPLES = 4


@contextmanager
def record_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record what the named modules put out while the block runs.

    Args:
        model: hooks are put on it and taken off again.
        names: qualified names; names the model does not have are left out.

    Yields:
        For each name the outputs of its calls, in order, each cut down to (N, C, positions): all
        channels, at most 4 samples, at most 16 positions spread over the rest.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1))
    >>> with record_outputs(net, ["0"]) as seen:
    ...     _ = net(torch.zeros(8, 1, 9, 9))
    >>> seen["0"][0].shape
    torch.Size([4, 2, 16])
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        calls: list[Tensor] = []
        seen[name] = calls
        handles.append(module.register_forward_hook(_hook(calls), always_call=False))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hook(calls: list[Tensor]) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):  # a recurrent layer puts out its state as well
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                calls.append(_sample(leaf.detach()))

    return keep


def _sample(output: Tensor) -> Tensor:
    """Cut an output down; a copy, since the next layer may work in place."""
    if output.dim() < 2:
        return output.clone()
    flat = output[:_SAMPLES].flatten(2) if output.dim() > 2 else output[:_SAMPLES].unsqueeze(2)
    positions = flat.shape[2]
    if positions > _POSITIONS:
        chosen = torch.linspace(0, positions - 1, _POSITIONS, device=flat.device).long()
        return flat[:, :, chosen]
    return flat.clone()
