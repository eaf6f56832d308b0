"""The dtypes that a file can be asked to compute in, and which models can be written so."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn

from normconv.errors import Problem, UsageError

__all__ = ["PRECISIONS", "Precision", "precision_of"]


@dataclass(frozen=True)
class Precision:
    """A dtype that a file can compute in.

    Args:
        name: how it is asked for.
        dtype: what the file computes in.
        least_opset: the first whose convolutions take it.
    """

    name: str
    dtype: ir.DataType
    least_opset: int

    @property
    def is_half(self) -> bool:
        """Whether anything has to be rounded."""
        return bool(self.dtype != ir.DataType.FLOAT)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", ir.DataType.FLOAT, 0),
        Precision("fp16", ir.DataType.FLOAT16, 0),
        Precision("bf16", ir.DataType.BFLOAT16, 22),
    )
}


_AS_IT_IS = PRECISIONS["fp32"]


def precision_of(
    dtype: str | None, model: nn.Module, opset: int | None, golden: object = None
) -> Precision:
    """Return the precision of a name, where a model can be written in it.

    Args:
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``; None leaves the model as it is.
        model: the model; a half file is rounded from float32 weights.
        opset: the operator set that was asked for.
        golden: the golden data that were asked for.

    Raises:
        UsageError: no such name, an opset without it, weights that are not float32, golden data, whose
            bounds are those of float32.

    >>> precision_of("half", nn.ReLU(), None)
    Traceback (most recent call last):
    normconv.errors.UsageError: dtype: 'half' is not one of fp32, fp16, bf16
    """
    if dtype is None:
        return _AS_IT_IS
    if dtype not in PRECISIONS:
        raise UsageError(Problem("dtype", f"{dtype!r} is not one of {', '.join(PRECISIONS)}"))
    precision = PRECISIONS[dtype]
    problems = []
    least = precision.least_opset
    if least and opset is not None and opset != least:
        what = (
            f"{opset} is asked for, and {dtype} is written in {least}, whose convolutions take it"
        )
        problems.append(Problem("opset", what, "leave it away, or use fp16"))
    others = {
        str(p.dtype).removeprefix("torch.")
        for p in model.parameters()
        if p.is_floating_point() and p.dtype != torch.float32
    }
    if others:
        what = f"{dtype} is made of float32 weights, and the model has {', '.join(sorted(others))}"
        problems.append(Problem("dtype", what, "give model.float(), or leave dtype away"))
    if precision.is_half and golden is not None:
        what = f"its bounds are those of float32, which no {dtype} file meets"
        problems.append(Problem("golden", what, "write golden data with dtype fp32"))
    if problems:
        raise UsageError(problems)
    return precision
