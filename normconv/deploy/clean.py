"""Cleaning an exported graph: no weight arithmetic, no dead weights, no traces of the machine."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript import optimizer

import normconv
from normconv.deploy.onnx_graph import MODULE_KEY, weight_cone

__all__ = ["SCOPES_KEY", "VERSION_KEY", "clean"]

#: Where a file says which normconv wrote it.
VERSION_KEY = "normconv.version"

#: Where the exporter keeps the names of the modules around a node.
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_MODULE_NAME = re.compile(r"[\w.\-]+")
_ROUNDS = 4  # a fold can open the way for the next; one is enough in every graph seen


def clean(model: ir.Model) -> None:
    """Fold weight arithmetic, drop what is not used, and clear metadata, in place.

    Weights of any size are folded, unlike in the exporter's own run, which stops at 8192 elements.
    Nothing else is: a mask or a table that is cheap to compute would bloat the file. Zeros padded
    before a maximum stay zeros in ONNX Runtime.
    """
    _fold_weights(model)
    _keep_zeros_before_maxima(model)
    RemoveUnusedNodesPass()(model)
    _clear(model)


def _fold_weights(model: ir.Model) -> None:
    for _ in range(_ROUNDS):
        cone = weight_cone(model)
        if not cone:
            return
        optimizer.fold_constants(
            model,
            input_size_limit=sys.maxsize,
            output_size_limit=sys.maxsize,
            should_fold=cone.__contains__,
        )


def _keep_zeros_before_maxima(model: ir.Model) -> None:
    """Pad with the smallest normal number instead of 0 where a MaxPool follows.

    ONNX Runtime (1.31, its Pad_Fusion) moves a Pad of zeros into the MaxPool after it, which pads with
    −∞: another result wherever all of a border window is negative, as in the stem of Big Transfer. Any
    other value it leaves alone.
    """
    for node in list(_nodes(model.graph)):
        if node.op_type != "Pad" or _mode(node) != "constant":
            continue
        data, value = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        if data is None or data.dtype is None or not data.dtype.is_floating_point():
            continue
        followed = any(use.node.op_type == "MaxPool" for use in node.outputs[0].uses())
        known = None if value is None else ir.convenience.get_const_tensor(value)
        if not followed or (value is not None and (known is None or known.numpy().any())):
            continue
        tiny = ml_dtypes.finfo(data.dtype.numpy()).smallest_normal
        name = f"{node.outputs[0].name}_padding"
        tensor = ir.tensor(np.array(tiny, data.dtype.numpy()), name=name)
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        padding = ir.Value(
            name=name, type=ir.TensorType(data.dtype), shape=ir.Shape(()), const_value=tensor
        )
        graph.register_initializer(padding)
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, padding)


def _mode(node: ir.Node) -> str:
    mode = node.attributes.get("mode")
    return "constant" if mode is None else mode.as_string()


def _clear(model: ir.Model) -> None:
    graphs = (model.graph, *model.functions.values())
    modules = {node: _module(node) for graph in graphs for node in _nodes(graph)}
    ClearMetadataAndDocStringPass()(model)
    # The pass leaves values, functions and the model itself alone.
    for node, module in modules.items():
        if module:
            node.metadata_props[MODULE_KEY] = module
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in _values(graph):
            value.metadata_props.clear()
            value.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
    model.metadata_props[VERSION_KEY] = normconv.__version__


def _module(node: ir.Node) -> str:
    """Return the qualified name of the module a node came from; empty for the model itself.

    The exporter keeps the names from the outermost module to the operator.
    """
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, ""))
    except (SyntaxError, ValueError):
        return ""
    if not isinstance(scopes, list) or len(scopes) < 2:
        return ""
    name = str(scopes[-2])
    return name if _MODULE_NAME.fullmatch(name) else ""


def _nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(graph)


def _values(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from graph.inputs
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()
    for node in _nodes(graph):
        yield from node.outputs
