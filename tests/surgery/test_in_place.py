"""In place: the same result as on a copy, in the same memory, all of it or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.errors import PlanError
from normconv.graph import is_norm
from normconv.layers import Reparametrised
from normconv.proof import prove_recorded, randomise_norms_, record_original
from normconv.surgery import apply_plan, apply_plan_, fingerprint, make_plan
from tests.test_contract import (
    NAMES,
    assert_same_state,
    assert_unchanged,
    converted,
    each,
    original_of,
    plan_of,
    snapshot,
)
from tests.zoo import ZOO, ResidualNet, x

INPUT = (x(2, 3, 6, 6),)


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = ResidualNet()
    randomise_norms_(model, (x(8, 3, 6, 6),))
    return model


# --- over the zoo ---------------------------------------------------------------------------------


@each("converts")
def test_in_place_gives_what_a_copy_gives(name: str, target: str) -> None:
    done = converted(name, target)
    if isinstance(done.original, torch.fx.GraphModule):
        model = copy.deepcopy(done.original)
    else:
        model = original_of(name)
        model.load_state_dict(done.original.state_dict())
    if is_norm(model):
        with pytest.raises(PlanError, match="wrap it"):
            apply_plan_(model, done.plan)
        return
    before = {id(p): name for name, p in model.named_parameters()}
    result = apply_plan_(model, done.plan)
    assert result.model is model
    assert_same_state(model, done.model)
    classes = [type(m).__name__ for m in model.modules()]  # graph modules have a class each
    assert classes == [type(m).__name__ for m in done.model.modules()]
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    assert flags == {key: p.requires_grad for key, p in done.model.named_parameters()}
    strides = {key: p.stride() for key, p in model.named_parameters()}
    assert strides == {key: p.stride() for key, p in done.model.named_parameters()}
    after = {id(p): key for key, p in model.named_parameters()}
    assert result.report.facts["new parameters"] == [k for i, k in after.items() if i not in before]
    assert result.report.facts["gone parameters"] == [
        k for i, k in before.items() if i not in after
    ]


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.converts])
def test_a_recorded_original_proves_as_much_as_a_present_one(name: str) -> None:
    done = converted(name, "wn")
    args, kwargs = done.case.inputs()
    recording = record_original(done.original, done.plan.steps, args, kwargs, for_good=True)
    proof = prove_recorded(recording, done.model)
    assert [check for check in proof.checks if not check.passed] == []
    assert {row.site for row in proof.rows} == {step.site for step in done.plan.steps}


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if not case.converts])
def test_what_is_refused_is_untouched(name: str) -> None:
    case, model = ZOO[name], original_of(name)
    args, kwargs = case.inputs()
    before = snapshot(model)
    if name != "lazy":
        with pytest.raises(nc.Refused, match=case.refused):
            nc.convert_(
                model, "wn", example_inputs=args, example_kwargs=kwargs, prove=False, **case.plan
            )
        assert_unchanged(before, model)


# --- memory and identity --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["wn", "plain"])
def test_weights_stay_where_they_are(target: str) -> None:
    model = residual()
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    nc.convert_(model, target, example_inputs=INPUT)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert (layer.weight_v if isinstance(layer, Reparametrised) else layer.weight) is weight
        assert weight.data_ptr() == places[name]


class Biggest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and not out.is_meta:
            storage = out.untyped_storage()
            if storage.data_ptr() not in known:
                self.bytes = max(self.bytes, storage.nbytes())
        return out


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("target", ["wn", "plain"])
def test_no_tensor_of_the_size_of_a_layer_is_made(target: str, kind: Any) -> None:
    model = nn.Sequential(kind(600, 500, 3), nn.BatchNorm2d(500), nn.ReLU()).eval()
    size = model[0].weight.numel() * 4
    plan = make_plan(model, target, example_inputs=(torch.zeros(1, 600, 4, 4),))
    with Biggest() as biggest:
        apply_plan_(model, plan)
    assert 0 < biggest.bytes <= 2 * 2**20 + 1024 < size
    with Biggest() as copying:
        apply_plan(nn.Sequential(kind(600, 500, 3), nn.BatchNorm2d(500), nn.ReLU()), plan)
    assert copying.bytes == size, "the check must see a copy"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_made_before_goes_on(kind: Any) -> None:
    model = residual()
    optimizer = kind(model.parameters(), lr=0.01)
    model(*INPUT)[:, 0].sum().backward()
    optimizer.step()
    report = nc.convert_(model.eval(), "plain", example_inputs=INPUT).report
    layers = ("stem.0", "conv1", "conv2", "shortcut.0")  # they had no bias
    new = report.facts["new parameters"]
    assert new == [f"{layer}.bias" for layer in layers]
    assert report.facts["gone parameters"] == [
        f"{site}.{kind}"
        for site in ("stem.1", "bn1", "bn2", "shortcut.1")
        for kind in ("weight", "bias")
    ]
    assert all(model.get_submodule(name).weight.grad is None for name in layers)
    assert model.head.weight.grad is not None  # nothing was done there
    optimizer.add_param_group({"params": [model.get_parameter(name) for name in new]})
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()(*INPUT).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_order_of_parameters_is_kept() -> None:
    model = residual()
    names = [n for n, _ in model.named_parameters()]
    plain = [
        n for n, _ in nc.convert(model, "plain", example_inputs=INPUT).model.named_parameters()
    ]
    norms = ("stem.1.", "bn1.", "bn2.", "shortcut.1.")
    kept = [name for name in names if not name.startswith(norms)]
    assert [name for name in plain if name in kept] == kept
    nc.convert_(model, "plain", example_inputs=INPUT)
    assert [n for n, _ in model.named_parameters()] == plain


# --- all or nothing -------------------------------------------------------------------------------


def nan_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")


def infinite_bias(model: nn.Module) -> None:
    model.shortcut[0].bias = nn.Parameter(torch.full((12,), float("inf")))


def nan_statistics(model: nn.Module) -> None:
    model.bn2.running_mean[1] = float("nan")


def negative_variance(model: nn.Module) -> None:
    model.bn2.running_var[1] = -1.0


def expanded(model: nn.Module) -> None:
    model.conv2.weight = nn.Parameter(torch.ones(1).expand(model.conv2.weight.shape))


def made_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.conv2.weight = nn.Parameter(torch.ones(model.conv2.weight.shape), requires_grad=False)


def shared_memory(model: nn.Module) -> None:
    model.conv2.weight = nn.Parameter(model.conv1.weight.detach())


def overlapping_memory(model: nn.Module) -> None:
    store = torch.randn(model.conv2.weight.numel() + 1)
    model.conv2.weight.data = store[1:].view_as(model.conv2.weight)
    model.register_buffer("head_of_it", store[:2])


def tied(model: nn.Module) -> None:
    model.conv2.weight = model.conv1.weight


class Final(nn.Conv2d):
    def __init_subclass__(cls) -> None:
        raise TypeError("nothing may come after Final")


def not_subclassable(model: nn.Module) -> None:
    final = Final(12, 12, 3, padding=1, bias=False)
    final.load_state_dict(model.conv2.state_dict(), strict=False)
    model.conv2 = final


BAD: list[tuple[Callable[[nn.Module], None], str, str]] = [
    (nan_weight, "conv2: its weight holds NaN", ""),
    (infinite_bias, "shortcut.0: its bias holds NaN or infinity", ""),
    (nan_statistics, "bn2: running_mean holds NaN", ""),
    (negative_variance, r"bn2: running_var \+ eps is not positive", ""),
    (expanded, "conv2: its weight is an expanded view", "in place"),
    (made_in_inference_mode, "conv2: its weight was made in inference mode", "in place"),
    (shared_memory, "its memory is also that of conv", "in place"),
    (overlapping_memory, "its memory is also that of", "in place"),
    (tied, "conv2: it shares its weight with conv1", "edited"),
    (not_subclassable, "conv2: Final cannot be subclassed", "wn"),
]


def sound_plan(target: str) -> nc.Plan:
    return make_plan(ResidualNet(), target, example_inputs=INPUT)


@pytest.mark.parametrize("target", ["wn", "plain"])
@pytest.mark.parametrize(("spoil", "words", "where"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_models_are_refused_whole(
    spoil: Callable[[nn.Module], None], words: str, where: str, target: str
) -> None:
    model, plan = residual(), sound_plan(target)
    spoil(model)
    if where == "wn" and target != "wn":
        assert apply_plan_(model, replace(plan, fingerprint=fingerprint(model)))
        return
    plan = replace(plan, fingerprint=fingerprint(model))
    before = snapshot(model)
    for apply in (apply_plan_, apply_plan):
        if where == "in place" and apply is apply_plan:
            assert apply(model, plan).report.passed
            continue
        with pytest.raises(nc.PlanError, match=words) as caught:
            apply(model, plan)
        assert all(problem.way_out for problem in caught.value.problems)
        assert_unchanged(before, model)


def test_a_failed_proof_says_so_with_the_changed_model() -> None:
    class Counts(ResidualNet):
        def forward(self, y: Tensor) -> Tensor:
            return super().forward(y) * self.bn1.num_features

    model = Counts().eval()
    with pytest.raises(nc.CheckFailed, match="num_features") as caught:
        nc.convert_(model, "wn", example_inputs=INPUT)
    assert caught.value.model is model
    assert caught.value.report.verb == "convert"
    assert isinstance(model.bn1, nn.Identity)


def test_the_proof_in_place_can_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that is one percent off in one gain fails, though the original is gone by then."""
    import normconv.api.converting as converting

    def careless(model: nn.Module, plan: nc.Plan) -> nc.Result:
        result = apply_plan_(model, plan)
        with torch.no_grad():
            model.conv1.weight_g.mul_(1.01)
        return result

    monkeypatch.setattr(converting, "apply_plan_", careless)
    with pytest.raises(nc.CheckFailed, match="site bn1"):
        nc.convert_(residual().eval(), "wn", example_inputs=INPUT)


# --- what the report says -------------------------------------------------------------------------


@pytest.mark.parametrize("target", NAMES)
def test_report_is_that_of_convert(target: str) -> None:
    model, twin = residual(), residual()
    expected = nc.convert(twin, target, example_inputs=INPUT).report
    report = nc.convert_(model, target, example_inputs=INPUT).report
    assert [check.name for check in report.checks] == [check.name for check in expected.checks]
    assert report.sites == expected.sites
    assert report.facts.keys() - expected.facts.keys() == {"new parameters", "gone parameters"}
    unproved = nc.convert_(residual(), target, example_inputs=INPUT, prove=False).report
    assert unproved.checks == ()
    assert "nothing was proved: prove=False" in unproved.notes


def test_a_plan_can_be_carried_out_in_place() -> None:
    model = residual()
    plan = plan_of(model, ZOO["residual_net"], "wn")
    model, report = nc.convert_(model, plan, example_inputs=INPUT)
    assert report.passed
    assert nc.Plan.from_dict(report.plan) == plan


def test_meta_models_convert_in_place() -> None:
    with torch.device("meta"):
        model = ResidualNet()
    report = nc.convert_(model, sound_plan("wn"), example_inputs=INPUT).report
    assert any("meta device" in note for note in report.notes)
    assert all(p.is_meta for p in model.parameters())


def test_it_takes_no_graph() -> None:
    with pytest.raises(TypeError, match="output"):
        nc.convert_(residual(), "wn", example_inputs=INPUT, output="graph")  # type: ignore[call-arg]
