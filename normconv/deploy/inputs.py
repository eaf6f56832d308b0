"""The example inputs of a model: by name, and of other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.deploy.axes import Axes
from normconv.proof.outputs import flat_outputs

__all__ = [
    "at_size",
    "batch_size",
    "has_batch",
    "named_inputs",
    "places",
    "resized",
    "size_of",
    "stretched",
]


def stretched(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a tensor of another size along an axis: its first entries, then repeats.

    A repeat of floats is shrunk by eighths, so that no two entries are the same and a graph that
    mixes them up is seen.

    >>> stretched(torch.tensor([[8.0, 16.0]]), 1, 3)
    tensor([[ 8., 16.,  7.]])
    """
    own = tensor.shape[axis]
    index = torch.arange(size, device=tensor.device)
    taken = tensor.index_select(axis, index % own)
    if not taken.is_floating_point():
        return taken
    # 1, 7/8, 6/8 ... 1/8, 1: exact in every dtype.
    scale = 1.0 - (index // own % 8).to(taken.dtype) / 8.0
    return taken * scale.reshape([-1 if i == axis else 1 for i in range(taken.ndim)])


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the first axis of the first tensor that has one; None when there is none.

    >>> batch_size((torch.tensor(3.0), torch.zeros(4, 2)), {})
    4
    """
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return None


def has_batch(leaf: Any, batch: int) -> bool:
    """Tell whether a leaf of the inputs is a tensor with that first axis."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def resized(value: Any, batch: int, size: int) -> Any:
    """Return nested inputs with `size` samples: the first ones, then repeats, as `stretched` makes.

    Args:
        value: nested inputs.
        batch: the first axis of the tensors that are resized; others stay.
        size: how many samples are wanted.
    """
    if size == batch:
        return value

    def resize(leaf: Any) -> Any:
        return stretched(leaf, 0, size) if has_batch(leaf, batch) else leaf

    return pytree.tree_map(resize, value)


def named_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return every input tensor by the name it has in an exported graph.

    >>> list(named_inputs(nn.Linear(2, 1), (torch.zeros(1, 2),), {}))
    ['input']
    """
    signature = inspect.signature(model.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    tensors = flat_outputs(arguments)
    return {
        name.removeprefix("output.").replace(".", "_"): value for name, value in tensors.items()
    }


def places(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], free: Axes, name: str
) -> list[tuple[Tensor, int]]:
    """Return every input tensor with an axis of that name, and which axis it is."""
    named = named_inputs(model, args, kwargs)
    return [
        (named[key], axis)
        for key, axes in free.items()
        for axis, its in axes.items()
        if its == name
    ]


def size_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], free: Axes, name: str
) -> int:
    """Return the size of the axes of one name, which is the same for all of them."""
    tensor, axis = places(model, args, kwargs, free, name)[0]
    return int(tensor.shape[axis])


def at_size(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    free: Axes,
    name: str,
    size: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs with another size along the axes of one name.

    Args:
        model: whose inputs they are.
        args: positional inputs.
        kwargs: keyword inputs.
        free: the free axes, by input.
        name: the name of those to change.
        size: the size they get.
    """
    axis_of = {id(tensor): axis for tensor, axis in places(model, args, kwargs, free, name)}

    def change(leaf: Any) -> Any:
        return stretched(leaf, axis_of[id(leaf)], size) if id(leaf) in axis_of else leaf

    changed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(change, (args, dict(kwargs)))
    return changed
