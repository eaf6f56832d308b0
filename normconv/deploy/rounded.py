"""Files in half precision where no device computes in it: their rounded weights, run in float64.

What is left of a half-precision file on a processor that widens every operator to float32 is its
structure and the rounding of its weights. Both can be judged: the weights as they are stored are widened
to float64, and so is every cast and constant of the graph, and the graph is run by onnx's own evaluator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

from normconv.deploy.compare import Reference
from normconv.deploy.runners import FileRunner
from normconv.deploy.values import InputSpec
from normconv.layers import copy_model
from normconv.numerics.error import relative_l2
from normconv.proof.outputs import cast_inputs, evaluate
from normconv.report import Check

__all__ = [
    "HALVES",
    "Float64File",
    "rounding_errors",
    "structure_check",
    "weights_dtype",
    "widened",
]

_DTYPES = {
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
}
_FLOATS = frozenset(_DTYPES)
_NAMES = {TensorProto.FLOAT: "float", TensorProto.DOUBLE: "double"}
_HALF_NAMES = frozenset({"tensor(float16)", "tensor(bfloat16)"})
#: Dtypes that a processor does not compute in.
HALVES = frozenset({torch.float16, torch.bfloat16})
_WIDEST = TensorProto.DOUBLE
# Attributes that name a dtype, by operator.
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype"})


def weights_dtype(path: Path) -> torch.dtype | None:
    """Return the coarsest floating dtype that a file stores weights of two or more axes in.

    Norms, and what is beside them, may be kept in float32 in a file of half precision. None stands for a
    file without such weights, or that is no file.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        return None
    kinds = [t.data_type for t in graph.initializer if t.data_type in _FLOATS and len(t.dims) > 1]
    dtypes = [_DTYPES[kind] for kind in kinds]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def structure_check(path: Path, label: str = "") -> Check:
    """Check a file with onnx's checker, types and shapes included."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check(label + "structure", False, detail=str(error).strip().splitlines()[0])
    return Check(label + "structure", True, detail="full check with shape inference")


def rounding_errors(
    model: nn.Module,
    dtype: torch.dtype,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reference: Reference,
    *,
    inputs_too: bool,
) -> dict[str, float]:
    """Measure how far rounding a model's own weights moves its outputs, all else in float64.

    Args:
        model: the original; its parameters of two or more axes are rounded in a copy.
        dtype: what they are rounded to.
        args: inputs.
        kwargs: keyword inputs.
        reference: with the float64 run.
        inputs_too: round the inputs as well.

    Returns:
        rel-L2 by output.
    """
    if inputs_too:
        args, kwargs = cast_inputs((args, dict(kwargs)), dtype)
    twin = copy_model(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1:
                parameter.copy_(parameter.to(dtype))
    found = evaluate(twin, args, kwargs, dtype=torch.float64)
    return {name: relative_l2(found[name], value) for name, value in reference.exact.items()}


class Float64File(FileRunner):
    """An ``.onnx`` file with its weights as stored, and everything computed in float64.

    Args:
        path: the file.

    Raises:
        NotImplementedError: an operator that the evaluator does not have.
    """

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        stored = {tensor.name for tensor in model.graph.initializer}
        super().__init__(
            path, tuple(_spec(value) for value in model.graph.input if value.name not in stored)
        )
        self._evaluator = _evaluator(model)

    @property
    def takes_halves(self) -> bool:
        """Whether an input is of half precision."""
        return any(spec.type in _HALF_NAMES for spec in self.specs)

    @property
    def provider(self) -> str:
        """The processor."""
        return "cpu"

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run it on inputs rounded as the file takes them."""
        return self._run(self._evaluator, args, kwargs)

    def run_model(
        self, model: onnx.ModelProto, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Run a variant of the file."""
        return self._run(_evaluator(model), args, kwargs)

    def _run(
        self, evaluator: ReferenceEvaluator, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        feeds = cast_inputs(self.feeds(args, kwargs), torch.float64)
        outputs = evaluator.run(None, {n: v.cpu().numpy() for n, v in feeds.items()})
        return {
            name: torch.from_numpy(np.ascontiguousarray(value))
            for name, value in zip(evaluator.output_names, outputs, strict=True)
        }


def _evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    return ReferenceEvaluator(widened(model), new_ops=[Conv, ConvTranspose, MaxPool])


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    """Say what an input takes, in ONNX Runtime's words."""
    kind = value.type.tensor_type
    name = _NAMES.get(kind.elem_type, TensorProto.DataType.Name(kind.elem_type).lower())
    sizes = (
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim
    )
    return InputSpec(value.name, f"tensor({name})", tuple(sizes))


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn every floating tensor, constant and cast of a graph into float64, in place."""
    for graph in (model.graph, *model.functions):
        for inner in _graphs(graph):
            _widen(inner)
    return model


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _widen(graph: Any) -> None:
    for tensor in getattr(graph, "initializer", ()):
        _widen_tensor(tensor)
    for value in (*_values(graph, "input"), *_values(graph, "output")):
        kind = value.type.tensor_type
        if kind.elem_type in _FLOATS:
            kind.elem_type = _WIDEST
    if hasattr(graph, "value_info"):
        del graph.value_info[:]  # their types are those of before
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _DTYPE_ATTRIBUTES and attribute.i in _FLOATS:
                attribute.i = _WIDEST
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = np.array(
                    attribute.f if attribute.name == "value_float" else attribute.floats, np.float64
                )
                attribute.CopyFrom(
                    onnx.helper.make_attribute("value", numpy_helper.from_array(values))
                )


def _values(graph: Any, which: str) -> list[Any]:
    """A graph's inputs or outputs; those of a function are names without a type."""
    return [value for value in getattr(graph, which) if not isinstance(value, str)]


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _FLOATS - {_WIDEST}:
        values = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


# onnx's evaluator runs these in Python loops; torch does not.


class Conv(OpRun):
    """Convolution in float64."""

    def _run(self, x: Any, w: Any, b: Any = None, **attributes: Any) -> tuple[Any]:
        axes = x.ndim - 2
        padded = _padded(_tensor(x), w.shape[2:], attributes, 0.0)
        run = (torch.conv1d, torch.conv2d, torch.conv3d)[axes - 1]
        found = run(
            padded,
            _tensor(w),
            None if b is None else _tensor(b),
            stride=attributes.get("strides") or [1] * axes,
            dilation=attributes.get("dilations") or [1] * axes,
            groups=attributes.get("group") or 1,
        )
        return (found.numpy(),)


class ConvTranspose(OpRun):
    """Transposed convolution in float64."""

    def _run(self, x: Any, w: Any, b: Any = None, **attributes: Any) -> tuple[Any]:
        axes = x.ndim - 2
        pads = attributes.get("pads") or [0] * 2 * axes
        if attributes.get("output_shape") or _automatic(attributes):
            raise NotImplementedError("ConvTranspose with output_shape or auto_pad")
        run = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[axes - 1]
        full = run(
            _tensor(x),
            _tensor(w),
            None if b is None else _tensor(b),
            stride=attributes.get("strides") or [1] * axes,
            output_padding=attributes.get("output_padding") or [0] * axes,
            groups=attributes.get("group") or 1,
            dilation=attributes.get("dilations") or [1] * axes,
        )
        for axis in range(axes):
            begin, end = pads[axis], pads[axis + axes]
            full = full.narrow(axis + 2, begin, full.shape[axis + 2] - begin - end)
        return (full.contiguous().numpy(),)


class MaxPool(OpRun):
    """Largest value of each window in float64."""

    def _run(self, x: Any, **attributes: Any) -> tuple[Any]:
        axes = x.ndim - 2
        if len(self.onnx_node.output) > 1:
            raise NotImplementedError("MaxPool with indices")
        kernel = attributes["kernel_shape"]
        padded = _padded(_tensor(x), kernel, attributes, -torch.inf)
        pool: Any = (nn.functional.max_pool1d, nn.functional.max_pool2d, nn.functional.max_pool3d)
        found = pool[axes - 1](
            padded,
            kernel,
            stride=attributes.get("strides") or [1] * axes,
            dilation=attributes.get("dilations") or [1] * axes,
            ceil_mode=bool(attributes.get("ceil_mode")),
        )
        return (found.numpy(),)


def _tensor(array: Any) -> Tensor:
    """Share an array's memory, where it may be written to."""
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _automatic(attributes: Mapping[str, Any]) -> bool:
    return attributes.get("auto_pad") not in (None, "", "NOTSET", b"NOTSET")


def _padded(x: Tensor, kernel: Any, attributes: Mapping[str, Any], value: float) -> Tensor:
    axes = x.ndim - 2
    if _automatic(attributes):
        raise NotImplementedError("auto_pad")
    pads = attributes.get("pads") or [0] * 2 * axes
    pairs = [(pads[axis], pads[axis + axes]) for axis in reversed(range(axes))]
    return nn.functional.pad(x, [side for pair in pairs for side in pair], value=value)
