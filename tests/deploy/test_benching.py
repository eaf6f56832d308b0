"""Timing: what is measured, on what, in which order; never how long it took."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import normconv as nc
from normconv.deploy import benching, contenders
from normconv.deploy.probing import provider_problem, tiny_model
from normconv.errors import Refused, UsageError
from normconv.numerics import take_turns
from normconv.report import Report

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def convolution(batch: int | str) -> onnx.ModelProto:
    """A file with a convolution and a ReLU, for a batch of that size or a free one."""
    weight = numpy_helper.from_array(torch.randn(4, 3, 3, 3).numpy(), "w")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "net",
        [value("x", TensorProto.FLOAT, [batch, 3, 6, 6])],
        [value("z", TensorProto.FLOAT, [batch, 4, 4, 4])],
        [weight],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    onnx.save(convolution("batch"), folder / "free.onnx")
    onnx.save(convolution(2), folder / "fixed.onnx")
    return {"free": folder / "free.onnx", "fixed": folder / "fixed.onnx"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Take turns by a clock that stands still but for what each work says; keep the order of calls."""
    calls: list[list[int]] = []

    def turns(works, **options):
        now, order = [0.0], []
        calls.append(order)

        def named(place: int) -> None:
            works[place]()
            order.append(place)
            now[0] += float(place + 1)

        wrapped = [functools.partial(named, place) for place in range(len(works))]
        return take_turns(
            wrapped, **{**options, "clock": lambda: now[0], "sleep": lambda seconds: None}
        )

    monkeypatch.setattr(benching, "take_turns", turns)
    return calls


def rows_of(report: Report) -> list[tuple[str, str, int]]:
    return [(r["model"], r["backend"], r["batch_size"]) for r in report.facts["timings"]]


def test_all_take_turns_at_each_batch_size(quick, files) -> None:
    models = {"bn": net(), "wn": files["free"]}
    report = nc.bench(models, IMAGE, batch_sizes=(1, 4), backends=("eager", "ort-cpu"), seconds=0)
    assert rows_of(report) == [
        ("bn", "eager", 1),
        ("wn", "ort-cpu", 1),
        ("bn", "eager", 4),
        ("wn", "ort-cpu", 4),
    ]
    # A turn is one call that is not counted and three that are; the order is turned round.
    forth, back = [0] * 4 + [1] * 4, [1] * 4 + [0] * 4
    assert quick == [forth + back + forth + back + forth] * 2


def test_the_arithmetic_of_a_row(quick, files) -> None:
    """By the clock of these tests a call of the n-th takes n seconds."""
    models = {"a": net(), "b": net(), "c": files["free"]}
    report = nc.bench(models, IMAGE, backends=("eager", "ort-cpu"), seconds=0)
    first, second, third = report.facts["timings"]
    assert [row["latency_ms"] for row in (first, second, third)] == [1e3, 2e3, 3e3]
    assert [row["p95_ms"] for row in (first, second, third)] == [1e3, 2e3, 3e3]
    assert [row["throughput"] for row in (first, second)] == [2.0, 1.0]
    assert (second["ratio"], second["ratio_quartiles"]) == (2.0, [2.0, 2.0])
    assert (third["ratio"], third["ratio_to"]) == (3.0, "a on eager")
    assert (first["turns"], first["calls"]) == (5, 15)


def test_a_ratio_is_to_the_first_model_on_the_same_backend(quick, files) -> None:
    models = {"a": files["free"], "b": files["fixed"], "c": net()}
    report = nc.bench(models, IMAGE, backends=("ort-cpu", "eager"), seconds=0)
    found = {row["model"]: row["ratio_to"] for row in report.facts["timings"]}
    assert found == {"a": "a on ort-cpu", "b": "a on ort-cpu", "c": "a on ort-cpu"}


def test_what_is_absent_is_listed_with_the_reason(quick, files, monkeypatch) -> None:
    monkeypatch.setattr(contenders, "provider_problem", lambda p: "" if p == "cpu" else f"no {p}")
    report = nc.bench({"wn": files["free"], "bn": net()}, IMAGE, seconds=0)
    assert [(row["what"], row["reason"]) for row in report.facts["absent"]] == [
        ("ort-cuda", "no cuda"),
        ("ort-tensorrt", "no tensorrt"),
    ]
    asked = nc.bench({"bn": net()}, IMAGE, backends=("eager", "ort-cpu"), seconds=0)
    (row,) = asked.facts["absent"]
    assert (row["what"], row["reason"]) == ("ort-cpu", "it runs .onnx files, and there is none")


def test_a_model_that_does_not_run_at_a_batch_size_is_listed(quick, files) -> None:
    models = {"free": files["free"], "fixed": files["fixed"]}
    report = nc.bench(models, IMAGE, batch_sizes=(2, 3), backends=("ort-cpu",), seconds=0)
    assert ("fixed", "ort-cpu", 2) in rows_of(report)
    assert ("fixed", "ort-cpu", 3) not in rows_of(report)
    (row,) = report.facts["absent"]
    assert row["what"] == "fixed on ort-cpu at batch 3"
    assert "takes the shape [2, 3, 6, 6], not [3, 3, 6, 6]" in row["reason"]


def test_where_nothing_runs_every_reason_is_told(files) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such luck")

    with pytest.raises(Refused, match=r"(?s)bn on eager at batch 2: RuntimeError: no such luck"):
        nc.bench({"bn": Broken()}, IMAGE, seconds=0)
    with pytest.raises(Refused, match="none of ort-cpu runs it here"):
        nc.bench({"bn": net()}, IMAGE, backends=("ort-cpu",), seconds=0)


def test_models_are_described(quick, files, tmp_path) -> None:
    torch.export.save(torch.export.export(net().eval(), (IMAGE,)), tmp_path / "net.pt2")
    models = {"bn": net(), "wn": files["free"], "pt2": tmp_path / "net.pt2"}
    report = nc.bench(models, IMAGE, backends=("eager", "ort-cpu"), seconds=0)
    about = report.facts["models"]
    module = models["bn"]
    tensors = (*module.parameters(), *module.buffers())
    assert about["bn"]["bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    assert (about["bn"]["norm_nodes"], about["bn"]["nodes"]) == (1, None)
    assert about["wn"]["bytes"] == files["free"].stat().st_size
    assert (about["wn"]["nodes"], about["wn"]["norm_nodes"]) == (2, 0)
    assert about["wn"]["weight_arithmetic"] == 0
    rows = {row["model"]: row for row in report.facts["timings"]}
    assert sum(rows["wn"]["nodes_by_provider"].values()) > 0
    assert rows["wn"]["load_ms"] > 0
    assert rows["pt2"]["load_ms"] > 0
    assert rows["bn"]["load_ms"] is None
    assert json.loads(report.to_json())["facts"]["machine"]["threads"] == 1


def test_a_module_is_left_as_it_was(quick) -> None:
    model = net().train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    threads = torch.get_num_threads()
    nc.bench({"bn": model}, IMAGE, threads=1, seconds=0)
    assert [m.training for m in model] == [False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads
    loss = model(IMAGE).sum()  # no tensor of inference mode is left in it
    loss.backward()


def test_a_compiled_module_is_timed_and_what_cannot_be_is_told(quick, monkeypatch) -> None:
    compile_ = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_)
    report = nc.bench({"bn": net()}, IMAGE, backends=("eager", "compile"), seconds=0)
    assert rows_of(report) == [("bn", "eager", 2), ("bn", "compile", 2)]
    compiled = report.facts["timings"][1]
    assert compiled["load_ms"] > 0
    assert compiled["ratio_to"] == "bn on compile"

    def fails(*args, **options):
        raise RuntimeError("no compiler\nis found")

    monkeypatch.setattr(torch, "compile", fails)
    report = nc.bench({"bn": net()}, IMAGE, backends=("eager", "compile"), seconds=0)
    (row,) = report.facts["absent"]
    assert row == {"what": "compile", "reason": "RuntimeError: no compiler"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "there is none"),
        ({"models": {"a": "none.onnx"}}, "no such file"),
        ({"models": {"a": "model.pt"}}, r"ends in .onnx or .pt2"),
        ({"backends": ("eager", "abacus")}, "'abacus': there are eager"),
        ({"batch_sizes": (1, 0)}, "not all 1 or more"),
        ({"batch_sizes": (1,), "inputs": torch.tensor(1.0)}, "no input has a batch axis"),
        ({"batch_sizes": (1,), "inputs": torch.zeros(0, 3)}, "hold no sample"),
    ],
)
def test_a_wrong_call_is_told(change, message) -> None:
    call = {"models": {"bn": net()}, "inputs": IMAGE, **change}
    with pytest.raises(UsageError, match=message):
        nc.bench(**call)


def test_inputs_are_repeated_to_the_batch_size(quick) -> None:
    seen: list[tuple[int, ...]] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape))
            return x

    nc.bench({"a": Looks()}, IMAGE, batch_sizes=(1, 5), seconds=0)
    assert set(seen) == {(1, 3, 6, 6), (5, 3, 6, 6)}


def test_a_provider_is_tried_for_real(monkeypatch) -> None:
    provider_problem.cache_clear()
    assert provider_problem("cpu") == ""
    assert provider_problem("CPUExecutionProvider") == ""
    assert "is not one of cpu, cuda, tensorrt" in provider_problem("abacus")
    if not torch.cuda.is_available():
        assert provider_problem("cuda") != ""
        assert provider_problem("tensorrt") != ""
    provider_problem.cache_clear()
    monkeypatch.setattr(
        "normconv.deploy.probing.Session.run",
        lambda self, inputs: {"z": torch.zeros(1, 1, 1, 1).numpy()},
    )
    assert provider_problem("cpu") == "it computes 0.0 for 9"
    provider_problem.cache_clear()


def test_inputs_and_outputs_stay_where_a_file_computes(files) -> None:
    from normconv.deploy import Session

    session = Session(tiny_model(), "cpu", threads=1)
    x = torch.full((1, 1, 3, 3), 2.0)
    place = {"z": torch.zeros(1, 1, 1, 1).numpy()}
    call = session.bound({"x": x}, place)
    assert call() is None
    with pytest.raises(Refused, match="takes the shape"):
        session.bound({"x": IMAGE})
    session.bound({"x": x})()
