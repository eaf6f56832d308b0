"""Random networks: whatever they are made of, every target converts them or says why not."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

from normconv.graph import is_norm
from normconv.numerics import Affine
from normconv.plan import Plan
from normconv.surgery import Result
from tests.cases import EXACT
from tests.random_networks import Layer, Op, Program, RandomNet, check, check_drawn, programs
from tests.random_networks.expected import must_fold
from tests.random_networks.subject import Subject

RUN = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@RUN
@given(programs())
def test_every_target_converts_or_refuses_a_random_network(program: Program) -> None:
    check_drawn(program, captures=5, exports=6)


@settings(RUN, max_examples=50)
@given(programs())
def test_a_program_is_what_its_repr_says(program: Program) -> None:
    names = {"Program": Program, "Layer": Layer, "Op": Op}
    again = eval(repr(program), names)
    assert again == program
    left, right = program.model().state_dict(), again.model().state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(torch.nan_to_num(left[k]), torch.nan_to_num(right[k])) for k in left)
    assert pickle.loads(pickle.dumps(RandomNet(program))).program == program


# --- what is checked can fail ---------------------------------------------------------------------

FOLDED = Program(
    ((4, 3, 6, 6),),
    (
        Layer("m0", "conv2d", (3, 4, 3), {"bias": False}),
        Layer("m1", "bn2d", (4,)),
        Layer("row.0", "conv_transpose2d", (4, 4, 3), {"groups": 2}),
        Layer("table.0", "norm act", (4,), {"act": "relu", "p": 0.3}),
    ),
    (
        Op("call", (0,), "m0"),
        Op("call", (1,), "m1"),
        Op("relu", (2,)),
        Op("call", (3,), "row.0"),
        Op("call", (4,), "table.0"),
    ),
    (5,),
)
#: The first norm's input has another user.
GATED = dataclasses.replace(FOLDED, ops=(*FOLDED.ops, Op("gate", (2, 1))), outputs=(5, 6))
DTYPES = ("float64", "float32", "bfloat16", "float16")


def in_dtype(dtype: str) -> Program:
    return dataclasses.replace(FOLDED, dtype=dtype)


@pytest.mark.parametrize("program", [*map(in_dtype, DTYPES), GATED], ids=[*DTYPES, "gated"])
def test_the_sound_package_passes(program: Program) -> None:
    done = check(program, export="wn" if program.dtype == "float32" else "")
    assert done.actions.keys() == {target.name for target in EXACT}
    assert done.export == ("proved" if program.dtype == "float32" else "")
    assert done.blind == ""
    assert "export" in done.captures


def test_what_must_fold_is_known() -> None:
    assert must_fold(FOLDED) == {"m1": "m0", "table.0": "row.0"}
    assert must_fold(GATED) == {"table.0": "row.0"}


def absorbing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Affine], Affine]) -> None:
    """Let every layer absorb another map than the norm's."""
    from normconv.graph import rewrite

    sound = rewrite.absorb_affine_

    def faulty(layer: nn.Module, affine: Affine, **more: Any) -> None:
        sound(layer, change(affine), **more)

    monkeypatch.setattr(rewrite, "absorb_affine_", faulty)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gain_that_is_off_by_a_ten_thousandth_is_seen(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    absorbing(monkeypatch, lambda affine: affine._replace(scale=affine.scale * 1.0001))
    with pytest.raises(AssertionError, match=r"off by|proof fails"):
        check(in_dtype(dtype), captures=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forgotten_mean_is_seen(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    from normconv.graph import families

    sound = families.norm_affine

    def faulty(mean: Any, var: Any, *rest: Any) -> Affine:
        return sound(torch.zeros_like(mean), var, *rest)

    absorbing(monkeypatch, lambda affine: affine._replace(shift=affine.shift * 0))
    with pytest.raises(AssertionError, match="proof fails"):
        check(in_dtype(dtype), captures=False)
    monkeypatch.undo()
    # With the mean gone wherever it is read, only the comparisons made anew can tell.
    monkeypatch.setattr(families, "norm_affine", faulty)
    plain = dataclasses.replace(FOLDED, layers=FOLDED.layers[:2], ops=FOLDED.ops[:2], outputs=(2,))
    with pytest.raises(AssertionError, match="proof fails"):
        check(dataclasses.replace(plain, dtype=dtype), captures=False)


def planning(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let every plan decide otherwise about the first norm."""
    sound = Subject.plan

    def faulty(self: Subject, target: str, **more: Any) -> Plan:
        plan = sound(self, target, **more)
        if target == "frozen":
            return plan
        steps = [
            dataclasses.replace(step, **changes) if step.site == "m1" else step
            for step in plan.steps
        ]
        return dataclasses.replace(plan, steps=tuple(steps))

    monkeypatch.setattr(Subject, "plan", faulty)


def test_a_fold_past_another_user_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    planning(monkeypatch, action="fold", producers=("m0",))
    check(FOLDED, captures=False)
    with pytest.raises(AssertionError, match="proof fails"):
        check(GATED, captures=False)


def test_a_norm_that_is_not_folded_where_it_could_be_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planning(monkeypatch, action="affine", producers=())
    check(GATED, captures=False)
    with pytest.raises(AssertionError, match="m1 is not folded into m0"):
        check(FOLDED, captures=False)


def applying(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[nn.Module, Any], None]) -> None:
    """Let `apply_plan` do something to its argument or its result."""
    from tests.random_networks import checks

    sound = checks.apply_plan

    def faulty(model: nn.Module, plan: Plan) -> Result:
        result = sound(model, plan)
        spoil(model, result.model)
        return result

    monkeypatch.setattr(checks, "apply_plan", faulty)


def _leave_norm(model: nn.Module, result: Any) -> None:
    result.row.add_module("left", nn.BatchNorm2d(4))


def _write_argument(model: Any, result: nn.Module) -> None:
    with torch.no_grad():
        model.m0.weight.add_(1e-7)


def _change_mode(model: nn.Module, result: Any) -> None:
    result.row.train(not result.row.training)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_leave_norm, "norms left"),
        (_write_argument, r"changes m0.weight|proof fails"),
        (_change_mode, "changes its mode"),
    ],
)
def test_a_spoilt_result_is_seen(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[nn.Module, Any], None], told: str
) -> None:
    applying(monkeypatch, spoil)
    with pytest.raises(AssertionError, match=told):
        check(FOLDED, captures=False)


def test_samples_that_meet_are_seen() -> None:
    from tests.random_networks.checks import assert_samples_apart

    model = FOLDED.model()
    subject = Subject.of(FOLDED, model)
    assert any(is_norm(module) for module in model.modules())
    with pytest.raises(AssertionError, match="one sample sees another"):
        assert_samples_apart(subject, model)


def test_captures_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.random_networks import views

    sound = views.survey

    def faulty(*args: Any, methods: tuple[str, ...]) -> Any:
        found = sound(*args, methods=methods)
        if methods != ("export",):
            return found
        sites = tuple(dataclasses.replace(site, producers=()) for site in found.sites)
        return dataclasses.replace(found, sites=sites)

    monkeypatch.setattr(views, "survey", faulty)
    with pytest.raises(AssertionError, match="export differ"):
        check(FOLDED)


def test_a_wrong_file_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from normconv.deploy import export

    sound = export.fold

    def faulty(model: nn.Module, **more: Any) -> Result:
        result = sound(model, **{**more, "share_tensors": False})
        if not any(is_norm(module) for module in result.model.modules()):
            with torch.no_grad():
                result.model.get_submodule("m0").bias.mul_(1.001)
        return result

    monkeypatch.setattr(export, "fold", faulty)
    with pytest.raises(AssertionError, match="wn, exported"):
        check(FOLDED, captures=False, export="wn")


def test_a_refusal_without_cause_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stateless = dataclasses.replace(
        FOLDED,
        layers=tuple(
            dataclasses.replace(layer, options={"track_running_stats": False})
            if layer.path == "m1"
            else layer
            for layer in FOLDED.layers
        ),
    )
    done = check(stateless, captures=False)
    assert done.refusals.keys() == {target.name for target in EXACT}
    from tests.random_networks import checks

    monkeypatch.setattr(checks, "refused_norms", lambda program: {"table.0"})
    with pytest.raises(AssertionError, match="refused are"):
        check(stateless, captures=False)
    with pytest.raises(AssertionError, match="takes what it must refuse"):
        check(FOLDED, captures=False)
