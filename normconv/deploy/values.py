"""Tensors on their way into ONNX Runtime and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from normconv.errors import Problem

__all__ = [
    "BFLOAT16",
    "ONNX_BFLOAT16",
    "InputSpec",
    "array",
    "from_ort_value",
    "mismatches",
    "zeros",
]

_CONTAINERS = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}
BFLOAT16 = "tensor(bfloat16)"
ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16


@dataclass(frozen=True)
class InputSpec:
    """What an input of a file must be.

    Args:
        name: its name.
        type: ONNX Runtime's word for its type, e.g. ``tensor(float)``.
        shape: a number for a fixed axis, a name or None for a free one.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.type} [{sizes}]"


def mismatches(spec: InputSpec, value: Any) -> Iterator[Problem]:
    """Yield what is wrong with a value for an input."""
    shape = tuple(value.shape)
    given = _type_of(value)
    if given != spec.type:
        yield Problem(spec.name, f"takes {spec.type}, not {given}")
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(size, int) or size == given_size
        for size, given_size in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        yield Problem(spec.name, f"takes the shape {list(spec.shape)}, not {list(shape)}")


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return BFLOAT16
        dtype = np.dtype(str(value.dtype).removeprefix("torch."))
    else:
        dtype = np.asarray(value).dtype
    known = {container: name for name, container in _CONTAINERS.items()}
    return known.get(dtype, f"tensor({dtype})")


def array(value: Any) -> np.ndarray[Any, Any]:
    """Return a tensor or array as an array in the processor's memory."""
    if isinstance(value, torch.Tensor):
        return np.ascontiguousarray(value.detach().cpu().numpy())
    return np.asarray(value)


def zeros(spec: InputSpec) -> np.ndarray[Any, Any]:
    """Return zeros that an input takes; a free axis gets one."""
    shape = [size if isinstance(size, int) else 1 for size in spec.shape]
    return np.zeros(shape, dtype=_CONTAINERS.get(spec.type, np.dtype(np.float32)))


def from_ort_value(value: Any) -> np.ndarray[Any, Any]:
    """Return a value as an array; bfloat16 as float32."""
    if value.data_type() != BFLOAT16:
        return np.asarray(value.numpy())
    tensor = torch.utils.dlpack.from_dlpack(value._get_c_value())
    return tensor.float().cpu().numpy()
