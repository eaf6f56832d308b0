"""Trying a provider of ONNX Runtime for real, with one convolution."""

from __future__ import annotations

import functools

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from normconv.deploy.session import Session
from normconv.errors import NormconvError, Refused
from normconv.numerics import relative_l2

__all__ = ["provider_problem", "tiny_model"]

_ENOUGH = (
    1e-4  # a convolution of nine products in float32, or in TF32 where that cannot be turned off
)
_IR_VERSION = 10  # that of opset 20: an older runtime reads it


def tiny_model() -> bytes:
    """Return an ONNX file with a convolution of ones and a ReLU: input x, (1, 1, 3, 3)."""
    weight = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("x", TensorProto.FLOAT, [1, 1, 3, 3])],
        [value("z", TensorProto.FLOAT, [1, 1, 1, 1])],
        [weight],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made.ir_version = _IR_VERSION
    return bytes(made.SerializeToString())


@functools.cache
def provider_problem(provider: str) -> str:
    """Run a tiny file on a provider and say what is wrong with it; nothing when it works.

    Args:
        provider: as `Session` takes it.

    >>> provider_problem("cpu")
    ''
    """
    try:
        session = Session(tiny_model(), provider, threads=1)
        found = session.run({"x": torch.ones(1, 1, 3, 3)})["z"]
    except Refused as error:
        return "; ".join(problem.what for problem in error.problems)
    except NormconvError as error:
        return str(error)
    off = relative_l2(torch.from_numpy(found), torch.full((1, 1, 1, 1), 9.0))
    return "" if off <= _ENOUGH else f"it computes {found.item()} for 9"
