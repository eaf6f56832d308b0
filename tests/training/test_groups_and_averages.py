"""Which parameters decay; the average of models in weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import normconv as nc
from normconv.layers import (
    ChannelAffine,
    MeanOnlyBatchNorm,
    log_gain_,
    weight_norm_,
    weight_standardize_,
)
from normconv.numerics import relative_l2
from normconv.training import average, param_groups


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.lstm = weight_norm_(nn.LSTM(4, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.ws = weight_standardize_(nn.Conv1d(4, 4, 3))
        self.log = weight_norm_(nn.Linear(4, 4))
        log_gain_(self.log)
        self.norms = nn.ModuleList(
            [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)]
        )
        self.ours = nn.ModuleList([ChannelAffine(4), MeanOnlyBatchNorm(4)])
        self.theirs = parametrizations.weight_norm(nn.Linear(4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.hooked = nn.utils.weight_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.emb.weight


def test_gains_biases_and_norms_do_not_decay() -> None:
    model = Many()
    model.head.bias.requires_grad_(False)
    decayed, rest = param_groups(model, 0.1, lr=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed["params"]) == [
        "attention.in_proj_weight", "attention.out_proj.weight", "emb.weight",
        "hooked.weight_v", "log.weight_v", "lstm.weight_hh_l0_v", "lstm.weight_ih_l0_v",
        "theirs.parametrizations.weight.original1", "ws.weight_v",
    ]  # fmt: skip
    every = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert (decayed["weight_decay"], rest["weight_decay"], rest["lr"]) == (0.1, 0.0, 0.5)
    torch.optim.AdamW([decayed, rest])


def test_groups_of_nothing_are_refused() -> None:
    with pytest.raises(nc.UsageError, match="none of its parameters"):
        param_groups(nn.ReLU(), 0.1)
    with pytest.raises(nc.UsageError, match="nan is not 0 or more"):
        param_groups(nn.Linear(1, 1), float("nan"))


def client(seed: int) -> Any:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), weight_standardize_(nn.Conv1d(4, 4, 3))
    )
    net.append(nn.ConvTranspose1d(4, 6, 3, groups=2))
    net.append(log_gain_layer(nn.Conv1d(6, 6, 1)))
    net.append(nn.Conv1d(6, 6, 1))
    weight_norm_(net[0])
    weight_norm_(net[4])
    nn.init.normal_(net[3].weight_gain)
    net[1].running_mean.normal_()
    net[1].num_batches_tracked.fill_(seed)
    return net


def log_gain_layer(layer: nn.Module) -> nn.Module:
    log_gain_(weight_norm_(layer), 2.0)
    return layer


def test_the_average_is_that_of_weights() -> None:
    clients, shares = [client(seed) for seed in range(3)], [1.0, 2.0, 5.0]
    before = [copy.deepcopy(model.state_dict()) for model in clients]
    mean, report = average(clients, shares)
    assert report.facts["layers split again"] == 4
    assert [type(layer) for layer in mean] == [type(layer) for layer in clients[0]]
    assert list(mean.state_dict()) == list(clients[0].state_dict())
    plain = [nc.fold(model).model.state_dict() for model in clients]
    for name, value in nc.fold(mean).model.state_dict().items():
        if name.endswith("tracked"):
            assert int(value) == 0
            continue
        wanted = sum(s * p[name].double() for s, p in zip(shares, plain, strict=True)) / 8
        assert relative_l2(value, wanted) <= 3e-7, name
    for model, state in zip(clients, before, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_one_model_and_equal_models_stay() -> None:
    model = client(1)
    for models in ([model], [model, copy.deepcopy(model)]):
        x = torch.randn(2, 2, 9)
        assert relative_l2(average(models).model(x), model(x)) <= 1e-6


def test_tied_layers_stay_tied() -> None:
    def tied() -> Any:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return nc.convert(net, "wn", example_inputs=(torch.randn(2, 4),), layers="all").model

    one, two = tied(), tied()
    mean: Any = average([one, two]).model
    assert mean[2].weight_v is mean[0].weight_v
    assert torch.allclose(mean[2].weight, (one[0].weight + two[0].weight) / 2, atol=1e-6)


def test_what_cannot_be_averaged_is_refused() -> None:
    one = client(0)
    other = client(1)
    other[6] = nn.Conv1d(6, 3, 1)
    with pytest.raises(nc.UsageError, match=r"models\[1\]: 6\.weight: it has shape \(3, 6, 1\)"):
        average([one, other])
    with pytest.raises(nc.UsageError, match=r"0: it has Conv1d, models\[0\] WNConv1d"):
        average([one, nc.fold(one).model])
    with pytest.raises(nc.UsageError, match="there is none"):
        average([])
    for weights in ([1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(nc.UsageError, match="no shares"):
            average([one, one], weights)
    with pytest.raises(nc.UsageError, match="1 for 2 models"):
        average([one, one], [1.0])
    theirs = parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(nc.UsageError, match="computed by torch weight_norm"):
        average([theirs, theirs])


def test_a_share_of_zero_counts_nothing() -> None:
    one, broken = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.constant_(broken.weight, float("nan"))
    mean: Any = average([one, broken], [1.0, 0.0]).model
    assert torch.equal(mean.weight, one.weight)


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (Tied(True), Tied(False), "weight: it has .*tied"),
        (nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, stride=2), "settings of .*stride"),
        (nn.Linear(2, 2), nn.Linear(2, 2).half(), "float16"),
    ],
)
def test_models_that_look_alike_are_told_apart(one: nn.Module, other: nn.Module, what: str) -> None:
    with pytest.raises(nc.UsageError, match=what):
        average([one, other])


def test_a_client_with_nan_is_named() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.constant_(two.bias, float("nan"))
    with pytest.raises(nc.UsageError, match=r"models\[1\]: bias holds NaN"):
        average(model for model in (one, two))  # type: ignore[arg-type]
