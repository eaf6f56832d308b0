"""What each target decides on a site, and how names and options are checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normconv.errors import Problem, UsageError
from normconv.graph import Site
from normconv.layers import ChannelAffine, WeightNormed
from normconv.plan import Step
from normconv.targets import TARGETS, Decision, make_target
from normconv.targets.groups import choose_groups
from tests.cases import EXACT

FOLDABLE = Site("bn", "BatchNorm2d", 4, producers=("conv",), op="conv2d", shape=(2, 4, 3, 3))
BLOCKED = Site("bn", "BatchNorm2d", 4, obstacle="follows relu")
REFUSED = Site("bn", "Odd", 4, refusal="its forward differs from its affine map by 0.5")
NO_STATS = Site("bn", "BatchNorm2d", refusal="it keeps no running statistics, so eval mode ...")


@pytest.mark.parametrize("name", ["wn", "plain"])
def test_exact_targets_fold_or_leave_a_map(name: str) -> None:
    target = make_target(name)
    fold = target.decide(FOLDABLE)
    assert isinstance(fold, Decision)
    assert (fold.action, fold.producers) == ("fold", ("conv",))
    affine = target.decide(BLOCKED)
    assert isinstance(affine, Decision)
    assert (affine.action, affine.producers) == ("affine", ())
    assert "follows relu" in affine.reason


def test_frozen_takes_both_the_same() -> None:
    for site in (FOLDABLE, BLOCKED):
        decision = make_target("frozen").decide(site)
        assert isinstance(decision, Decision)
        assert (decision.action, decision.producers) == ("frozen", ())


@pytest.mark.parametrize("kind", EXACT)
def test_every_exact_target_refuses_with_a_way_out(kind: type) -> None:
    for site in (REFUSED, NO_STATS):
        problem = kind().decide(site)
        assert isinstance(problem, Problem)
        assert problem.where == "bn"
        assert problem.what
        assert "exclude" in problem.way_out
    assert kind.name
    assert kind.promise
    assert kind.fidelity == "exact"


def test_names_and_options_are_checked() -> None:
    assert len({kind.name for kind in TARGETS}) == len(TARGETS)
    with pytest.raises(UsageError, match="did you mean 'plain'"):
        make_target("plane")
    with pytest.raises(UsageError, match="there is none of that name"):
        make_target("zzz")
    with pytest.raises(UsageError, match="no option"):
        make_target("wn", {"groups": 4})
    with pytest.raises(UsageError, match="trainable"):
        make_target("frozen", {"trainabel": True})


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("target", "action", "slot", "producer"),
    [
        ("wn", "fold", nn.Identity, WeightNormed),
        ("plain", "fold", nn.Identity, nn.Conv2d),
        ("wn", "affine", ChannelAffine, nn.Conv2d),
        ("plain", "affine", ChannelAffine, nn.Conv2d),
        ("frozen", "frozen", ChannelAffine, nn.Conv2d),
    ],
)
def test_edits(target: str, action: str, slot: type, producer: type) -> None:
    net = _net()
    producers = ("0",) if action == "fold" else ()
    make_target(target).edit(net, Step("1", "BatchNorm2d", target, action, 4, producers=producers))
    assert type(net[1]) is slot
    assert isinstance(net[0], producer)
    assert (net[0].bias is not None) == (action == "fold")


def test_frozen_trainable_holds_parameters() -> None:
    for trainable in (False, True):
        net = _net()
        step = Step("1", "BatchNorm2d", "frozen", "frozen", 4, options={"trainable": trainable})
        make_target("frozen", step.options).edit(net, step)
        assert [name for name, _ in net[1].named_parameters()] == (
            ["scale", "shift"] if trainable else []
        )
        assert sorted(net[1].state_dict()) == ["scale", "shift"]


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [(True, True, (True, True)), (False, True, (False, True)), (True, False, (True, False))],
)
def test_maps_take_over_what_was_trained(
    weight: bool, bias: bool, expected: tuple[bool, bool]
) -> None:
    net = _net()
    net[1].weight.requires_grad_(weight)
    net[1].bias.requires_grad_(bias)
    make_target("wn").edit(net, Step("1", "BatchNorm2d", "wn", "affine", 4))
    assert (net[1].scale.requires_grad, net[1].shift.requires_grad) == expected
    net = _net()
    net[1].bias.requires_grad_(bias)
    make_target("wn").edit(net, Step("1", "BatchNorm2d", "wn", "fold", 4, producers=("0",)))
    assert net[0].bias.requires_grad is bias
    assert net[0].weight_v.requires_grad


def test_a_map_of_a_norm_without_affine_is_not_trained() -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, affine=False))
    make_target("plain").edit(net, Step("1", "BatchNorm2d", "plain", "affine", 4))
    assert not any(parameter.requires_grad for parameter in net[1].parameters())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(net(x), net[0](x) / (1 + 1e-5) ** 0.5)


# --- gn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "shape", "wanted", "number"),
    [
        (64, (2, 64, 8, 8), {}, 1),
        (64, (2, 64, 8, 8), {"pretrained": False}, 4),
        (8, (2, 8, 8, 8), {"pretrained": False}, 1),
        (64, (2, 64, 8, 8), {"groups": 32}, 32),
        (24, (2, 24, 8, 8), {"groups": 32}, 24),
        (24, (2, 24, 8, 8), {"groups": 16}, 12),
        (64, (2, 64, 8, 8), {"channels_per_group": 1}, 64),
        (64, (2, 64, 8, 8), {"channels_per_group": 100}, 1),
        (64, (2, 64, 1, 1), {"channels_per_group": 1}, 4),
        (64, (2, 64), {"groups": 64}, 4),
        (4, (2, 4), {"groups": 4}, 1),
        (64, None, {"groups": 64}, 64),
        (7, (2, 7, 2, 2), {"groups": 7}, 1),
    ],
)
def test_groups_divide_and_hold_enough_numbers(
    channels: int, shape: tuple[int, ...] | None, wanted: dict[str, int], number: int
) -> None:
    chosen = choose_groups(channels, shape, **wanted)
    assert not isinstance(chosen, str)
    assert chosen.number == number
    assert channels % number == 0
    assert chosen.reason


def test_a_group_of_one_number_is_refused() -> None:
    assert "no variance" in str(choose_groups(1, (2, 1)))
    one = Site("bn", "BatchNorm1d", 1, producers=("fc",), shape=(2, 1))
    problem = make_target("gn").decide(one)
    assert isinstance(problem, Problem)
    assert "exclude" in problem.way_out


def test_gn_resolves_its_options_by_the_case() -> None:
    trained, fresh = FOLDABLE, Site("bn", "BatchNorm2d", 32, shape=(2, 32, 8, 8), untrained=True)
    decided = make_target("gn").decide(trained)
    assert isinstance(decided, Decision)
    assert decided.options == {"groups": 1, "eps": 1.0, "search": True}
    assert not decided.fidelity
    decided = make_target("gn").decide(fresh)
    assert isinstance(decided, Decision)
    assert decided.options == {"groups": 2, "eps": 1e-5, "search": True}
    assert decided.fidelity == "fresh"
    decided = make_target("gn", {"groups": 2, "eps": 0.5}).decide(trained)
    assert isinstance(decided, Decision)
    assert decided.options == {"groups": 2, "eps": 0.5}
    without = make_target("gn").decide(NO_STATS)
    assert isinstance(without, Problem)  # its channels are not known
    bare = Site("bn", "BatchNorm2d", 8, shape=(2, 8, 8, 8), refusal=NO_STATS.refusal)
    decided = make_target("gn").decide(bare)
    assert isinstance(decided, Decision)
    assert (decided.action, decided.fidelity) == ("fresh", "fresh")


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 0},
        {"groups": "many"},
        {"groups": 2, "channels_per_group": 4},
        {"channels_per_group": -1},
        {"eps": 0.0},
        {"eps": "small"},
        {"eps": float("nan")},
        {"eps": float("inf")},
        {"groups": True},
    ],
)
def test_gn_refuses_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="target gn"):
        make_target("gn", options)
