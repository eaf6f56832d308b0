"""Uses that went wrong once: what a call leaves behind, proofs that prove nothing, odd calls."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.graph import is_norm
from normconv.proof import randomise_norms_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)
        self.b = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(x))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    model = kind()
    randomise_norms_(model, (torch.randn(8, 3, 8, 8),))
    return model.eval()


# --- nothing is left on the user's model ----------------------------------------------------------


class LazyCache(Net):
    def __init__(self) -> None:
        super().__init__()
        self.grid: Tensor | None = None
        self.seen: list[Any] = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.count += 1
        self.seen.append(y)
        if self.grid is None:
            self.grid = torch.ones_like(y) * 2
        return y + self.grid


def test_caches_and_counters_are_as_before(tmp_path: Path) -> None:
    model = made(LazyCache)
    converted, _ = nc.convert(model, "wn", example_inputs=(X,))
    nc.export_onnx(converted, tmp_path / "m.onnx", example_inputs=(X,))
    for each in (model, converted):
        assert each.grid is None
        assert each.seen == []
        assert each.count.item() == 0
    assert torch.allclose(converted(X), model(X), atol=1e-5)


def test_autocast_neither_leaks_in_nor_is_poisoned() -> None:
    model = made(Net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, report = nc.convert(model, "wn", example_inputs=(X,))
        assert type(model(X)) is Tensor
    assert report.passed


# --- a proof that sees nothing fails --------------------------------------------------------------


class Chaotic(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sin(self.c(x) * 1e8))


def test_an_original_that_is_no_yardstick_proves_nothing() -> None:
    with pytest.raises(nc.CheckFailed, match=r"nothing can be\s+proved in float32"):
        nc.convert(made(Chaotic), "wn", example_inputs=(X,))


def test_an_empty_batch_proves_nothing() -> None:
    with pytest.raises(nc.CheckFailed, match="no elements"):
        nc.convert(made(Net), "wn", example_inputs=(X[:0],))
    report = nc.verify(made(Net), made(Net), (X[:0],))
    assert not report.passed


class NeedsTheNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.b.num_features


def test_a_converted_model_that_cannot_run_is_a_failed_check() -> None:
    with pytest.raises(nc.CheckFailed, match="num_features"):
        nc.convert(made(NeedsTheNorm), "wn", example_inputs=(X,))


# --- float64 runs of models that make tensors of their own ----------------------------------------


class MakesTensors(Net):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.ones(4)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).mean((2, 3)) @ torch.eye(4)
        return y @ torch.diag(self.plain) + torch.zeros(len(y), 4).index_add_(
            0, torch.arange(len(y)), y
        )


class WantsFloat32(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x)


def test_float64_runs() -> None:
    assert nc.convert(made(MakesTensors), "wn", example_inputs=(X,)).report.passed
    with pytest.raises(nc.Refused, match=r"cannot be run in float64.*float32 only"):
        nc.convert(made(WantsFloat32), "wn", example_inputs=(X,))


# --- graphs ----------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)
        self.gamma, self.beta = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.c(x), self.mean, self.var, self.gamma, self.beta)


@pytest.mark.parametrize("target", ["wn", "plain", "frozen"])
def test_functional_norms_convert_as_a_graph(target: str) -> None:
    model = Functional().eval()
    with pytest.raises(nc.PlanError, match='output="graph"'):
        nc.convert(model, target, example_inputs=(X,))
    graph, report = nc.convert(model, target, example_inputs=(X,), output="graph")
    assert isinstance(graph, torch.fx.GraphModule)
    assert report.passed
    assert report.sites[0].error is not None
    assert not any(is_norm(module) for module in graph.modules())
    torch.testing.assert_close(graph(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_converted_model_can_be_traced_by_any_tracer() -> None:
    converted, _ = nc.convert(made(Net), "wn", example_inputs=(X,))
    traced = torch.fx.symbolic_trace(converted)
    assert torch.equal(traced(X), converted(X))


# --- plans edited by hand ---------------------------------------------------------------------------


def test_a_plan_speaks_of_every_norm_once() -> None:
    model = made(Net)
    plan = nc.make_plan(model, "wn", example_inputs=(X,))
    with pytest.raises(nc.PlanError, match="no step of the plan speaks of this norm"):
        nc.apply_plan(model, replace(plan, steps=()))
    with pytest.raises(nc.PlanError, match="two steps"):
        nc.apply_plan(model, replace(plan, steps=plan.steps * 2))
    dropped = (replace(plan.steps[0], action="drop"),)
    with pytest.raises(nc.PlanError, match="drops a norm that is called"):
        nc.apply_plan(model, replace(plan, steps=dropped))


# --- odd calls --------------------------------------------------------------------------------------


class Flag(Net):
    def forward(self, x: Tensor, return_pre: bool = False) -> Any:
        y = self.c(x)
        z = self.b(y)
        return (z, y) if return_pre else z


def test_fixed_arguments_are_told_and_can_be_covered() -> None:
    plan = nc.make_plan(made(Flag), "wn", example_inputs=(X,))
    assert any("return_pre=False" in note for note in plan.notes)
    covered = nc.make_plan(
        made(Flag), "wn", example_inputs=(X,), example_kwargs={"return_pre": True}
    )
    assert covered.steps[0].action == "affine"


class ReadsShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        n, c, h, w = y.shape
        return self.b(y).reshape(n, c, h * w)


def test_reading_a_shape_does_not_keep_a_norm_from_folding() -> None:
    plan = nc.make_plan(made(ReadsShape), "wn", example_inputs=(X,))
    assert plan.steps[0].action == "fold"


def test_wrong_calls_are_usage_errors() -> None:
    model: Any = made(Net)
    assert nc.convert(model, "wn", example_inputs=X).report.passed  # one tensor for a tuple of one
    assert nc.convert(model, "wn", example_inputs=(X,), include="b").report.passed
    for call in (
        lambda: nc.convert("x.pt", example_inputs=(X,)),  # type: ignore[arg-type]
        lambda: nc.convert(model, None, example_inputs=(X,)),  # type: ignore[arg-type]
        lambda: nc.convert(model, example_inputs=(X,), output="grph"),  # type: ignore[arg-type]
        lambda: nc.make_plan(model, "frozen", example_inputs=(X,), options={"trainable": "False"}),
    ):
        with pytest.raises(nc.UsageError):
            call()


def test_what_cannot_be_copied_is_named() -> None:
    model = made(Net)
    model.lock = threading.Lock()
    with pytest.raises(nc.PlanError, match="lock: it cannot be copied"):
        nc.convert(model, "wn", example_inputs=(X,))
    model = made(Net).train()
    model.log = {"loss": model(X).sum()}
    assert nc.convert(model, "wn", example_inputs=(X,)).report.passed


class Closure(Net):
    def __init__(self) -> None:
        super().__init__()
        c, b = self.c, self.b
        self.both = lambda x: b(c(x))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.both(x)
        return out


def test_a_norm_in_a_closure_is_refused() -> None:
    with pytest.raises(nc.PlanError, match="both holds it outside"):
        nc.convert(made(Closure), "wn", example_inputs=(X,))


# --- the command line destroys nothing ---------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "own.pt", "-o", "own.pt"),
        ("convert", "own.pt", "--onnx", "own.pt"),
        ("export", "own.pt", "-o", "own.pt"),
        ("plan", "own.pt", "-o", "own.pt"),
        ("fold", "own.pt", "-o", "folder"),
        ("convert", "own.pt", "-o", "own.xyz"),
    ],
)
def test_outputs_never_replace_what_is_read(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    nc.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "own.pt")
    before = Path("own.pt").read_bytes()
    result = CliRunner().invoke(app, [*words, "--input", "2x3x8x8"])
    assert result.exit_code == 2, result.output
    assert Path("own.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "own.pt"]
