"""Streaming writes the same message as the library does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from normconv.deploy.stream import write_streamed


def model_of(dtype: int) -> ir.Model:
    generator = np.random.default_rng(0)
    large = generator.normal(size=(40, 33)).astype(helper.tensor_dtype_to_np_dtype(dtype))
    small = generator.normal(size=(3,)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "large"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", dtype, ["batch", 40])],
        [helper.make_tensor_value_info("y", dtype, ["batch", 33])],
        [numpy_helper.from_array(large, "large"), numpy_helper.from_array(small, "small")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    proto.metadata_props.add(key="a", value="b")
    return ir.from_proto(proto)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_what_is_read_back_is_what_the_library_would_write(tmp_path: Path, dtype: int) -> None:
    model = model_of(dtype)
    expected = ir.to_proto(model)
    write_streamed(model, tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(written, full_check=True)
    tensors = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
    for tensor in expected.graph.initializer:
        assert np.array_equal(tensors.pop(tensor.name), numpy_helper.to_array(tensor))
    assert not tensors
    for proto in (expected, written):
        proto.graph.ClearField("initializer")
        proto.graph.ClearField("value_info")  # the library describes initializers twice
    assert written == expected
    # The model is left as it was, in its order.
    assert list(model.graph.initializers) == ["large", "small"]
