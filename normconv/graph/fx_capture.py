"""Capture by `torch.fx` symbolic tracing: fast, stops at Python control flow."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from normconv.graph.calls import Call, CallGraph, first_shape
from normconv.graph.families import is_leaf
from normconv.graph.names import Names
from normconv.graph.quiet import quiet

__all__ = ["capture_with_fx", "graph_of", "is_fixed_batch_norm", "trace", "untouched_defaults"]


class _Tracer(fx.Tracer):
    """Keeps norms and linear operators whole, whoever subclassed them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def trace(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Trace a model into a GraphModule over its own submodules.

    Parameters of `forward` that the inputs leave at their defaults are fixed to them: a proxy in
    their place would take the wrong side of `if mask is None`.

    Args:
        model: in the mode that is to be traced; not changed.
        args: example inputs; with none, every parameter without a default is an input.
        kwargs: example keyword inputs.

    Raises:
        Exception: whatever tracing meets (control flow, unsupported calls).
    """
    graph = _Tracer().trace(model, concrete_args=untouched_defaults(model, args, kwargs or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx warns of attributes it cannot resolve by name
        return fx.GraphModule(model, graph, type(model).__name__)


def untouched_defaults(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters of `forward` that the inputs leave at their defaults."""
    signature = inspect.signature(model.forward)
    bound: Mapping[str, Any] = {}
    if args or kwargs:
        bound = signature.bind_partial(*args, **kwargs).arguments
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in bound
        and parameter.kind not in variadic
        and parameter.default is not inspect.Parameter.empty
    }


def capture_with_fx(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Names
) -> CallGraph:
    """Capture a forward pass with shapes, without computing it.

    Raises:
        Exception: whatever tracing or shape propagation meets.
    """
    traced = trace(model, args, kwargs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    values = [_value_of(node, bound) for node in traced.graph.nodes if node.op == "placeholder"]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), quiet():
        FakeTensorProp(traced, mode).propagate(*values)
    return graph_of(traced, names)


def _value_of(placeholder: fx.Node, bound: Mapping[str, Any]) -> Any:
    name = str(placeholder.target)
    if name in bound:
        return bound[name]
    if placeholder.args:
        return placeholder.args[0]  # a default that the trace was fixed to
    raise NotImplementedError(f"input {name!r} is variadic")


def graph_of(traced: fx.GraphModule, names: Names) -> CallGraph:
    """Turn a GraphModule's graph into a call graph; shapes come from node metadata where present."""
    index_of: dict[fx.Node, int] = {}
    calls: list[Call] = []
    reads: set[str] = set()
    for node in traced.graph.nodes:
        call = Call(
            index=len(calls),
            kind=_KINDS[node.op],
            target=_target_name(node, names),
            inputs=tuple(dict.fromkeys(index_of[used] for used in node.all_input_nodes)),
            shape=first_shape(_traced_value(node)),
        )
        index_of[node] = len(calls)
        calls.append(call)
        if node.op == "get_attr" and (owner := names.owner_of_attribute(str(node.target))):
            reads.add(owner)
    functional = tuple(node.name for node in traced.graph.nodes if is_fixed_batch_norm(node))
    return CallGraph(tuple(calls), "fx", frozenset(reads), functional)


def is_fixed_batch_norm(node: fx.Node) -> bool:
    """Say whether the node calls `F.batch_norm` with fixed statistics."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return False
    return not (node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False))


_KINDS: dict[str, Any] = {
    "placeholder": "input",
    "get_attr": "attribute",
    "call_module": "module",
    "call_function": "function",
    "call_method": "function",
    "output": "output",
}


def _target_name(node: fx.Node, names: Names) -> str:
    if node.op == "call_module":
        return names.canonical(str(node.target))
    if node.op == "call_function" and node.target is getattr:
        return f"getattr {node.args[1]}"
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def _traced_value(node: fx.Node) -> Any:
    """Fake tensors of a propagation here, or what other tools leave on a GraphModule's nodes."""
    return next(
        (node.meta[k] for k in ("val", "example_value", "tensor_meta") if k in node.meta), None
    )
