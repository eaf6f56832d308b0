import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from normconv.deploy import onnx_graph
from normconv.deploy.clean import clean
from normconv.deploy.program import to_onnx
from tests.deploy.deploy_nets import Residual, Tokens, quiet_weight_norm

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def raw(model: nn.Module, *args: torch.Tensor, opset: int = 20) -> ir.Model:
    """What torch.onnx.export gives, uncleaned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(), args, dynamo=True, verbose=False, opset_version=opset
        )
    return program.model


def kinds(model: ir.Model) -> list[tuple[str, bool]]:
    return [(norm.kind, norm.decomposed) for norm in onnx_graph.norm_nodes(model)]


@pytest.mark.parametrize(
    ("norm", "opset", "expected"),
    [
        (nn.Identity(), 20, []),
        (nn.GroupNorm(2, 8), 20, [("GroupNormalization", True)]),
        (nn.GroupNorm(1, 8), 18, [("GroupNormalization", True)]),
        (nn.GroupNorm(2, 8), 21, [("GroupNormalization", False)]),
        (nn.InstanceNorm2d(8, affine=True), 20, [("InstanceNormalization", False)]),
        (nn.LayerNorm([8, 6, 6]), 20, [("LayerNormalization", False)]),
        (nn.RMSNorm([8, 6, 6]), 20, [("RMSNormalization", True)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_norm_nodes_are_seen(norm, opset, expected):
    assert kinds(raw(Residual(norm), IMAGE, opset=opset)) == expected


def test_a_batch_norm_that_nothing_absorbs_is_seen():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    assert kinds(raw(model, IMAGE)) == [("BatchNormalization", False)]


class LayerNormByHand(nn.Module):
    def __init__(self, centred: bool = True) -> None:
        super().__init__()
        self.centred = centred

    def forward(self, x):
        c = x - x.mean(1, keepdim=True) if self.centred else x
        return c / torch.sqrt((c * c).mean(1, keepdim=True) + 1e-5)


class ScaleShift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.shift = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x):
        return x * self.scale + self.shift


class Lengths(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x, dim=1) + x / torch.sqrt((x * x).sum(1, keepdim=True))


def test_norms_written_as_arithmetic_are_seen():
    assert kinds(raw(LayerNormByHand(), IMAGE)) == [("LayerNormalization", True)]
    assert kinds(raw(LayerNormByHand(False), IMAGE)) == [("RMSNormalization", True)]


def test_scale_and_shift_and_length_are_no_norms():
    assert kinds(raw(ScaleShift(), IMAGE)) == []
    assert kinds(raw(Lengths(), IMAGE)) == []


def test_unfolded_weight_norm_is_weight_arithmetic():
    # 64·64·9 elements: above the 8192 that the exporter folds itself.
    model = nn.Sequential(quiet_weight_norm(nn.Conv2d(64, 64, 3)))
    graph = raw(model, torch.randn(1, 64, 5, 5))
    ops = {ref.op for ref in onnx_graph.weight_arithmetic(graph)}
    assert ops & {"ReduceL2", "Mul", "Div", "ReduceSum", "Sqrt"}
    (use,) = onnx_graph.non_initializer_weights(graph)
    assert (use.op, use.slot, use.from_input) == ("Conv", 1, False)
    # It is not counted as a normalization of activations.
    assert kinds(graph) == []


def test_clean_folds_weight_arithmetic_of_any_size():
    model = nn.Sequential(quiet_weight_norm(nn.Conv2d(64, 64, 3)))
    graph = raw(model, torch.randn(1, 64, 5, 5))
    clean(graph)
    assert onnx_graph.weight_arithmetic(graph) == []
    assert onnx_graph.non_initializer_weights(graph) == []
    assert onnx_graph.node_counts(graph) == {"Conv": 1}
    assert len(graph.graph.initializers) == 2


def test_a_transposed_linear_is_weight_arithmetic_until_cleaned():
    class Shared(Tokens):
        # Used twice, a large weight is not folded by the exporter.
        def forward(self, tokens):
            return super().forward(super().forward(tokens))

    graph = raw(Shared(width=2048), torch.randn(2, 5, 16))
    assert {ref.op for ref in onnx_graph.weight_arithmetic(graph)} == {"Transpose"}
    clean(graph)
    assert onnx_graph.weight_arithmetic(graph) == []


def test_attention_has_no_weights_between_activations():
    class Scores(nn.Module):
        def forward(self, q, k):
            return q @ k.transpose(1, 2)

    graph = raw(Scores(), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert onnx_graph.non_initializer_weights(graph) == []
    assert onnx_graph.weight_arithmetic(graph) == []


def test_a_weight_from_the_input_is_told_apart():
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight * x.mean())

    graph = raw(Dynamic(), IMAGE)
    (use,) = onnx_graph.non_initializer_weights(graph)
    assert use.from_input
    assert onnx_graph.weight_arithmetic(graph) == []


def test_dead_initializers_go():
    program = to_onnx(Residual().eval(), (IMAGE,), {}, dynamic_batch=True, opset=20)
    graph = program.model.graph
    graph.register_initializer(ir.Value(name="dead", const_value=ir.tensor([1.0], name="dead")))
    clean(program.model)
    assert "dead" not in graph.initializers


def test_the_exporter_leaks_and_cleaning_removes_it(tmp_path: Path):
    graph = raw(Residual(nn.GroupNorm(2, 8)), IMAGE)
    ir.save(graph, tmp_path / "raw.onnx")
    leaks = onnx_graph.leaked_paths(tmp_path / "raw.onnx")
    assert leaks
    assert b"deploy_nets.py" in (tmp_path / "raw.onnx").read_bytes()
    clean(graph)
    ir.save(graph, tmp_path / "clean.onnx")
    assert onnx_graph.leaked_paths(tmp_path / "clean.onnx") == []
    content = (tmp_path / "clean.onnx").read_bytes()
    for trace in (b".py", b"stack_trace", b"site-packages", b"pkg.torch"):
        assert trace not in content


@pytest.mark.parametrize(
    "text",
    [
        'File "net.py", line 3, in forward',
        "/home/someone/net",
        "C:\\Users\\someone",
        "src/models/net.py",
        str(Path.cwd() / "x"),
    ],
)
def test_leaks_are_found_wherever_they_stand(text):
    graph = onnx.helper.make_graph([], "g", [], [])
    model = onnx.helper.make_model(graph, doc_string=text)
    assert len(onnx_graph.leaked_paths(model)) == 1
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, {"note": text})
    assert len(onnx_graph.leaked_paths(model)) == 1


@pytest.mark.parametrize("name", ["/layer1/0/conv1/Conv_output_0", "layer1.0.conv1", "1.0", "a/b"])
def test_node_names_of_other_exporters_are_no_leaks(name):
    node = onnx.helper.make_node("Relu", ["x"], [name], name=name)
    graph = onnx.helper.make_graph([node], "g", [], [])
    assert onnx_graph.leaked_paths(onnx.helper.make_model(graph)) == []


def test_nodes_keep_the_module_they_came_from():
    program = to_onnx(Residual().eval(), (IMAGE,), {}, dynamic_batch=True, opset=20)
    clean(program.model)
    modules = {n.metadata_props.get(onnx_graph.MODULE_KEY) for n in program.model.graph}
    assert {"stem", "grouped", "up", "head"} <= modules
