"""Capture by `torch.export`: slower, passes through Python control flow.

The exported graph is one of tensor operators; `nn_module_stack` tells which module made each. The
operators of one call of a norm or linear operator are put together again into one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from normconv.graph.calls import LIKE, Call, CallGraph, CallKind, first_shape, function_name
from normconv.graph.exporting import export_program
from normconv.graph.families import is_leaf
from normconv.graph.names import Names

__all__ = ["capture_with_export"]


def capture_with_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Names
) -> CallGraph:
    """Capture a forward pass of the model in its present mode.

    Raises:
        Exception: whatever `torch.export` meets.
    """
    program = export_program(model, args, kwargs)
    modules = dict(model.named_modules(remove_duplicate=False))
    return _Grouping(program.tensor_names, modules, names).read(program.graph)


class _Grouping:
    """Walks the exported nodes and groups those of one leaf call."""

    def __init__(
        self, tensor_names: Mapping[str, str], modules: Mapping[str, nn.Module], names: Names
    ) -> None:
        self._tensor_names = tensor_names
        self._modules = modules
        self._names = names
        self._reads: set[str] = set()

    def read(self, graph: fx.Graph) -> CallGraph:
        key_of: dict[fx.Node, Any] = {}
        members: dict[Any, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "placeholder" and node.name in self._tensor_names:
                continue
            key = self._leaf_call(node) or node
            key_of[node] = key
            members.setdefault(key, []).append(node)
            self._note_reads(node, key)
        # A group stands where its last operator stood: all that it takes came before.
        position = {node: place for place, node in enumerate(graph.nodes)}
        keys = sorted(members, key=lambda key: position[members[key][-1]])
        index_of = {key: index for index, key in enumerate(keys)}
        calls = [self._call(index_of, key_of, key, members[key]) for key in keys]
        functional = tuple(node.name for node in keys if _is_fixed_batch_norm(node))
        return CallGraph(tuple(calls), "export", frozenset(self._reads), functional)

    def _leaf_call(self, node: fx.Node) -> tuple[str, str] | None:
        """Return (stack key, module path) of the outermost leaf module the node was made in."""
        stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        for key, (path, _) in stack.items():
            path = path.partition("@")[0]
            module = self._modules.get(path)
            if module is not None and path and is_leaf(module):
                return key, path
        return None

    def _note_reads(self, node: fx.Node, key: Any) -> None:
        own = self._names.canonical(key[1]) if isinstance(key, tuple) else None
        for used in node.all_input_nodes:
            name = self._tensor_names.get(used.name)
            owner = self._names.owner_of_attribute(name) if name else None
            if name is None or owner is None or own in self._names.owners_of_attribute(name):
                continue
            self._reads.add(owner)

    def _call(
        self,
        index_of: Mapping[Any, int],
        key_of: Mapping[fx.Node, Any],
        key: Any,
        nodes: list[fx.Node],
    ) -> Call:
        used = [
            index_of[key_of[source]]
            for node in nodes
            for source in _read_by(node)
            if source in key_of and key_of[source] != key
        ]
        first, last = nodes[0], nodes[-1]
        kind: CallKind
        if isinstance(key, tuple):
            kind, target = "module", self._names.canonical(key[1])
        elif first.op == "placeholder":
            kind, target = "input", first.name
        elif first.op == "output":
            kind, target = "output", "output"
        else:
            kind, target = "function", _operator_name(first)
        return Call(
            index_of[key],
            kind,
            target,
            tuple(dict.fromkeys(used)),
            first_shape(last.meta.get("val")),
            compute=None if isinstance(key, tuple) else _computation(first, index_of, key_of),
        )


def _computation(
    node: fx.Node, index_of: Mapping[Any, int], key_of: Mapping[fx.Node, Any]
) -> Callable[[Mapping[int, Any]], Any] | None:
    """Return what computes an operator from the values of its inputs."""
    function: Any = node.target
    if node.op != "call_function" or not callable(function):
        return None
    like = LIKE.get(_operator_name(node))
    if like and len(node.args) == 2:
        source, shape = node.args[0], first_shape(cast(fx.Node, node.args[1]).meta.get("val"))
        return lambda values: getattr(values[index_of[key_of[cast(fx.Node, source)]]], like)(shape)

    def compute(values: Mapping[int, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[index_of[key_of[n]]])
        return function(*args, **kwargs)

    return compute


def _is_fixed_batch_norm(key: Any) -> bool:
    """Whether an operator that stands alone is `aten.batch_norm` with training=False."""
    return (
        isinstance(key, fx.Node)
        and key.target is torch.ops.aten.batch_norm.default
        and not key.args[5]
    )


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values it takes, not only their shape."""
    return node.all_input_nodes[:1] if _operator_name(node) in LIKE else node.all_input_nodes


def _operator_name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return function_name(name.partition(".")[0], node.args)
