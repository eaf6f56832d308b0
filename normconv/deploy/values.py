"""Tensors on their way into ONNX Runtime and out of it. Loads no torch: a serving machine has none."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from normconv.errors import Problem

__all__ = [
    "BFLOAT16",
    "ONNX_BFLOAT16",
    "InputSpec",
    "array",
    "bfloat16_bits",
    "from_ort_value",
    "is_bfloat16",
    "is_tensor",
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
    name = str(value.dtype if is_tensor(value) else np.asarray(value).dtype).removeprefix("torch.")
    known = {str(container): word for word, container in _CONTAINERS.items()}
    return known.get(name, f"tensor({name})")


def is_tensor(value: Any) -> bool:
    """Say whether a value is a torch tensor; where torch is not loaded there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_bfloat16(value: Any) -> bool:
    """Say whether a tensor, or an array of `ml_dtypes`, holds bfloat16."""
    return _type_of(value) == BFLOAT16


def bfloat16_bits(value: Any) -> np.ndarray[Any, Any]:
    """Return the bits of bfloat16 values as ``uint16``: numpy has no such type."""
    if not is_tensor(value):
        return np.ascontiguousarray(value).view(np.uint16)
    torch = sys.modules["torch"]
    bits = value.detach().cpu().contiguous().view(torch.int16).numpy()
    return np.asarray(bits).view(np.uint16)


def array(value: Any) -> np.ndarray[Any, Any]:
    """Return a tensor or array as an array in the processor's memory."""
    if is_tensor(value):
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
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    if not count:
        return np.zeros(shape, np.float32)
    # A bfloat16 is the upper half of a float32.
    memory = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    bits = np.ctypeslib.as_array(memory, (count,)).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(shape)
