"""Reading an ONNX graph: norm nodes, weight arithmetic, weights that are no initializers, leaks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from normconv.deploy.leaks import leaked_paths as leaked_paths

__all__ = [
    "MODULE_KEY",
    "NodeRef",
    "NormNode",
    "WeightUse",
    "as_ir",
    "constant_values",
    "dynamic_axes",
    "external_files",
    "initializer_bytes",
    "leaked_paths",
    "node_counts",
    "non_initializer_weights",
    "norm_nodes",
    "norms_of",
    "weight_arithmetic",
    "weight_cone",
]

#: Where an exported node keeps the qualified name of the module it came from.
MODULE_KEY = "normconv.module"

Source: TypeAlias = ir.Model | onnx.ModelProto | str | os.PathLike[str]


@dataclass(frozen=True)
class NodeRef:
    """One node.

    Args:
        name: the node's name; may be empty in files of other tools.
        op: its operator.
        module: the module it came from, where the file says so.
    """

    name: str
    op: str
    module: str = ""

    def __str__(self) -> str:
        place = self.module or self.name
        return f"{self.op} ({place})" if place else self.op


@dataclass(frozen=True)
class NormNode(NodeRef):
    """One normalization.

    Args:
        kind: which normalization it computes.
        decomposed: True when several nodes stand for it.
    """

    kind: str = ""
    decomposed: bool = False


@dataclass(frozen=True)
class WeightUse(NodeRef):
    """One use of a weight that is not an initializer.

    Args:
        slot: the index of the input.
        from_input: True when the weight depends on the model's inputs (dynamic convolution), False
            when it is computed from constants and could have been folded.
    """

    slot: int = 1
    from_input: bool = False


def as_ir(source: Source) -> ir.Model:
    """Return the model for reading; external data stays on disk.

    Args:
        source: a path, a `ModelProto` or an `onnx_ir.Model` (returned as it is).
    """
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return ir.from_proto(source)
    return ir.load(source)


def node_counts(source: Source) -> dict[str, int]:
    """Count the nodes by operator, subgraphs and functions included, most frequent first."""
    counts = Counter(_op(node) for node in _nodes(as_ir(source)))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def initializer_bytes(source: Source) -> int:
    """Return the size of all weights in bytes."""
    values = as_ir(source).graph.initializers.values()
    return sum(int(value.const_value.nbytes) for value in values if value.const_value is not None)


def external_files(source: Source) -> set[Path]:
    """Return the files beside it that hold weights of a file."""
    values = (value.const_value for value in as_ir(source).graph.initializers.values())
    return {Path(value.path) for value in values if isinstance(value, ir.ExternalTensor)}


def dynamic_axes(source: Source) -> dict[str, dict[int, str]]:
    """Return the axes without a fixed size: {input or output: {axis: name}}."""
    graph = as_ir(source).graph
    axes: dict[str, dict[int, str]] = {}
    for value in (*graph.inputs, *graph.outputs):
        shape = value.shape or ()
        named = {i: str(size) for i, size in enumerate(shape) if not isinstance(size, int)}
        if named:
            axes[str(value.name)] = named
    return axes


# --- weights ------------------------------------------------------------------------------------

# Which inputs of an operator hold weights. A MatMul has no weight side: a constant on either side
# is one. Biases are held to the same rule.
_WEIGHT_SLOTS: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}
# An activation may stand in these slots, so only a constant there is a weight.
_EITHER_SIDE = frozenset(
    {("Gemm", 0), ("MatMul", 0), ("MatMul", 1)} | {("FusedMatMul", i) for i in (0, 1)}
)
# Not arithmetic: how a quantized weight is stored.
_STORAGE = frozenset({"DequantizeLinear"})
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"})


def constant_values(model: ir.Model) -> set[ir.Value]:
    """Return every value that does not depend on the model's inputs."""
    constant: set[ir.Value] = set()
    for container in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(container):
            constant.update(value for value in node.inputs if _is_initializer(value))
            if _is_constant_node(node, constant):
                constant.update(node.outputs)
    return constant


def weight_cone(model: ir.Model) -> set[ir.Node]:
    """Return the nodes that compute weights from constants: what folding has to remove."""
    constant = constant_values(model)
    cone: set[ir.Node] = set()
    for _, _, value in _weight_slots(model):
        stack = [value] if value in constant else []
        while stack:
            producer = stack.pop().producer()
            if producer is None or producer in cone or producer.op_type == "Constant":
                continue
            if producer.op_type in _STORAGE:
                continue
            cone.add(producer)
            stack.extend(value for value in producer.inputs if value is not None)
    return cone


def weight_arithmetic(source: Source) -> list[NodeRef]:
    """List the nodes that compute a weight from constants, in the order of the graph.

    A folded export has none: every weight is stored as it is used.
    """
    model = as_ir(source)
    cone = weight_cone(model)
    return [_ref(node) for node in _nodes(model) if node in cone]


def non_initializer_weights(source: Source) -> list[WeightUse]:
    """List the weights of Conv, ConvTranspose, Gemm, MatMul and RNNs that are no initializers.

    Two activations multiplied with each other (attention) are not weights. A convolution whose
    weight depends on the input is listed with `from_input`.
    """
    model = as_ir(source)
    constant = constant_values(model)
    found = []
    for node, slot, value in _weight_slots(model):
        producer = value.producer()
        if _is_initializer(value) or (producer is not None and producer.op_type == "Constant"):
            continue
        if producer is not None and producer.op_type in _STORAGE:
            continue
        from_input = value not in constant
        if from_input and (slot != 1 or (node.op_type, slot) in _EITHER_SIDE):
            continue
        ref = _ref(node)
        found.append(WeightUse(ref.name, ref.op, ref.module, slot, from_input))
    return found


def _weight_slots(model: ir.Model) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    for node in _nodes(model):
        for slot in _WEIGHT_SLOTS.get(node.op_type, ()):
            value = node.inputs[slot] if slot < len(node.inputs) else None
            if value is not None:
                yield node, slot, value


def _is_initializer(value: ir.Value | None) -> bool:
    return value is not None and bool(value.is_initializer())


def _is_constant_node(node: ir.Node, constant: set[ir.Value]) -> bool:
    if node.op_type == "Constant":
        return True
    if node.op_type in _RANDOM or not node.inputs:
        return False
    if any(attr.type in _GRAPH_ATTRIBUTES for attr in node.attributes.values()):
        return False
    return all(value is None or value in constant for value in node.inputs)


_GRAPH_ATTRIBUTES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


# --- norms --------------------------------------------------------------------------------------

_NORM_OPS = {
    "BatchNormalization": "BatchNormalization",
    "InstanceNormalization": "InstanceNormalization",
    "GroupNormalization": "GroupNormalization",
    "LayerNormalization": "LayerNormalization",
    "RMSNormalization": "RMSNormalization",
    "MeanVarianceNormalization": "MeanVarianceNormalization",
    "GroupNorm": "GroupNormalization",
    "SkipGroupNorm": "GroupNormalization",
    "SkipLayerNormalization": "LayerNormalization",
    "SimplifiedLayerNormalization": "RMSNormalization",
    "SkipSimplifiedLayerNormalization": "RMSNormalization",
}
_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Max", "Clip", "Cast", "Abs", "Identity"}
    | {"Reshape", "Squeeze", "Unsqueeze", "Expand"}
)
_WALK = 6  # nodes between the square and the root in the longest decomposition seen (torch.var: 4)


def norm_nodes(source: Source) -> list[NormNode]:
    """List the normalizations of a graph, whether one node or several stand for them.

    Found by name: the standard operators and ONNX Runtime's own. Found by shape: Reshape →
    InstanceNormalization → Reshape (how a group norm is written up to opset 20), and the arithmetic
    x / sqrt(mean(x²) + ε) of layer and RMS norms. A scale and shift (Mul, Add) is no norm.
    """
    found = []
    for node, kind, decomposed in norms_of(as_ir(source)):
        ref = _ref(node)
        found.append(NormNode(ref.name, ref.op, ref.module, kind, decomposed))
    return found


def norms_of(model: ir.Model) -> Iterator[tuple[ir.Node, str, bool]]:
    """Give the node that tells of a norm (its root, if arithmetic), its kind, whether decomposed."""
    constant = constant_values(model)
    for node in _nodes(model):
        kind = _NORM_OPS.get(node.op_type, "")
        decomposed = False
        if kind == "InstanceNormalization" and _between_reshapes(node):
            kind, decomposed = "GroupNormalization", True
        elif node.op_type == "Sqrt" and node.outputs[0] not in constant:
            kind = _arithmetic_norm(node)
            decomposed = bool(kind)
        if kind:
            yield node, kind, decomposed


def _between_reshapes(node: ir.Node) -> bool:
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    after = [user.op_type for user in node.outputs[0].consumers()]
    return before is not None and before.op_type == "Reshape" and "Reshape" in after


def _arithmetic_norm(root: ir.Node) -> str:
    """Name the norm whose denominator is this square root; empty when it is none."""
    if not _is_divisor(root.outputs[0]):
        return ""
    mean, averaged = _reduction_above(root)
    if mean is None:
        return ""
    if mean.op_type == "ReduceSumSquare":
        squared = mean.inputs[0]
    else:
        square = _above(mean.inputs[0], "Cast")
        if square is None or not _is_square(square):
            return ""
        squared = square.inputs[0]
    # A sum of squares that is divided by nothing is a length (L2 normalization), not a variance.
    if mean.op_type != "ReduceMean" and not averaged:
        return ""
    centred = _above(squared, "Cast")
    return (
        "LayerNormalization"
        if centred is not None and centred.op_type == "Sub"
        else "RMSNormalization"
    )


def _reduction_above(root: ir.Node) -> tuple[ir.Node | None, bool]:
    """Find the mean or sum that a square root is taken of, and whether it is divided on the way."""
    level, averaged = [root], False
    for _ in range(_WALK):
        above = [p for node in level for v in node.inputs if v is not None and (p := v.producer())]
        for node in above:
            if node.op_type in ("ReduceMean", "ReduceSum", "ReduceSumSquare"):
                return node, averaged
        averaged = averaged or any(node.op_type in ("Div", "Mul") for node in above)
        level = [node for node in above if node.op_type in _ELEMENTWISE]
    return None, averaged


def _is_divisor(value: ir.Value) -> bool:
    for node in value.consumers():
        if node.op_type == "Reciprocal":
            return True
        if node.op_type == "Div" and node.inputs[1] is value:
            return True
        if node.op_type in ("Add", "Cast", "Max", "Clip") and _is_divisor(node.outputs[0]):
            return True
    return False


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    return bool(node.op_type == "Pow")


def _above(value: ir.Value | None, skip: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == skip:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


# --- nodes --------------------------------------------------------------------------------------


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for container in (model.graph, *model.functions.values()):
        yield from ir.traversal.RecursiveGraphIterator(container)


def _op(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def _ref(node: ir.Node) -> NodeRef:
    return NodeRef(str(node.name or ""), _op(node), str(node.metadata_props.get(MODULE_KEY, "")))
