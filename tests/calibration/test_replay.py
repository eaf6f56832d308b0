"""Passes with what was kept: the same values, fewer calls, and what must not be kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

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


class Aside(nn.Module):
    """A block that also leaves something behind, which is read later."""

    def __init__(self, around: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        self.around.append(y.mean((2, 3), keepdim=True))
        return y


class Reads(nn.Module):
    """What a block left behind scales what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Tensor] = []
        self.first = Aside(self.left)
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.more, self.bn2 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.left.clear()
        y = self.first(x).relu()
        scale = self.left[-1] if self.left else torch.zeros(())
        return self.bn2(self.more((self.bn(self.conv(y)) * (1 + scale)).relu()))


def test_a_model_that_leaves_things_behind_is_calibrated_without() -> None:
    torch.manual_seed(0)
    model = Reads()
    for batch in DATA:
        model(batch)
    model.eval()
    plan = nc.make_plan(model, "gn", example_inputs=(DATA[0][:2],), options={"groups": 2})
    converted = nc.apply_plan(model, plan).model
    wanted = nc.calibrate(converted, plan, DATA, reference=model, cache="none")
    got = nc.calibrate(converted, plan, DATA, reference=model, cache="memory")
    assert_same_state(got.model, wanted.model)


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
