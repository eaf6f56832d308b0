"""Capture: from a model and example inputs to a call graph, by the first way that works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from normconv.errors import CaptureError, Problem
from normconv.graph.calls import CallGraph
from normconv.graph.export_capture import capture_with_export
from normconv.graph.fx_capture import capture_with_fx
from normconv.graph.names import Names
from normconv.numerics import state_kept

__all__ = ["METHODS", "capture"]

Method = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Names], CallGraph]

METHODS: tuple[tuple[str, Method], ...] = (
    ("fx", capture_with_fx),
    ("export", capture_with_export),
)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    methods: tuple[str, ...] | None = None,
) -> CallGraph:
    """Capture one forward pass of the model in its present mode. Nothing is computed or changed.

    Args:
        model: any module; dtype and device of the inputs must fit it.
        args: positional example inputs.
        kwargs: keyword example inputs.
        methods: which captures to try, in order; all by default.

    Raises:
        CaptureError: every capture failed; says how each did.
    """
    with state_kept(model):
        return _first_that_works(model, args, kwargs or {}, methods)


def _first_that_works(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    methods: tuple[str, ...] | None,
) -> CallGraph:
    names = Names(model)
    failures: dict[str, str] = {}
    for name, method in METHODS:
        if methods is not None and name not in methods:
            continue
        try:
            graph = method(model, args, kwargs, names)
        except (
            Exception
        ) as reason:  # the model is the user's: any exception means "try the next way"
            failures[name] = _first_line(reason)
            continue
        return replace(graph, failures=failures)
    # One reason that every way met is told once.
    by_reason: dict[str, list[str]] = {}
    for name, why in failures.items():
        by_reason.setdefault(why, []).append(name)
    given = [*args, *kwargs.values()]
    shapes = ", ".join(str(tuple(value.shape)) for value in given if hasattr(value, "shape"))
    way_out = f"check that the example inputs ({shapes or 'no tensors'}) fit the model"
    raise CaptureError(
        [
            Problem(f"{type(model).__name__} ({' and '.join(methods_)})", why, way_out)
            for why, methods_ in by_reason.items()
        ]
    )


def _first_line(reason: Exception) -> str:
    text = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {text[0] if text else 'no message'}"[:300]
