"""What cannot be converted is refused by name, and what stays coupled is said."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconv as nc
from normconv.graph import is_norm
from normconv.proof import randomise_norms_
from tests.test_contract import NAMES, assert_unchanged, snapshot
from tests.zoo import x

INPUT = (x(2, 3, 6, 6),)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    randomise_norms_(model, (x(8, 3, 6, 6),))
    return model.eval()


# --- values and forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.ModuleList([nn.BatchNorm2d(3)]), nn.Module()])
def test_a_model_without_forward(model: nn.Module) -> None:
    for call in (nc.make_plan, nc.convert, nc.convert_):
        with pytest.raises(nc.UsageError, match="has no forward"):
            call(model, "wn", example_inputs=INPUT)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_norm_with_zero_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 0), nn.BatchNorm1d(0))
    with pytest.raises(nc.PlanError, match="1: BatchNorm1d has zero channels"):
        nc.make_plan(model, "wn", example_inputs=(torch.zeros(2, 3),))


@pytest.mark.parametrize("target", NAMES)
def test_a_norm_without_statistics_names_a_way_out_that_works(target: str) -> None:
    model = net()
    model[1] = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(nc.PlanError, match="track_running_stats=True and run a few batches"):
        nc.convert(model, target, example_inputs=INPUT)
    model[1] = nn.BatchNorm2d(4, track_running_stats=True)
    model.train()(x(8, 3, 6, 6))
    assert nc.convert(model, target, example_inputs=INPUT).report.passed


@pytest.mark.parametrize("target", NAMES)
def test_a_broken_weight_that_nothing_rewrites_is_no_matter_to_the_plan(target: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    plan = nc.make_plan(model, target, example_inputs=INPUT)
    if target == "frozen":
        assert nc.apply_plan(model, plan)
    else:
        with pytest.raises(nc.PlanError, match="0: its weight holds NaN"):
            nc.apply_plan(model, plan)


# --- wrappers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def scripted(model: nn.Sequential, mesh: Any) -> nn.Module:
    model[0] = torch.jit.script(model[0])
    return model


def compiled(model: nn.Sequential, mesh: Any) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


def fully_sharded(model: nn.Sequential, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh)
    return model


def part_sharded(model: nn.Sequential, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh)
    return model


def data_parallel(model: nn.Sequential, mesh: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def distributed_tensors(model: nn.Sequential, mesh: Any) -> nn.Module:
    from torch.distributed.tensor import distribute_module

    return distribute_module(model, mesh)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (scripted, "0: it is wrapped in RecursiveScriptModule; TorchScript"),
        (compiled, "0: it is wrapped in OptimizedModule; convert model._orig_mod"),
        (fully_sharded, "the model: it is wrapped in FSDPSequential; convert before sharding"),
        (part_sharded, "0: it is wrapped in FSDPConv2d; convert before sharding"),
        (data_parallel, "it is wrapped in DistributedDataParallel; convert model.module"),
        (distributed_tensors, "0: its parameters are DTensors; convert before"),
    ],
)
def test_wrapped_parts_are_sent_back(wrap: Any, words: str, mesh: Any) -> None:
    plan = nc.make_plan(net(), "wn", example_inputs=INPUT)
    model = wrap(net(), mesh)
    for call in (
        lambda: nc.make_plan(model, "wn", example_inputs=INPUT),
        lambda: nc.apply_plan(model, plan),
        lambda: nc.apply_plan_(model, plan),
    ):
        with pytest.raises(nc.PlanError, match=words):
            call()


@torch.no_grad()
@pytest.mark.parametrize("parts", [(), (0,), (1,), (0, 1), (3,)])
@pytest.mark.parametrize("target", ["wn", "plain", "frozen"])
def test_modules_compiled_in_place_are_converted(parts: tuple[int, ...], target: str) -> None:
    torch._dynamo.reset()
    model = net()
    for module in [model[index] for index in parts] or [model]:
        module.compile(backend="eager")
    before = model(*INPUT)
    copied = nc.convert(model, target, example_inputs=INPUT)
    assert copied.report.passed
    torch.testing.assert_close(copied.model(*INPUT), before)
    torch.testing.assert_close(model(*INPUT), before)
    result = nc.convert_(model, target, example_inputs=INPUT)
    assert result.report.passed
    torch.testing.assert_close(model(*INPUT), before)
    assert not any(is_norm(module) for module in model.modules())


# --- references outside of the registered modules -------------------------------------------------


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


def nested(norm: nn.Module) -> Any:
    def inner(y: Tensor) -> Any:
        return norm(y)

    return lambda y: inner(y)


HOLDERS: list[Callable[[nn.Module], Any]] = [
    lambda norm: [norm],
    lambda norm: {"a": (norm,)},
    lambda norm: {1: frozenset([norm])},
    lambda norm: deque([norm]),
    Holder,
    lambda norm: Holder([Holder(norm)]),
    lambda norm: norm.forward,
    lambda norm: lambda y: norm(y),
    lambda norm: lambda y, norm=norm: norm(y),
    nested,
]


class Holding(nn.Module):
    def __init__(self, hold: Callable[[nn.Module], Any], which: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.held = hold(getattr(self, which))

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(self.conv(y))


@pytest.mark.parametrize("hold", HOLDERS)
def test_a_norm_held_elsewhere_is_refused(hold: Callable[[nn.Module], Any]) -> None:
    model = Holding(hold, "norm")
    before = snapshot(model)
    for call in (nc.convert, nc.convert_):
        with pytest.raises(nc.PlanError, match="norm: BatchNorm2d: held holds it outside"):
            call(model, "wn", example_inputs=INPUT)
    assert_unchanged(before, model)


@pytest.mark.parametrize("target", ["wn", "plain"])
@pytest.mark.parametrize("hold", HOLDERS)
def test_a_layer_held_elsewhere_is_converted(hold: Callable[[nn.Module], Any], target: str) -> None:
    """It stays the same object: only what a function calls is not followed by a copy."""
    model = Holding(hold, "conv")
    randomise_norms_(model, (x(8, 3, 6, 6),))
    layer = model.conv
    report = nc.convert(model, target, example_inputs=INPUT).report
    assert report.passed
    assert nc.convert_(model, target, example_inputs=INPUT).report.passed
    assert model.conv is layer


class CallsAFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        conv = self.conv
        self.function = lambda y: conv(y)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.norm(self.function(y))
        return out


@pytest.mark.parametrize("target", ["wn", "plain"])
def test_a_layer_that_a_function_calls_absorbs_nothing(target: str) -> None:
    model = CallsAFunction()
    randomise_norms_(model, (x(8, 3, 6, 6),))
    for call in (nc.convert, nc.convert_):
        report = call(model, target, example_inputs=INPUT).report
        assert report.passed
        assert "function is a function that holds conv" in report.sites[0].reason


def patch_lambda(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda y: forward(y).relu()


def patch_method(layer: nn.Module) -> None:
    def forward(self: nn.Module, y: Tensor) -> Tensor:
        return type(self).forward(self, y) + 1

    layer.forward = types.MethodType(forward, layer)


@pytest.mark.parametrize("target", ["wn", "plain"])
@pytest.mark.parametrize("patch", [patch_lambda, patch_method])
def test_a_forward_patched_on_one_layer_is_seen(patch: Any, target: str) -> None:
    model = net()
    patch(model[0])
    report = nc.convert(model, target, example_inputs=INPUT).report
    assert report.passed
    assert report.sites[0].action == f"{target}: affine"
    model = net()
    patch(model[1])
    with pytest.raises(nc.PlanError, match="1: BatchNorm2d"):
        nc.convert(model, target, example_inputs=INPUT)


# --- samples that go on seeing each other -----------------------------------------------------------


class StandardizedByBatchNorm(nn.Module):
    """Weight standardization written with `F.batch_norm`, on the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, y: Tensor) -> Tensor:
        rows = self.weight.reshape(1, 4, -1)
        weight = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(y, weight)


class NormalizesWithTheBatch(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return F.batch_norm(y, None, None, training=True)


def coupling(model: nn.Module, **options: Any) -> list[str]:
    report = nc.convert(model, "wn", example_inputs=INPUT, **options).report
    return [note for note in report.notes if "see each other" in note]


def test_norms_that_stay_are_named_where_they_couple() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)
    )
    model.append(nn.BatchNorm2d(4))
    assert coupling(model) == []
    assert coupling(model, exclude=["2"]) == []
    (note,) = coupling(model, exclude=["1", "2"])
    assert note == "samples of a batch still see each other in training mode, in 1"
    many = nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.BatchNorm2d(4) for _ in range(8)))
    (note,) = coupling(many, include=["1"])
    assert note.endswith("in 2, 3, 4, 5, 6 and 2 more")


def test_functional_batch_norm_on_activations_is_named_and_on_weights_is_not() -> None:
    block = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
    assert coupling(nn.Sequential(*block, StandardizedByBatchNorm())) == []
    (note,) = coupling(nn.Sequential(*block, NormalizesWithTheBatch(), StandardizedByBatchNorm()))
    assert "1 calls of F.batch_norm with training=True" in note
