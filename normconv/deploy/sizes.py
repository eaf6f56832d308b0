"""Inputs of other sizes, along the axes that a candidate leaves free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normconv.deploy.axes import prime_below
from normconv.deploy.inputs import batch_size, resized
from normconv.deploy.runners import FileRunner, ModuleRunner, ProgramRunner, Runner

__all__ = ["OTHER_BATCHES", "Sized", "other_sizes"]

#: The batches at which a free batch axis is tried besides the example's own.
OTHER_BATCHES = (1, 3)

Axes = dict[int, str]  # the free axes of one tensor, by their names


class Sized(NamedTuple):
    """Inputs of one size.

    Args:
        label: what is different, e.g. ``"batch 3 "``; empty for the inputs as given.
        args: positional inputs.
        kwargs: keyword inputs.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def other_sizes(
    candidate: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Sized]:
    """Yield the inputs at one sample and three, and at a shorter prime along every other free axis.

    A file says which of its axes are free; of a module only the batch axis counts as such.

    Args:
        candidate: what is run.
        args: example inputs.
        kwargs: example keyword inputs.
    """
    given = (args, dict(kwargs))
    free = _free_axes(candidate, args, kwargs)
    batch = batch_size(args, kwargs)
    batched = any(0 in axes for axes in free.values())
    if batch is not None and batched:
        for size in OTHER_BATCHES:
            if size != batch:
                yield Sized(f"batch {size} ", *resized(given, batch, size))
    names = dict.fromkeys(name for axes in free.values() for axis, name in axes.items() if axis)
    for name in names:
        found = next(_sizes(given, free, name), None)
        shorter = None if found is None else prime_below(found)
        if shorter is not None:
            yield Sized(f"{name} {shorter} ", *_shortened(given, free, name, shorter))


def _free_axes(
    candidate: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int, Axes]:
    """Return the free axes of each tensor, by its identity."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    if isinstance(candidate, FileRunner):
        shapes = {spec.name: spec.shape for spec in candidate.specs}
        named = candidate.named(args, kwargs)
        return {
            id(tensor): {a: str(s) for a, s in enumerate(shapes[name]) if not isinstance(s, int)}
            for name, tensor in named.items()
        }
    if isinstance(candidate, ProgramRunner):
        shapes_of = candidate.input_shapes()
        return {
            id(tensor): {a: str(s) for a, s in enumerate(shape) if not isinstance(s, int)}
            for tensor, shape in zip(leaves, shapes_of, strict=False)
        }
    if not isinstance(candidate, ModuleRunner):
        return {}
    batch = batch_size(args, kwargs)
    return {id(t): {0: "batch"} for t in leaves if t.ndim and t.shape[0] == batch}


def _sizes(given: Any, free: Mapping[int, Axes], name: str) -> Iterator[int]:
    for leaf in pytree.tree_leaves(given):
        for axis, its in free.get(id(leaf), {}).items():
            if its == name and isinstance(leaf, torch.Tensor):
                yield int(leaf.shape[axis])


def _shortened(given: Any, free: Mapping[int, Axes], name: str, size: int) -> Any:
    def shorten(leaf: Any) -> Any:
        for axis, its in free.get(id(leaf), {}).items():
            if its == name:
                leaf = leaf.narrow(axis, 0, size)
        return leaf

    return pytree.tree_map(shorten, given)
