"""Capture by running the model: whatever Python does, every operation on a tensor is seen.

The last way, for models that neither `torch.fx` nor `torch.export` takes. One real forward pass is
watched at three levels: hooks tell the calls of norms and linear operators, a function mode tells the
calls of torch's functions between them, and a dispatch mode tells which memory each of those reads and
writes. Where it is in doubt whether a value is used, the graph says that it is.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normconv.graph.calls import CallGraph
from normconv.graph.families import is_leaf
from normconv.graph.names import Names
from normconv.graph.quiet import quiet
from normconv.graph.tracing import Trace, copied, shapes_of, tensors_in
from normconv.graph.watching import Functions, Operators, Watch

__all__ = ["Visit", "capture_with_hooks", "run_watched"]


def capture_with_hooks(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Names
) -> CallGraph:
    """Capture a forward pass by running it; the graph is that of the branches it took.

    Raises:
        ValueError: model or inputs are on the meta device, where nothing can be run.
        Exception: whatever the forward raises.
    """
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the meta device has no values to run the model on")
    trace = Trace(model, names)
    run_watched(model, args, kwargs, trace)
    return trace.graph()


@dataclass(frozen=True)
class Visit:
    """One call of a submodule.

    Args:
        shapes: of the tensors it was given.
        args: copies of its positional arguments; kept of the first call only.
        kwargs: copies of its keyword arguments; kept of the first call only.
    """

    shapes: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def run_watched(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: Trace,
    at: nn.Module | None = None,
    visits: list[Visit] | None = None,
) -> None:
    """Run a model on copies of the inputs and write down in a trace what it does.

    Args:
        model: in the mode it is to run in.
        args: positional inputs.
        kwargs: keyword inputs.
        trace: is filled.
        at: a submodule whose calls are numbered in the trace, from 1.
        visits: gets what each of those calls was given.

    Raises:
        Exception: whatever the forward raises.
    """
    args, kwargs = copied((args, dict(kwargs)))
    for name, value in _named(model, args, kwargs):
        for _, tensor in tensors_in(value):
            trace.add_input(name, tensor)
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.is_cuda})
    with torch.no_grad(), quiet(), torch.random.fork_rng(devices=devices):
        watch = Watch(trace)
        with (
            _leaves_watched(model, watch),
            _visits_numbered(watch, at, visits),
            Operators(watch),
            Functions(watch),
        ):
            output = model(*args, **kwargs)
        trace.finish(output)
        gc.collect()  # what only a cycle holds is not held
        trace.keep(output)


def _named(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    try:
        yield from inspect.signature(model.forward).bind(*args, **kwargs).arguments.items()
    except (TypeError, ValueError):  # the call will say what is wrong with them
        yield from [(f"argument {place}", value) for place, value in enumerate(args)]
        yield from kwargs.items()


@contextmanager
def _leaves_watched(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Tell the trace of every call of a norm or linear operator."""
    handles: list[Any] = []
    running: list[nn.Module | None] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside = watch.in_leaf()
        running.append(None if inside else module)
        if not inside:
            with watch.ours():
                watch.trace.enter("module", leaves[module])
                for _, tensor in tensors_in((args, kwargs)):
                    watch.trace.read(tensor)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if running and running.pop() is module:
            with watch.ours():
                if output is None:  # it raised, and the model may handle that
                    watch.trace.drop()
                else:
                    watch.trace.leave(output)

    leaves = {m: name for name, m in model.named_modules() if is_leaf(m)}
    try:
        for module in leaves:
            # Around the user's own hooks: what those do belongs to the call.
            before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            handles += [before, module.register_forward_hook(leave, always_call=True)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _visits_numbered(
    watch: Watch, at: nn.Module | None, visits: list[Visit] | None
) -> Iterator[None]:
    """Number the calls of one module; a call inside a call of itself is part of that."""
    depth, number = 0, 0

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth, number
        depth += 1
        if depth > 1:
            return
        number += 1
        watch.trace.extent = number
        if visits is not None:
            with watch.ours():
                kept = () if visits else copied((args, kwargs))
                visits.append(Visit(shapes_of((args, kwargs)), *kept))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            watch.trace.extent = 0

    if at is None:
        yield
        return
    handles: list[Any] = [
        at.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        at.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
