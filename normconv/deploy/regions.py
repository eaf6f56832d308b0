"""Nodes that half precision would break: those of norms, with scale and shift, and those that count."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from normconv.deploy.onnx_graph import constant_values, norms_of

__all__ = ["norm_regions", "positions"]

_LAYOUT = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Identity", "Expand"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN"})
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare"})
_BELOW_THE_ROOT = frozenset({"Add", "Max", "Clip", "Cast", "Reciprocal"})
_ABOVE_THE_ROOT = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Clip", "Cast", "Abs"}) | _LAYOUT


def norm_regions(model: ir.Model) -> set[ir.Node]:
    """Return every node that takes part in a norm.

    Of a group norm: Reshape, InstanceNormalization, Reshape, and the Mul and Add after them. Of a norm
    written out as arithmetic: from its mean to its division, and the Mul and Add after that.
    """
    constant = constant_values(model)
    region: set[ir.Node] = set()
    for node, _, decomposed in norms_of(model):
        region.add(node)
        if not decomposed:
            continue
        last = (
            _written_out(node, constant, region)
            if node.op_type == "Sqrt"
            else _between(node, region)
        )
        for value in last:
            region.update(_affine(value, constant))
    return region


def _between(norm: ir.Node, region: set[ir.Node]) -> list[ir.Value]:
    """Add the reshapes on both sides of an InstanceNormalization; return what leaves them."""
    before = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if before is not None:
        region.add(before)
    after = [user for user in norm.outputs[0].consumers() if user.op_type == "Reshape"]
    region.update(after)
    return [node.outputs[0] for node in after]


def _written_out(root: ir.Node, constant: set[ir.Value], region: set[ir.Node]) -> list[ir.Value]:
    """Add what is above the square root of a variance and below it; return what leaves it."""
    stack = [root]
    while stack:
        node = stack.pop()
        region.add(node)
        for value in node.inputs:
            producer = value.producer() if value is not None and value not in constant else None
            if producer is None:
                continue
            if producer.op_type in _REDUCTIONS:
                region.update((producer, *_square(producer)))
            elif producer.op_type in _ABOVE_THE_ROOT:
                stack.append(producer)
    last = []
    values = [root.outputs[0]]
    while values:
        for user in values.pop().consumers():
            region.add(user)
            if user.op_type in _BELOW_THE_ROOT:
                values.append(user.outputs[0])
            else:
                last.append(user.outputs[0])
    return last


def _square(reduction: ir.Node) -> Iterator[ir.Node]:
    """Give the square that is averaged, and the centring before it."""
    value = reduction.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Sub":
            yield node
            means = (v.producer() for v in node.inputs if v is not None)
            yield from (mean for mean in means if mean is not None and mean.op_type in _REDUCTIONS)
            return
        squares = node.op_type == "Pow" or (
            node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        )
        if not squares and node.op_type != "Cast":
            return
        yield node
        value = node.inputs[0]


def _affine(value: ir.Value, constant: set[ir.Value]) -> Iterator[ir.Node]:
    """Give the scale and the shift by constants that a value goes through next."""
    expected = ["Add", "Mul"]
    while expected and len(users := value.consumers()) == 1:
        (user,) = users
        if user.op_type in expected:
            if not any(v in constant for v in user.inputs):
                return
            while expected.pop() != user.op_type:
                pass
        elif user.op_type not in _LAYOUT:
            return
        yield user
        value = user.outputs[0]


def positions(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that compute with counted positions and sizes, before any weight.

    float16 has no odd integer above 2048, bfloat16 none above 256.
    """
    counted: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in graph:
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        if not floats:
            source = node.op_type == "Cast" and node.inputs[0] is not None
            whole = source and (d := node.inputs[0].dtype) is not None and d.is_integer()
            is_counted = bool(whole)
        else:
            is_counted = any(v in counted for v in floats) and all(
                v in counted or v.is_initializer() for v in floats
            )
            weighed = any(v.is_initializer() and _is_matrix(v) for v in floats)
            is_counted = is_counted and not (node.op_type in _PRODUCTS and weighed)
        if is_counted:
            found.add(node)
            counted.update(node.outputs)
    return found


def _is_matrix(value: ir.Value) -> bool:
    shape = value.shape or ()
    return len([size for size in shape if size != 1]) > 1
