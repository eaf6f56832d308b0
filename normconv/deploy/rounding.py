"""Files that compute in half precision, with their norms in float32.

A variance is a mean of squares: float16 overflows at a value of 256 and bfloat16 keeps 8 bits of it.
Norms, and the reshapes, scale and shift that belong to them, therefore stay in float32 between casts.
Which other operators take a half dtype, and in which of their inputs, is read from ONNX's schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass
from onnxscript.version_converter import convert_version

from normconv.deploy.onnx_graph import MODULE_KEY
from normconv.deploy.precision import Precision
from normconv.deploy.regions import norm_regions, positions
from normconv.errors import Problem, Refused

__all__ = ["Rounded", "round_graph"]

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Rounded:
    """What rounding a graph left.

    Args:
        dtype: the name of the half dtype.
        half: how many nodes compute in the half dtype.
        kept: how many nodes with floating inputs or outputs stay in float32.
        casts: how many casts were inserted.
    """

    dtype: str
    half: int
    kept: int
    casts: int

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        nodes = {self.dtype: self.half, "fp32": self.kept, "casts": self.casts}
        return {"dtype": self.dtype, "inputs_and_outputs": "fp32", "nodes_by_dtype": nodes}


def round_graph(model: ir.Model, precision: Precision) -> Rounded:
    """Make a float32 graph compute in half precision, norms excepted, in place.

    Inputs and outputs stay in float32. The lowest and largest float32 become the lowest and largest of
    the dtype, and a single constant that would round to zero the smallest number above it: they are
    masks and epsilons, not weights.

    Args:
        model: a cleaned graph.
        precision: a half one.

    Raises:
        Refused: weights beyond the range of the dtype; all are named.
    """
    if model.opset_imports.get("", 0) < precision.least_opset:
        convert_version(model, precision.least_opset)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if any(value.type is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)
    return _Rounding(model, precision).run()


class _Rounding:
    """One graph on its way."""

    def __init__(self, model: ir.Model, precision: Precision) -> None:
        self._graph = model.graph
        self._half = precision.dtype
        self._precision = precision
        self._opset = int(model.opset_imports.get("", 0))
        kept = norm_regions(model) | positions(model.graph)
        self._computing = {
            node: slots
            for node in model.graph
            if node not in kept and (slots := self._slots(node)) is not None
        }
        self._names = {value.name for value in self._values()}
        self._casts: set[ir.Node] = set()

    def run(self) -> Rounded:
        """Round the initializers, mark what the nodes give, and cast at every border."""
        floats = [value for value in self._values() if value.dtype == _FLOAT]
        for node, slots in self._computing.items():
            for value, dtype in zip(node.outputs, slots.outputs, strict=True):
                if value.dtype == _FLOAT:
                    value.type = ir.TensorType(dtype)
            if node.op_type == "Cast" and node.outputs[0].dtype == self._half:
                node.attributes["to"] = ir.AttrInt64("to", int(self._half))
        problems = []
        for value in floats:
            if value.is_initializer():
                problems += self._store(value)
            else:
                self._cast(value)
        if problems:
            raise Refused(problems)
        return self._counted()

    def _counted(self) -> Rounded:
        counts = {self._half: 0, _FLOAT: 0}
        for node in self._graph:
            if node in self._casts or node.op_type in _TELLS_SHAPES:
                continue
            dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
            dtype = self._half if self._half in dtypes else _FLOAT
            counts[dtype] += dtype in dtypes
        return Rounded(self._precision.name, counts[self._half], counts[_FLOAT], len(self._casts))

    def _values(self) -> Iterator[ir.Value]:
        yield from self._graph.inputs
        yield from list(self._graph.initializers.values())
        for node in list(self._graph):
            yield from node.outputs

    def _slots(self, node: ir.Node) -> _Slots | None:
        """Return the dtype of each slot of a node that computes in half precision; None if it cannot."""
        if node.domain or any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            return None
        if node.op_type != "Cast" and not any(
            value is not None and value.dtype == _FLOAT for value in node.inputs
        ):
            return None
        if any(isinstance(v.type, ir.SequenceType | ir.OptionalType) for v in node.outputs):
            return None
        schema = onnx.defs.get_schema(node.op_type, self._opset)
        inputs = [self._slot(schema, schema.inputs, i, v) for i, v in enumerate(node.inputs)]
        outputs = [self._slot(schema, schema.outputs, i, v) for i, v in enumerate(node.outputs)]
        if _UNFIT in (*inputs, *outputs):
            return None
        return _Slots(tuple(inputs), tuple(outputs))

    def _slot(self, schema: Any, formals: Any, index: int, value: ir.Value | None) -> Any:
        if value is None or value.dtype != _FLOAT:
            return None
        formal = formals[min(index, len(formals) - 1)]
        for constraint in schema.type_constraints:
            if constraint.type_param_str == formal.type_str:
                named = f"tensor({self._half.name.lower()})"
                return self._half if named in constraint.allowed_type_strs else _UNFIT
        return _FLOAT

    def _wanted(self, use: Any, given: ir.DataType) -> ir.DataType:
        if use.node.op_type in _TAKES_ANY and not use.node.domain:
            return given
        slots = self._computing.get(use.node)
        return _FLOAT if slots is None else slots.inputs[use.idx] or _FLOAT

    def _by_dtype(self, value: ir.Value, given: ir.DataType) -> dict[ir.DataType, list[Any]]:
        found: dict[ir.DataType, list[Any]] = {}
        for use in value.uses():
            found.setdefault(self._wanted(use, given), []).append(use)
        return found

    def _store(self, value: ir.Value) -> list[Problem]:
        """Store a weight as its users take it, twice where they differ."""
        users = self._by_dtype(value, self._half)
        halves = users.pop(self._half, [])
        if not halves:
            return []
        assert value.const_value is not None
        array = value.const_value.numpy()
        if problem := self._beyond(value, array):
            return [problem]
        rounded = self._round(array)
        if not users and not value.is_graph_output():
            value.const_value = ir.tensor(rounded, dtype=self._half, name=value.name)
            value.type = ir.TensorType(self._half)
            return []
        twin = self._value(f"{value.name}_{self._half.name.lower()}", self._half, value)
        twin.const_value = ir.tensor(rounded, dtype=self._half, name=twin.name)
        self._graph.register_initializer(twin)
        _replace(halves, twin)
        return []

    def _beyond(self, value: ir.Value, array: Any) -> Problem | None:
        limit = float(ml_dtypes.finfo(self._half.numpy()).max)
        finite = np.abs(array[np.isfinite(array) & (np.abs(array) != np.finfo(np.float32).max)])
        largest = float(finite.max(initial=0.0))
        if largest <= limit:
            return None
        what = f"holds {largest:.4g}, and the largest {self._precision.name} is {limit:.4g}"
        way_out = "use fp32" if self._half == ir.DataType.BFLOAT16 else "use bf16 or fp32"
        return Problem(str(value.name), what, way_out)

    def _round(self, array: Any) -> Any:
        info = ml_dtypes.finfo(self._half.numpy())
        largest = np.finfo(np.float32).max
        inside = np.where(np.abs(array) == largest, np.sign(array) * float(info.max), array)
        rounded = inside.astype(self._half.numpy())
        if array.size == 1 and array.any() and not rounded.any():
            smallest = np.sign(array) * float(info.smallest_subnormal)
            return smallest.astype(self._half.numpy())
        return rounded

    def _cast(self, value: ir.Value) -> None:
        """Cast what a node or the outside gives, once, for those that take it in the other dtype."""
        given = value.dtype
        assert given is not None
        users = self._by_dtype(value, given)
        other = _FLOAT if given == self._half else self._half
        is_output = value.is_graph_output() and given == self._half
        if other not in users and not is_output:
            return
        name = str(value.name)
        if is_output:
            value.name = self._free(f"{name}_{given.name.lower()}")
        else:
            name = self._free(f"{name}_{other.name.lower()}")
        cast = ir.node(
            "Cast",
            [value],
            attributes={"to": ir.AttrInt64("to", int(other))},
            outputs=[self._value(name, other, value, taken=True)],
            name=f"{name}_cast",
        )
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            self._graph.insert_after(producer, cast)
            if MODULE_KEY in producer.metadata_props:
                cast.metadata_props[MODULE_KEY] = producer.metadata_props[MODULE_KEY]
        self._casts.add(cast)
        _replace(users.get(other, []), cast.outputs[0])
        if is_output:
            for index, output in enumerate(self._graph.outputs):
                if output is value:
                    self._graph.outputs[index] = cast.outputs[0]

    def _value(
        self, name: str, dtype: ir.DataType, like: ir.Value, taken: bool = False
    ) -> ir.Value:
        name = name if taken else self._free(name)
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=like.shape)

    def _free(self, name: str) -> str:
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name


@dataclass(frozen=True)
class _Slots:
    """The dtypes that a node takes and gives; None where a slot holds no float."""

    inputs: tuple[ir.DataType | None, ...]
    outputs: tuple[ir.DataType | None, ...]


_UNFIT = "unfit"
_GRAPHS = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
# No cast is due before these.
_TELLS_SHAPES = frozenset({"Shape", "Size"})
_TAKES_ANY = _TELLS_SHAPES | {"Cast"}


def _replace(uses: list[Any], value: ir.Value) -> None:
    for use in uses:
        use.node.replace_input_with(use.idx, value)
