"""Capture: from a model and example inputs to a call graph, by the first way that works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from normconv.errors import CaptureError, Problem
from normconv.graph.calls import CallGraph
from normconv.graph.export_capture import capture_with_export
from normconv.graph.families import is_leaf
from normconv.graph.fx_capture import capture_with_fx
from normconv.graph.hook_capture import capture_with_hooks
from normconv.graph.names import Names
from normconv.graph.running import first_line, refuse_to_run
from normconv.graph.tracing import shapes_of
from normconv.numerics import state_kept

__all__ = ["METHODS", "capture"]

Method = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Names], CallGraph]

METHODS: tuple[tuple[str, Method], ...] = (
    ("fx", capture_with_fx),
    ("export", capture_with_export),
    ("hooks", capture_with_hooks),
)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    methods: tuple[str, ...] | None = None,
) -> CallGraph:
    """Capture one forward pass of the model in its present mode. Nothing of it is changed.

    `fx` and `export` compute nothing. When the first way fails the model is run once, so that inputs
    it does not take are told as that and not once for every way; `hooks` runs it as well.

    Args:
        model: any module; dtype and device of the inputs must fit it.
        args: positional example inputs.
        kwargs: keyword example inputs.
        methods: which captures to try, in order; all by default.

    Raises:
        CaptureError: the model does not run on the inputs, naming the module that raised; or every
            capture failed, saying how each did.
    """
    if methods is None and is_leaf(model):
        methods = ("hooks",)  # a norm or layer taken alone: a trace would look inside it
    names = Names(model)
    failures: dict[str, str] = {}
    for name, method in METHODS:
        if methods is not None and name not in methods:
            continue
        try:
            with state_kept(model):
                graph = method(model, args, kwargs or {}, names)
        except (
            Exception
        ) as reason:  # the model is the user's: any exception means "try the next way"
            if not failures:
                with state_kept(model):
                    refuse_to_run(model, args, kwargs or {})
            failures[name] = first_line(reason)
            continue
        return replace(graph, failures=failures)
    raise CaptureError(_all_failed(model, failures, (args, kwargs or {})))


def _all_failed(model: nn.Module, failures: Mapping[str, str], given: Any) -> list[Problem]:
    """A reason that several ways met is told once."""
    by_reason: dict[str, list[str]] = {}
    for name, why in failures.items():
        by_reason.setdefault(why, []).append(name)
    way_out = (
        f"check that the example inputs ({shapes_of(given)}) are what the model is used with, or convert "
        "the submodule that holds the norms (at=, --at)"
    )
    return [
        Problem(f"{type(model).__name__} ({' and '.join(methods)})", why, way_out)
        for why, methods in by_reason.items()
    ]
