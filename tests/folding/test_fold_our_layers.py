"""Folding normconv's own layers: weight standardization and mean-only batch norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import normconv as nc
from normconv.layers import (
    ChannelAffine,
    MeanOnlyBatchNorm,
    Reparametrised,
    weight_norm_,
    weight_standardize_,
)
from normconv.numerics import DIALECTS, relative_l2


def mean_only(channels: int) -> MeanOnlyBatchNorm:
    norm = MeanOnlyBatchNorm(channels)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    return norm


@pytest.mark.parametrize("dialect", DIALECTS)
def test_standardized_layers_fold_to_what_they_compute(dialect: str) -> None:
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(384, 2),
    )
    net = nn.Sequential(*layers).double()
    for at in (0, 2, 4):
        weight_standardize_(net[at], dialect=dialect)
        nn.init.normal_(net[at].weight_gain)
    x = torch.randn(2, 3, 8, 8).double()
    folded, report = nc.fold(net)
    assert [type(layer) for layer in folded] == [
        nn.Conv2d, nn.ReLU, nn.ConvTranspose2d, nn.Flatten, nn.Linear
    ]  # fmt: skip
    assert relative_l2(folded(x), net(x)) <= 1e-14
    assert report.facts["folded"] == {"normconv weight standardization": 3}
    assert isinstance(net[0], Reparametrised)


def test_the_report_names_each_kind() -> None:
    net = nn.Sequential(weight_norm_(nn.Linear(3, 3)), weight_standardize_(nn.Linear(3, 3)))
    report = nc.fold(net).report
    assert [row.action for row in report.sites] == [
        "normconv weight norm", "normconv weight standardization"
    ]  # fmt: skip
    assert [row.fidelity for row in report.sites] == ["exact", "exact"]


def test_mean_only_batch_norm_folds_into_its_neighbour() -> None:
    net = nn.Sequential(
        weight_norm_(nn.Conv2d(3, 4, 3, bias=False)),
        mean_only(4),
        nn.ReLU(),
        ChannelAffine(4),
        weight_standardize_(nn.Conv2d(4, 5, 3)),
        mean_only(5),
        nn.ReLU(),
        mean_only(5),
    )
    net = net.double().eval()
    x = torch.randn(2, 3, 8, 8).double()
    assert isinstance(nc.fold(net).model[1], MeanOnlyBatchNorm)
    folded, report = nc.fold(net, example_inputs=(x,))
    assert relative_l2(folded(x), net(x)) <= 1e-14
    assert report.facts["folded"] == {
        "normconv weight norm": 1,
        "normconv weight standardization": 1,
        "mean-only batch norm": 2,
        "channel affine": 1,
    }
    assert [type(folded[at]) for at in (1, 3, 5, 7)] == [
        nn.Identity, nn.Identity, nn.Identity, MeanOnlyBatchNorm
    ]  # fmt: skip
    assert folded[0].bias is not None


def test_a_model_in_training_mode_folds_to_its_eval_function() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 3), mean_only(3))
    x = torch.randn(2, 2, 8)
    folded = nc.fold(net, example_inputs=(x,)).model
    assert torch.equal(net[1].num_batches_tracked, torch.tensor(0))
    assert relative_l2(folded.eval()(x), net.eval()(x)) <= 1e-6


def test_no_norm_is_left_to_convert() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 3), mean_only(3))
    with pytest.raises(nc.NormconvError, match=r"[Nn]o"):
        nc.make_plan(net, to="plain", example_inputs=(torch.randn(2, 2, 8),))


def test_folded_after_a_round_trip_through_a_file(tmp_path: Path) -> None:
    net = nn.Sequential(weight_standardize_(nn.Conv1d(2, 3, 3), dialect="bit"), mean_only(3)).eval()
    x = torch.randn(2, 2, 8)
    nc.save(net, tmp_path / "m.pt")
    back = nc.load(tmp_path / "m.pt")
    assert torch.equal(back(x), net(x))
    folded = nc.fold(back, example_inputs=(x,)).model
    assert relative_l2(folded(x), net(x)) <= 1e-6
