"""Passes with what was kept: the same values, fewer calls, and what must not be kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import normconv as nc
from normconv.calibration.passes import Partial
from normconv.calibration.replay import Replay, Shelf
from tests.calibration.test_calibrate import DATA, net
from tests.test_contract import assert_same_state

__all__ = ["net"]


RAN: Counter[nn.Module] = Counter()  # what a forward writes on its module is undone after a pass


class Counted(nn.Conv2d):
    """Counts how often it is really run."""

    def forward(self, x: Tensor) -> Tensor:
        RAN[self] += 1
        return super().forward(x)


class Odd(nn.Module):
    """Blocks in blocks, one that is called twice, in-place code, an alias of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.block() for _ in range(3)))
        self.twice, self.same, self.last = Counted(4, 4, 1), nn.Identity(), Counted(4, 4, 1)

    @staticmethod
    def block() -> nn.Sequential:
        return nn.Sequential(Counted(4, 4, 3, padding=1), nn.ReLU(inplace=True), Counted(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(x)
        z = self.same(y)
        z += 1  # and so does y
        return self.last(self.twice(self.blocks(y + z)).relu_())


def passes(model: Odd, shelf: Shelf, names: list[str], batches: list[Tensor]) -> list[Any]:
    """What modules get, each in a pass of its own over all batches, those after it moving."""
    replay = Replay(model, shelf)
    modules = dict(model.named_modules())
    found = []
    for place, name in enumerate(names):
        moving = {modules[each] for each in names[place:]}
        partial = Partial(replay, {name: name}, moving)
        found.append([partial.inputs(i, (x,), {})[name] for i, x in enumerate(batches)])
    return found


NAMES = ["blocks.0.2", "blocks.1.0", "blocks.1.2", "blocks.2.2", "last"]


@pytest.mark.parametrize("room", [0, 3000, 1e9])
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_same_is_seen_in_fewer_calls(room: float, on_disk: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Odd().eval(), [torch.randn(2, 4, 6, 6) for _ in range(3)]
    RAN.clear()
    wanted = passes(model, Shelf(None, 0), NAMES, batches)
    ran = dict(RAN)
    RAN.clear()
    shelf = Shelf(tmp_path if on_disk else None, room)
    got = passes(model, shelf, NAMES, batches)
    for one, other in zip(wanted, got, strict=True):
        for x, y in zip(one, other, strict=True):
            assert len(x) == len(y)
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    first, second = model.get_submodule("blocks.0.0"), model.get_submodule("blocks.1.0")
    assert ran[first] == 16  # with the run that counts calls
    if room == 1e9:
        assert RAN[first] == 4  # once a batch, once to count calls
        assert RAN[second] <= 7
    if room == 0:
        assert ran == RAN
    assert shelf.room >= 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_inputs_are_not_answered_with_what_was_kept() -> None:
    model, replay_of = Odd().eval(), Shelf(None, 1e9)
    replay, last = Replay(model, replay_of), {model.last}
    for x in (torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)):
        seen = Partial(replay, {"last": "last"}, last).inputs(0, (x,), {})["last"][0]
        plain = passes(model, Shelf(None, 0), ["last"], [x])[0][0][0]
        assert torch.equal(seen, plain)


class Stem(nn.Module):
    """Puts out one thing and leaves another behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.skip: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.skip = y * 3
        return y.relu()


class Skips(nn.Module):
    """What the stem left behind is added later: by an attribute, or by a hook on a module inside."""

    def __init__(self, by_hook: bool) -> None:
        super().__init__()
        self.by_hook = by_hook
        self.stem = nn.Sequential(Stem(), nn.Conv2d(8, 8, 1))
        self.kept: dict[str, Tensor] = {}
        if by_hook:
            self.stem[0].conv.register_forward_hook(self.look)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["x"] = output * 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(self.stem(x))).relu()
        skip = self.kept["x"] if self.by_hook else self.stem[0].skip
        y = self.bn2(self.conv2(y) + skip).relu()
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("by_hook", [False, True])
def test_a_model_that_leaves_things_behind_is_calibrated_without(by_hook: bool) -> None:
    torch.manual_seed(0)
    model, data = Skips(by_hook), [torch.randn(16, 3, 8, 8) * (1 + i) + i for i in range(3)]
    for batch in data:
        model(batch)
    model.eval()
    plan = nc.make_plan(model, "gn", example_inputs=(data[0],), options={"groups": 2})
    converted = nc.apply_plan(model, plan).model
    wanted = nc.calibrate(converted, plan, data, reference=model, cache="none")
    got = nc.calibrate(converted, plan, data, reference=model)
    assert_same_state(got.model, wanted.model)


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


class TwoOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Pair:
        return Pair(self.conv(x), self.conv(x + 1))


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two, self.conv, self.bn = TwoOut(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.last, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.two(x)
        return self.bn2(self.last(self.bn(self.conv(pair.one * pair.other)).relu()))


def test_outputs_of_any_class_are_kept_on_disk_and_dropped() -> None:
    torch.manual_seed(0)
    model = TakesTwo()
    model(DATA[0])
    model.eval()
    plan = nc.make_plan(model, "gn", example_inputs=(DATA[0][:2],), options={"groups": 2})
    converted = nc.apply_plan(model, plan).model
    with torch.inference_mode():
        data = [batch + 0 for batch in DATA]  # of which nothing can be kept
    made = [
        nc.calibrate(converted, plan, given, reference=model, cache=cache).model
        for given, cache in ((DATA, "disk"), (DATA, "none"), (data, "memory"))
    ]
    assert_same_state(made[0], made[1])
    assert_same_state(made[2], made[1])


def test_files_go_with_what_they_hold(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 1e9)
    kept = shelf.put([torch.ones(3), "x", None])
    assert kept is not None
    assert [str(item) for item in kept.load()] == ["tensor([1., 1., 1.])", "x", "None"]
    shelf.drop(kept)
    assert shelf.room == 1e9
    assert not list(tmp_path.iterdir())


def test_most_of_a_deep_model_is_run_once(net: nn.Module) -> None:
    """Linear in depth: each layer of the original runs a few times a batch, not once for each norm."""
    deep = nn.Sequential(*(nn.Sequential(Counted(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(30)))
    deep.eval()
    plan = nc.make_plan(
        deep, "gn", example_inputs=(DATA[0][:2],), options={"groups": 1, "eps": 1.0}
    )
    model = nc.apply_plan(deep, plan).model
    runs = {}
    for cache in ("none", "memory"):
        RAN.clear()
        nc.calibrate(model, plan, DATA, reference=deep, cache=cache)  # type: ignore[arg-type]
        runs[cache] = sum(RAN[module] for module in deep.modules())
    assert runs["memory"] < 0.4 * runs["none"]
