"""Capture by `torch.fx` symbolic tracing: fast, stops at Python control flow."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.modules.batchnorm import _NormBase

from normconv.graph.calls import LIKE, Call, CallGraph, first_shape, function_name
from normconv.graph.families import is_leaf, is_norm
from normconv.graph.names import Names
from normconv.graph.quiet import quiet
from normconv.layers import Reparametrised

__all__ = ["capture_with_fx", "graph_of", "is_fixed_batch_norm", "trace", "untouched_defaults"]


class _Tracer(fx.Tracer):
    """Keeps norms and linear operators whole, whoever subclassed them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A reparametrised layer of torch's, such as an LSTM, is as whole as the layer that it was.
        of_torch = isinstance(m, Reparametrised) and m.plain_class.__module__.startswith("torch.nn")
        return of_torch or is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


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
        _Propagation(traced, mode).propagate(*values)
    return graph_of(traced, names)


class _Propagation(FakeTensorProp):
    """Keeps sizes and other plain values as well; runs no norm whose output is like its input."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.fetch_attr(target)
        if len(args) == 1 and not kwargs and _is_like_its_input(module, args[0]):
            # torch decomposes a fake batch norm anew each time: most of the time of a capture.
            return torch.empty_like(args[0])
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if _is_plain(value):
            n.meta[_PLAIN] = value
        return value


def _is_like_its_input(module: nn.Module, x: Any) -> bool:
    """Whether the module is a norm and nothing speaks against its taking x.

    One whose forward we do not know is probed later on, and refused if it is no such map.
    """
    mean = getattr(module, "running_mean", None)
    if mean is None or not is_norm(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or not isinstance(x, Tensor):
        return False
    if isinstance(module, _NormBase):
        module._check_input_dim(x)
    fits = x.dim() > 1 and x.shape[1] == mean.numel() and x.numel() > 0
    return fits and (x.dtype, x.device) == (mean.dtype, mean.device)


_PLAIN = "normconv_plain_value"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float))


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
        node_args, node_kwargs = _arguments(node)
        used = node.all_input_nodes
        if node_args != node.args:
            used = used[:1]
        call = Call(
            index=len(calls),
            kind=_KINDS[node.op],
            target=_target_name(node, names),
            inputs=tuple(dict.fromkeys(index_of[source] for source in used)),
            shape=first_shape(_traced_value(node)),
            constant=node.meta.get(_PLAIN),
            compute=_computation(node, node_args, node_kwargs, index_of),
        )
        index_of[node] = len(calls)
        calls.append(call)
        if node.op == "get_attr" and (owner := names.owner_of_attribute(str(node.target))):
            reads.add(owner)
    functional = tuple(node.name for node in traced.graph.nodes if is_fixed_batch_norm(node))
    return CallGraph(tuple(calls), "fx", frozenset(reads), functional)


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the node's arguments; of a tensor that is only a shape, the shape."""
    if node.op == "call_method" and node.target in LIKE and len(node.args) == 2:
        like = node.args[1]
        shape = first_shape(_traced_value(like)) if isinstance(like, fx.Node) else None
        if shape is not None:
            return (node.args[0], shape), {}
    return node.args, dict(node.kwargs)


def _computation(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    index_of: Mapping[fx.Node, int],
) -> Callable[[Mapping[int, Any]], Any] | None:
    """Return what computes the node from its inputs, for functions and modules without tensors."""
    function: Callable[..., Any]
    if node.op == "call_function":
        function = cast(Callable[..., Any], node.target)
    elif node.op == "call_method":
        name = LIKE.get(str(node.target), str(node.target)) if args != node.args else node.target
        function = _method(str(name))
    elif node.op == "call_module":
        owner = node.graph.owning_module
        module = None if owner is None else owner.get_submodule(str(node.target))
        if module is None or is_leaf(module):
            return None
        function = module
    else:
        return None

    def compute(values: Mapping[int, Any]) -> Any:
        a, k = fx.map_arg((args, kwargs), lambda n: values[index_of[n]])
        return function(*a, **k)

    return compute


def _method(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, name)(*args, **kwargs)

    return call


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
        args = (*node.args, *(node.kwargs[k] for k in ("p",) if k in node.kwargs))
        return function_name(getattr(node.target, "__name__", str(node.target)), args)
    return str(node.target)


def _traced_value(node: fx.Node) -> Any:
    """Fake tensors of a propagation here, or what other tools leave on a GraphModule's nodes."""
    return next(
        (node.meta[k] for k in ("val", "example_value", "tensor_meta") if k in node.meta), None
    )
