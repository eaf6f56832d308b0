"""Writing one ONNX file tensor by tensor: the weights are never all in memory a second time.

Protobuf libraries build the whole message and then its bytes: two more copies of every weight. A
message is its fields one after the other, in any order, so the weights can be appended to the graph's
own bytes as they come.

Source: the protobuf encoding guide (field keys, varints, length-delimited fields) and onnx.proto
(ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto.raw_data = 9).
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

__all__ = ["write_streamed"]

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_RAW_DATA = 9
_SMALL = 1024  # bytes; not worth a field of its own


def write_streamed(model: ir.Model, path: Path) -> None:
    """Write a model to one file with at most one weight copied at a time.

    Args:
        model: left as it was. Its weights stay where they are.
        path: the file; below 2 GiB, as protobuf has it.
    """
    graph = model.graph
    large = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _SMALL
    }
    order = list(graph.initializers.items())
    try:
        for name in large:
            del graph.initializers[name]
        proto = ir.to_proto(model)
    finally:
        graph.initializers.clear()
        graph.initializers.update(order)
    body = proto.graph.SerializeToString()
    proto.ClearField("graph")
    parts = [(_header(value), value.const_value) for value in large.values()]
    length = len(body) + sum(
        len(_key(_GRAPH_INITIALIZER)) + len(_varint(size)) + size
        for size in (_tensor_size(header, tensor) for header, tensor in parts)
    )
    with path.open("wb") as stream:
        stream.write(proto.SerializeToString())
        stream.write(_key(_MODEL_GRAPH) + _varint(length) + body)
        for header, tensor in parts:
            _write_tensor(stream, header, tensor)


def _header(value: ir.Value) -> bytes:
    """The tensor's message without its data."""
    tensor = value.const_value
    assert tensor is not None
    described = onnx.TensorProto(
        name=value.name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape.numpy()]
    )
    encoded: bytes = described.SerializeToString()
    return encoded


def _tensor_size(header: bytes, tensor: ir.TensorProtocol) -> int:
    key = _key(_TENSOR_RAW_DATA)
    size: int = len(header) + len(key) + len(_varint(tensor.nbytes)) + tensor.nbytes
    return size


def _write_tensor(stream: BinaryIO, header: bytes, tensor: ir.TensorProtocol) -> None:
    stream.write(_key(_GRAPH_INITIALIZER) + _varint(_tensor_size(header, tensor)) + header)
    stream.write(_key(_TENSOR_RAW_DATA) + _varint(tensor.nbytes))
    data = tensor.tobytes()
    assert len(data) == tensor.nbytes
    stream.write(data)


def _key(field: int) -> bytes:
    """The key of a length-delimited field."""
    return _varint(field << 3 | 2)


def _varint(number: int) -> bytes:
    """Encode a number, seven bits a byte, low bits first.

    >>> _varint(300).hex()
    'ac02'
    """
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
