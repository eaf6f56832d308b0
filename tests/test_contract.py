"""Every target over every zoo model: refused with a reason and a way out, or converted and proved."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from normconv.api import to_graph
from normconv.errors import PlanError, Refused
from normconv.folding import fold, rebuild
from normconv.graph import is_norm, survey
from normconv.layers import ChannelAffine, Reparametrised
from normconv.numerics import noise_bound, relative_l2
from normconv.plan import Plan, history_of
from normconv.proof import (
    blind_sites,
    coarsest_dtype,
    evaluate,
    flat_outputs,
    prove,
    randomise_norms_,
)
from normconv.surgery import Result, apply_plan, make_plan
from tests.cases import EXACT
from tests.zoo import ZOO, Case

NAMES = tuple(target.name for target in EXACT)


class Done(NamedTuple):
    """A conversion and what went in."""

    case: Case
    original: nn.Module
    plan: Plan
    result: Result

    @property
    def model(self) -> nn.Module:
        return self.result.model


def original_of(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The case's model with statistics under which a wrong fold shows."""
    case = ZOO[name]
    model = case.build()
    if case.converts:
        args, kwargs = case.inputs()
        randomise_norms_(model, args, kwargs)
    if case.after:
        case.after(model)
    if dtype is not None:
        model = model.to(dtype)
    if case.graph:
        args, kwargs = case.inputs(dtype)
        return to_graph(model, args, kwargs)
    return model


def plan_of(model: nn.Module, case: Case, target: str, dtype: torch.dtype | None = None) -> Plan:
    args, kwargs = case.inputs(dtype)
    return make_plan(model, target, example_inputs=args, example_kwargs=kwargs, **case.plan)


@functools.cache
def converted(name: str, target: str, dtype: torch.dtype | None = None) -> Done:
    model = original_of(name, dtype)
    plan = plan_of(model, ZOO[name], target, dtype)
    return Done(ZOO[name], model, plan, apply_plan(model, plan))


def skip_where_graphs_do_not_pickle(model: nn.Module) -> None:
    """torch 2.11 cannot pickle a GraphModule whose forward has annotations as text."""
    if isinstance(model, torch.fx.GraphModule):
        try:
            pickle.dumps(model)
        except AttributeError as reason:
            pytest.skip(f"this torch cannot pickle the traced original ({reason})")


def each(wanted: str) -> Any:
    """Parametrize over the cases that convert, or are refused, and the targets."""
    found = [
        pytest.param(name, target, id=f"{name}-{target}")
        for name, case in ZOO.items()
        if case.converts == (wanted == "converts")
        for target in NAMES
    ]
    return pytest.mark.parametrize(("name", "target"), found)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every tensor that hangs on the model, plain attributes included."""
    for path, module in model.named_modules(remove_duplicate=False):
        stores = (module._parameters, module._buffers, module.__dict__)
        for store in stores:
            for key, value in store.items():
                if isinstance(value, Tensor):
                    yield f"{path}.{key}", value


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must not change: identities, values, flags, hooks, attributes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path} module"] = (id(module), type(module), module.training)
        found[f"{path} attributes"] = tuple(module.__dict__)
        found[f"{path} hooks"] = tuple(map(id, module._forward_hooks.values()))
        found[f"{path} pre-hooks"] = tuple(map(id, module._forward_pre_hooks.values()))
    for path, tensor in tensors_of(model):
        lazy = isinstance(tensor, nn.parameter.UninitializedTensorMixin)
        value = None if lazy else tensor.detach().clone()
        found[f"{path} tensor"] = (type(tensor), tensor.requires_grad, value, id(tensor))
    return found


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if not key.endswith(" tensor"):
            assert after[key] == value, key
            continue
        now = after[key]
        assert (now[0], now[1], now[3]) == (value[0], value[1], value[3]), key
        same = value[2] is None or torch.equal(torch.nan_to_num(now[2]), torch.nan_to_num(value[2]))
        assert same, key


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[key], right[key]) for key in left)


# --- refused --------------------------------------------------------------------------------------


@each("refused")
def test_refusal_names_reason_and_way_out_and_changes_nothing(name: str, target: str) -> None:
    case, model = ZOO[name], original_of(name)
    before = snapshot(model)
    with pytest.raises(Refused) as caught:
        apply_plan(model, plan_of(model, case, target))
    assert case.refused in str(caught.value)
    assert caught.value.problems
    assert all(
        problem.what and problem.where and problem.way_out for problem in caught.value.problems
    )
    assert_unchanged(before, model)


@pytest.mark.parametrize("target", NAMES)
def test_without_strict_a_refused_site_is_kept_and_listed(target: str) -> None:
    case, model = ZOO["no_running_stats_among_others"], original_of("no_running_stats_among_others")
    args, _ = case.inputs()
    plan = make_plan(model, target, example_inputs=args, strict=False)
    assert [step.action for step in plan.steps] == [
        "frozen" if target == "frozen" else "fold",
        "keep",
    ]
    assert any("kept: 2: it keeps no running statistics" in note for note in plan.notes)
    model_after = apply_plan(model, plan).model
    assert isinstance(model_after[2], nn.BatchNorm2d)
    assert prove(model, model_after, plan.converted, args).checks


# --- converted ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@each("converts")
def test_actions_are_the_expected_ones_and_the_proof_holds(name: str, target: str) -> None:
    done = converted(name, target)
    assert done.plan.counts() == done.case.counts(target)
    args, kwargs = done.case.inputs()
    proof = prove(done.original, done.model, done.plan.steps, args, kwargs)
    assert [check for check in proof.checks if not check.passed] == []
    assert all(step.reason for step in done.plan.steps)
    rows = {row.site: row for row in proof.rows}
    for step in done.plan.steps:
        assert step.action == "drop" or rows[step.site].error is not None


@each("converts")
def test_outputs_agree_in_float64(name: str, target: str) -> None:
    if not ZOO[name].float64:
        pytest.skip("the model makes float32 of its input itself")
    done = converted(name, target, torch.float64)
    args, kwargs = done.case.inputs(torch.float64)
    before, after = evaluate(done.original, args, kwargs), evaluate(done.model, args, kwargs)
    assert list(before) == list(after)
    for key, reference in before.items():
        assert after[key].dtype == reference.dtype
        assert relative_l2(after[key], reference) <= 1e-12


@each("converts")
def test_outputs_agree_in_its_own_dtype(name: str, target: str) -> None:
    done = converted(name, target)
    args, kwargs = done.case.inputs()
    exact = evaluate(done.original, args, kwargs, dtype=torch.float64)
    own, after = evaluate(done.original, args, kwargs), evaluate(done.model, args, kwargs)
    for key, reference in exact.items():
        assert after[key].dtype == own[key].dtype
        bound = noise_bound(coarsest_dtype(done.original), relative_l2(own[key], reference))
        assert relative_l2(after[key], reference) <= bound


@each("converts")
def test_the_argument_is_never_changed(name: str, target: str) -> None:
    case, model = ZOO[name], original_of(name)
    args, kwargs = case.inputs()
    before = snapshot(model)
    plan = plan_of(model, case, target)
    assert_unchanged(before, model)
    result = apply_plan(model, plan)
    assert_unchanged(before, model)
    prove(model, result.model, plan.steps, args, kwargs)
    again, again_kwargs = case.inputs()
    assert all(torch.equal(a, b) for a, b in zip(_flat(args), _flat(again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(_flat(kwargs), _flat(again_kwargs), strict=True))
    shared = {id(t) for _, t in tensors_of(model)} & {id(t) for _, t in tensors_of(result.model)}
    assert not shared


def _flat(value: Any) -> list[Tensor]:
    return list(flat_outputs(value).values())


@each("converts")
def test_class_names_and_flags_are_kept(name: str, target: str) -> None:
    done = converted(name, target)
    if isinstance(done.original, torch.fx.GraphModule):
        assert isinstance(done.model, torch.fx.GraphModule)
        return
    if is_norm(done.original):  # the model is the site
        assert type(done.model) is not type(done.original)
        assert done.model.training == done.original.training
        return
    assert type(done.model) is type(done.original)
    before = dict(done.original.named_modules(remove_duplicate=False))
    after = dict(done.model.named_modules(remove_duplicate=False))
    assert before.keys() <= after.keys()
    for path, module in before.items():
        twin = after[path]
        assert twin.training == module.training, path
        if not is_norm(module):
            plain = twin.plain_class if isinstance(twin, Reparametrised) else type(twin)
            parametrized = nn.utils.parametrize.is_parametrized(module)
            assert plain is type(module) or parametrized, path
    aliases: dict[int, list[str]] = {}
    for path, module in before.items():
        aliases.setdefault(id(module), []).append(path)
    for paths in aliases.values():
        assert len({id(after[path]) for path in paths}) == 1, "an alias went astray"


@each("converts")
def test_no_norm_is_left_and_samples_do_not_meet_in_training(name: str, target: str) -> None:
    done = converted(name, target)
    left = [path for path, module in done.model.named_modules() if is_norm(module)]
    assert left == []
    if done.case.couples:
        return
    model = copy.deepcopy(done.model).train()
    args, kwargs = done.case.inputs()
    moved, moved_kwargs = done.case.inputs()
    batch = [*_flat(moved), *_flat(moved_kwargs)][0]
    batch[1] += 1
    twin = copy.deepcopy(model)  # spectral norm moves on with every call
    with torch.no_grad():
        torch.manual_seed(0)
        first = _flat(model(*args, **kwargs))
        torch.manual_seed(0)
        second = _flat(twin(*moved, **moved_kwargs))
    for a, b in zip(first, second, strict=True):
        if a.dim() and a.shape[0] == batch.shape[0]:
            torch.testing.assert_close(
                a[0], b[0], rtol=2e-2 if a.dtype.itemsize < 4 else 1e-5, atol=1e-5
            )


@each("converts")
def test_state_loads_strictly_into_a_fresh_model(name: str, target: str) -> None:
    done = converted(name, target)
    args, kwargs = done.case.inputs()
    fresh = done.case.build(seed=1)
    if done.case.graph:
        fresh = to_graph(fresh, args, kwargs)
    model = apply_plan(fresh, Plan.from_json(done.plan.to_json())).model
    model.load_state_dict(done.model.state_dict(), strict=True)
    model.train(done.model.training)
    for flag, module in zip(done.model.modules(), model.modules(), strict=True):
        module.training = flag.training
    assert_same_state(model, done.model)
    expected, got = evaluate(done.model, args, kwargs), evaluate(model, args, kwargs)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    trainable = {n: p.requires_grad for n, p in done.model.named_parameters()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable


@each("converts")
def test_meta_model_gets_the_same_structure(name: str, target: str) -> None:
    done = converted(name, target)
    if done.case.graph:
        pytest.skip("its graph comes from a traced model")
    with torch.device("meta"):
        fresh = done.case.build()
    model = apply_plan(fresh, done.plan).model
    described = {key: (value.shape, value.dtype) for key, value in done.model.state_dict().items()}
    assert {key: (v.shape, v.dtype) for key, v in model.state_dict().items()} == described
    assert list(model.state_dict()) == list(done.model.state_dict())
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@each("converts")
def test_history_rebuilds_the_structure(name: str, target: str) -> None:
    done = converted(name, target)
    args, kwargs = done.case.inputs()
    fresh = done.case.build(seed=1)
    if done.case.graph:
        fresh = to_graph(fresh, args, kwargs)
    folded = fold(done.model, example_inputs=args, example_kwargs=kwargs).model
    model = rebuild(fresh, history_of(folded))
    model.load_state_dict(folded.state_dict(), strict=True)
    expected, got = evaluate(folded, args, kwargs), evaluate(model, args, kwargs)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@each("converts")
def test_copies_and_pickles_are_equal(name: str, target: str) -> None:
    done = converted(name, target)
    skip_where_graphs_do_not_pickle(done.original)
    args, kwargs = done.case.inputs()
    expected = evaluate(done.model, args, kwargs)
    twins = [copy.deepcopy(done.model)]
    if done.case.pickles:
        twins.append(pickle.loads(pickle.dumps(done.model)))
    for twin in twins:
        assert_same_state(twin, done.model)
        got = evaluate(twin, args, kwargs)
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        assert [type(m) for m in twin.modules() if isinstance(m, Reparametrised)] == [
            type(m) for m in done.model.modules() if isinstance(m, Reparametrised)
        ]
    assert history_of(twins[0]) == history_of(done.model)


@each("converts")
@pytest.mark.parametrize("batch", [1, 2])
def test_training_step_has_finite_gradients(name: str, target: str, batch: int) -> None:
    done = converted(name, target)
    model = copy.deepcopy(done.model).train()
    args, kwargs = done.case.inputs()
    if not done.case.couples:
        args, kwargs = _first(args, batch), _first(kwargs, batch)
    loss = sum(
        output.float().square().mean() + output.float().sum()
        for output in _flat(model(*args, **kwargs))
    )
    if not any(p.requires_grad for p in model.parameters()):
        return
    loss.backward()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and path not in done.case.no_grad_of:
            assert parameter.grad is not None, path
            assert bool(torch.isfinite(parameter.grad).all()), path


def _first(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[:batch]
    if isinstance(value, tuple):
        return tuple(_first(item, batch) for item in value)
    return {key: _first(item, batch) for key, item in value.items()}


@each("converts")
def test_plan_survives_json(name: str, target: str) -> None:
    plan = converted(name, target).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(Plan.from_json(plan.to_json()).to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize("name", [n for n, c in ZOO.items() if c.converts])
def test_folded_weight_norm_is_the_plain_result(name: str) -> None:
    weight_normed, plain = converted(name, "wn"), converted(name, "plain")
    left, right = (
        fold(copy.deepcopy(weight_normed.model)).model,
        fold(copy.deepcopy(plain.model)).model,
    )
    a, b = left.state_dict(), right.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].stride() == b[key].stride()
        # g is rounded once and so is w: two roundings apart.
        assert relative_l2(a[key], b[key]) <= noise_bound(a[key].dtype), key
    classes = [type(module).__name__ for module in left.modules()]
    assert classes == [type(module).__name__ for module in right.modules()]
    assert not any(isinstance(module, Reparametrised) for module in left.modules())
    flags = {key: p.requires_grad for key, p in left.named_parameters()}
    assert flags == {key: p.requires_grad for key, p in right.named_parameters()}


@each("converts")
def test_folding_keeps_the_function(name: str, target: str) -> None:
    if not ZOO[name].float64:
        pytest.skip("the model makes float32 of its input itself")
    done = converted(name, target, torch.float64)
    args, kwargs = done.case.inputs(torch.float64)
    expected = evaluate(done.original, args, kwargs)
    for folded in (
        fold(done.model).model,
        fold(done.model, example_inputs=args, example_kwargs=kwargs).model,
    ):
        got = evaluate(folded, args, kwargs)
        assert all(relative_l2(got[key], expected[key]) <= 1e-12 for key in expected)


@pytest.mark.parametrize(
    "name",
    [name for name, case in ZOO.items() if case.converts],
)
def test_all_captures_tell_the_same(name: str) -> None:
    case, model = ZOO[name], original_of(name)
    if is_norm(model):
        pytest.skip("a trace of a norm looks inside it")
    args, kwargs = case.inputs()
    told = {}
    for method in ("fx", "export", "hooks"):
        if method in case.captures:
            found = survey(model, args, kwargs, methods=(method,))
            assert found.method == method
            told[method] = {
                site.name: (site.producers, site.op, site.phase, site.shape, bool(site.refusal))
                for site in found.sites
            }
        else:
            with pytest.raises(Refused):
                survey(model, args, kwargs, methods=(method,))
    assert len({str(sorted(sites.items())) for sites in told.values()}) == 1


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("name", ["conv_transpose2d_grouped", "residual_net"])
def test_compiles_whole(name: str, target: str) -> None:
    done = converted(name, target)
    args, kwargs = done.case.inputs()
    expected = evaluate(done.model, args, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(done.model).eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        got = flat_outputs(compiled(*args, **kwargs))
    assert all(relative_l2(got[key], expected[key]) <= 1e-6 for key in expected)


# --- a check must be able to see ------------------------------------------------------------------

DEEP = "residual_net"


def _proof_fails(model: nn.Module, done: Done) -> bool:
    args, kwargs = done.case.inputs()
    proof = prove(done.original, model, done.plan.steps, args, kwargs)
    return any(not check.passed for check in proof.checks)


@pytest.mark.parametrize("site", range(4))
def test_proof_sees_a_gain_that_is_one_percent_off(site: int) -> None:
    done = converted(DEEP, "wn")
    model = copy.deepcopy(done.model)
    assert not _proof_fails(model, done)
    with torch.no_grad():
        model.get_submodule(done.plan.steps[site].producers[0]).weight_g.mul_(1.01)
    assert _proof_fails(model, done)


@pytest.mark.parametrize("target", ["wn", "plain"])
@pytest.mark.parametrize("site", range(4))
def test_proof_sees_two_channels_of_a_shift_swapped(site: int, target: str) -> None:
    done = converted(DEEP, target)
    model = copy.deepcopy(done.model)
    bias = model.get_submodule(done.plan.steps[site].producers[0]).bias
    with torch.no_grad():
        bias[[0, 1]] = bias[[1, 0]]
    assert _proof_fails(model, done)


def test_proof_sees_a_forgotten_eps() -> None:
    done = converted("large_eps", "plain")
    forgetful = copy.deepcopy(done.original)
    forgetful.norm.eps = 0.0
    model = apply_plan(forgetful, done.plan).model
    assert _proof_fails(model, done)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_proof_never_passes_what_is_not_finite(poison: float) -> None:
    done = converted(DEEP, "plain")
    model = copy.deepcopy(done.model)
    with torch.no_grad():
        model.head.bias[0] = poison
    assert _proof_fails(model, done)


def test_proof_sees_a_site_that_the_output_cannot() -> None:
    """A wrong fold whose effect the next layer throws away is seen at the site itself."""
    done = converted("zero_weight", "wn")
    original, model = copy.deepcopy(done.original), copy.deepcopy(done.model)
    with torch.no_grad():
        for net in (original, model):
            net.rest[0].weight.zero_()
        model.conv.bias.mul_(1.01)
    args, _ = done.case.inputs()
    failed = [c.name for c in prove(original, model, done.plan.steps, args).checks if not c.passed]
    assert failed == ["site norm"]


def test_proof_refuses_other_outputs() -> None:
    done, other = converted("returns_dict", "plain"), converted("returns_namedtuple", "plain")
    assert _proof_fails(copy.deepcopy(other.model), done)


class Noisy(nn.Sequential):
    """Not the same twice: it counts, where no snapshot of the model reaches."""

    calls = 0

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        Noisy.calls += 1
        return super().forward(x) * Noisy.calls


def test_proof_refuses_a_model_that_differs_from_itself() -> None:
    model, x = Noisy(), torch.randn(2, 3, 4, 4)
    plan = make_plan(model, "wn", example_inputs=(x,))
    proof = prove(model, apply_plan(model, plan).model, plan.steps, (x,))
    assert "the original repeats itself" in [
        check.name for check in proof.checks if not check.passed
    ]


def _deep(alive: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.ReLU() if alive else nn.Threshold(1e6, 1.0),
        ]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def test_randomised_norms_leave_no_site_blind_and_a_dead_net_is_found_out() -> None:
    x = torch.randn(16, 8)
    norms = tuple(str(index) for index in range(1, 24, 3))
    alive, dead = _deep(alive=True), _deep(alive=False)
    for net in (alive, dead):
        randomise_norms_(net, (x,))
    assert blind_sites(alive, norms, (x,)) == ()
    assert blind_sites(dead, norms, (x,)) == norms
    plan = make_plan(dead, "wn", example_inputs=(x,))
    proof = prove(dead, apply_plan(dead, plan).model, plan.steps, (x,))
    assert any("nearly blind" in note for note in proof.notes)
    assert proof.facts["sight"] < 1e-2


@pytest.mark.parametrize("name", ["residual_net", "containers", "pre_activation", "auxiliary_head"])
def test_the_zoo_itself_can_be_seen(name: str) -> None:
    case, model = ZOO[name], original_of(name)
    args, kwargs = case.inputs()
    names = tuple(site.name for site in survey(model, args, kwargs).sites if site.phase == "eval")
    before = snapshot(model)
    assert blind_sites(model, names, args, kwargs) == ()
    assert_unchanged(before, model)


# --- details of single cases ----------------------------------------------------------------------


def test_a_plan_leaves_hooked_weights_alone() -> None:
    model = original_of("legacy_weight_norm_producer")
    before = snapshot(model)
    plan_of(model, ZOO["legacy_weight_norm_producer"], "wn")
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["graph_module", "functional_as_graph"])
def test_history_of_a_graph_module_survives_pickle(name: str) -> None:
    done = converted(name, "wn")
    skip_where_graphs_do_not_pickle(done.original)
    assert history_of(pickle.loads(pickle.dumps(done.model))) == history_of(done.model)


def test_nothing_of_a_functional_norm_is_left() -> None:
    for target in NAMES:
        left = converted("functional_as_graph", target).model.state_dict()
        assert not left.keys() & {"gamma", "beta", "mean", "var"}


def test_history_survives_pickle() -> None:
    done = converted("residual_net", "wn")
    assert history_of(pickle.loads(pickle.dumps(done.model))) == history_of(done.model)


def test_activation_inside_a_norm_is_kept_under_its_name() -> None:
    done = converted("norm_act_timm_silu", "wn")
    assert isinstance(done.model.get_submodule("norm.act"), nn.SiLU)


def test_reparametrised_rows_without_direction_stay_trainable() -> None:
    done = converted("zero_rows", "wn")
    conv = copy.deepcopy(done.model).conv
    assert bool((conv.weight_g[[1, 3]] == 0).all())
    assert bool((conv.weight[[1, 3]] == 0).all())
    conv(done.case.args[0]).sum().backward()
    assert bool((conv.weight_g.grad[[1, 3]] != 0).all())


def test_channels_last_weights_stay_so() -> None:
    for target in ("wn", "plain"):
        conv = converted("channels_last", target).model.conv
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        folded = fold(converted("channels_last", target).model).model.conv
        assert folded.weight.is_contiguous(memory_format=torch.channels_last)


def test_affine_maps_carry_what_the_norm_trained() -> None:
    done = converted("mixed_flags", "wn")
    flags = {name: p.requires_grad for name, p in done.model.named_parameters()}
    assert not any(flags[f"stem.0.{name}"] for name in ("weight_g", "weight_v", "bias"))
    assert flags["conv1.bias"]
    assert flags["conv1.weight_v"]
    frozen = converted("mixed_flags", "frozen").model
    assert isinstance(frozen.bn1, ChannelAffine)
    assert dict(frozen.bn1.named_parameters()) == {}


def test_hooks_on_a_norm_move_to_its_slot() -> None:
    for target in NAMES:
        slot = converted("hook_on_norm", target).model.norm
        assert [hook.__name__ for hook in slot._forward_hooks.values()] == ["keep"]


def test_a_plan_of_another_model_is_refused() -> None:
    done = converted("residual_net", "wn")
    with pytest.raises(PlanError, match="no such module"):
        apply_plan(ZOO["conv2d"].build(), done.plan)
    wider = ZOO["residual_net"].build()
    wider.head = nn.Linear(12, 6)
    with pytest.raises(PlanError, match="structure"):
        apply_plan(wider, done.plan)
    with pytest.raises(PlanError, match="expects a BatchNorm2d"):
        apply_plan(done.model, done.plan)
