"""What an ONNX file consists of: its files, its weights by name, its structure. Loads no torch."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from normconv.deploy import onnx_graph
from normconv.files import sha256_of

__all__ = [
    "differing",
    "file_record",
    "initializers_of",
    "onnx_files",
    "onnx_structure",
    "tensor_record",
]

Record = dict[str, Any]

_DTYPES = {"float": "float32", "double": "float64"}  # ONNX's words and numpy's


def file_record(path: str | os.PathLike[str]) -> Record:
    """Return a file's name, size and SHA-256."""
    path = Path(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def onnx_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return an ONNX file and the files beside it that hold its weights."""
    return [Path(path), *sorted(onnx_graph.external_files(path))]


def tensor_record(dtype: str, shape: tuple[int, ...], data: Any) -> Record:
    """Return what tells one tensor from another.

    Args:
        dtype: its type, e.g. ``float32``.
        shape: its shape.
        data: its values' bytes, little-endian, in C order.
    """
    return {"dtype": dtype, "shape": list(shape), "sha256": hashlib.sha256(data).hexdigest()}


def initializers_of(path: str | os.PathLike[str]) -> dict[str, Record]:
    """Return a record of every initializer, those of subgraphs included; one is in memory at a time."""
    found: dict[str, Record] = {}
    for graph in ir.load(path).graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            dtype = str(tensor.dtype.name).lower()
            shape = tuple(int(size) for size in tensor.shape.numpy())
            # A subgraph may use a name again.
            place = name if name not in found else f"{graph.name}/{name}"
            found[place] = tensor_record(_DTYPES.get(dtype, dtype), shape, tensor.tobytes())
            value.const_value = None  # a graph is a cycle: its weights would wait for a collection
    return found


def onnx_structure(path: str | os.PathLike[str]) -> Record:
    """Count what remains in a graph: norms, and nodes that compute weights."""
    proto = onnx.load(path, load_external_data=False)
    graph = onnx_graph.as_ir(proto)
    counts = onnx_graph.node_counts(graph)
    norms = onnx_graph.norm_nodes(graph)
    arithmetic = onnx_graph.weight_arithmetic(graph)
    computed = onnx_graph.non_initializer_weights(graph)
    for value in graph.graph.initializers.values():
        value.const_value = None
    return {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "node_counts": counts,
        "batch_norm_nodes": counts.get("BatchNormalization", 0),
        "norm_nodes": len(norms),
        "norm_kinds": dict(Counter(norm.kind for norm in norms)),
        "weight_arithmetic": len(arithmetic),
        "weights_from_input": sum(use.from_input for use in computed),
    }


def differing(certified: Mapping[str, Record], found: Mapping[str, Record]) -> dict[str, str]:
    """Say of each tensor that is not the certified one what is wrong with it.

    >>> record = tensor_record("float32", (1,), b"1234")
    >>> differing({"a": record, "b": record}, {"a": record | {"dtype": "float16"}, "c": record})
    {'a': 'float16 [1], certified was float32 [1]', 'b': 'is missing', 'c': 'was not certified'}
    """
    wrong = {}
    for name in (*certified, *(name for name in found if name not in certified)):
        was, now = certified.get(name), found.get(name)
        if now is None:
            wrong[name] = "is missing"
        elif was is None:
            wrong[name] = "was not certified"
        elif (was["dtype"], was["shape"]) != (now["dtype"], now["shape"]):
            wrong[name] = (
                f"{now['dtype']} {now['shape']}, certified was {was['dtype']} {was['shape']}"
            )
        elif was["sha256"] != now["sha256"]:
            wrong[name] = "has other values"
    return wrong
