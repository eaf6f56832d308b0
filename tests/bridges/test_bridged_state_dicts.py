"""State dicts of real modules from one convention to another; each result loads strictly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as parametrized

import normconv as nc
from normconv.bridges import convert_state_dict
from normconv.layers import log_gain_, weight_norm_, weight_standardize_
from normconv.numerics import DIALECTS

Wrap = Callable[..., nn.Module]


def hooked(layer: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return torch.nn.utils.weight_norm(layer, name, dim)  # type: ignore[arg-type,no-any-return]


def vocoder() -> nn.ModuleDict:
    """Every way that torch's weight norm is laid: along axis 0, 1, 2, over all, and in an LSTM."""
    return nn.ModuleDict(
        {
            "pre": nn.Conv1d(3, 4, 3),
            "up": nn.ConvTranspose1d(4, 6, 4, 2),
            "rnn": nn.LSTM(6, 5, bidirectional=True),
            "position": nn.Conv1d(4, 4, 3, groups=2),
            "head": nn.Linear(5, 2),
            "norm": nn.BatchNorm1d(4),
        }
    )


def wrapped(net: nn.ModuleDict, wrap: Wrap) -> nn.ModuleDict:
    wrap(net["pre"])
    wrap(net["up"], dim=1)
    wrap(net["position"], dim=2)
    wrap(net["head"], dim=None)
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_hh_l0_reverse"):
        wrap(net["rnn"], name)
    return net


FORMS: dict[str, Wrap] = {"legacy-wn": hooked, "torch-wn": parametrized}


def ulps(a: Tensor, b: Tensor) -> float:
    """The largest distance in units of the last place of b."""
    step = (torch.nextafter(b.abs(), b.new_tensor(torch.inf)) - b.abs()).double()
    return float(((a.double() - b.double()).abs() / step).max())


@pytest.mark.parametrize("form", FORMS)
def test_torch_weight_norm_becomes_plain_and_comes_back(form: str) -> None:
    wrap = FORMS[form]
    plain = vocoder().state_dict()
    plain["pre.weight"][1] = 0  # a filter without direction
    like = wrapped(vocoder(), wrap).state_dict()
    normed, report = convert_state_dict(plain, form, like=like)
    assert set(normed) == set(like)
    assert report.facts["weights converted"] == 7
    assert "1 rows without direction have v = 1/√n and g = 0" in " ".join(report.notes)

    net = wrapped(vocoder(), wrap)
    net.load_state_dict(normed, strict=True)
    x = torch.randn(2, 3, 9)
    twin = vocoder()
    twin.load_state_dict(plain)
    torch.testing.assert_close(net["up"](net["pre"](x)), twin["up"](twin["pre"](x)))
    torch.testing.assert_close(net["head"](torch.ones(5)), twin["head"](torch.ones(5)))

    back, report = convert_state_dict(net.state_dict())
    assert report.facts["from"] == form
    assert all(ulps(back[key], value) <= 1 for key, value in plain.items() if "num_" not in key)
    assert back["pre.weight"][1].abs().max() == 0
    vocoder().load_state_dict(back, strict=True)


@pytest.mark.parametrize(("form", "other"), [("legacy-wn", "torch-wn"), ("torch-wn", "legacy-wn")])
def test_between_the_two_of_torch_no_bit_changes(form: str, other: str) -> None:
    given = wrapped(vocoder(), FORMS[form]).state_dict()
    there, _ = convert_state_dict(given, other)
    wrapped(vocoder(), FORMS[other]).load_state_dict(there, strict=True)
    back, _ = convert_state_dict(there, form)
    assert set(back) == set(given)
    assert all(torch.equal(back[key], value) for key, value in given.items())


def test_trained_gains_fold_to_what_the_layer_computes() -> None:
    net = wrapped(vocoder(), parametrized)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    plain, _ = convert_state_dict(net.state_dict())
    folded = nc.fold(net).model.state_dict()
    assert all(ulps(plain[key], value) <= 1 for key, value in folded.items() if "num_" not in key)


def own_layers() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(6, 6, 3, groups=3),
            "deep": nn.ConvTranspose1d(4, 4, 3, groups=4),
            "rnn": nn.GRU(3, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "tokens": nn.Embedding(5, 3),
        }
    )


def test_layers_of_normconv_both_ways() -> None:
    net = own_layers()
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    for layer in net.values():
        weight_norm_(layer)
    given = net.state_dict()
    folded = nc.fold(net).model.state_dict()
    back, _ = convert_state_dict(given, from_="normconv-wn")
    assert list(back) == list(folded)
    assert all(torch.equal(back[key], value) for key, value in folded.items())
    again, _ = convert_state_dict(plain, "normconv-wn", like=given)
    assert all(torch.equal(again[key], value) for key, value in given.items())
    net.load_state_dict(again, strict=True)


def test_log_gains_both_ways() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Linear(3, 2))
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    for layer in net:
        log_gain_(weight_norm_(layer), 2.0)
    given = net.state_dict()
    with pytest.raises(nc.UsageError, match="does not say c"):
        convert_state_dict(given)
    back, report = convert_state_dict(given, c=2.0)
    assert report.facts["from"] == "normconv-wn"
    for key, value in nc.fold(net).model.state_dict().items():
        assert torch.equal(back[key], value)
    made, _ = convert_state_dict(plain, "normconv-wn", layers="*", scale="exp", c=2.0)
    net.load_state_dict(made, strict=True)
    torch.testing.assert_close(net[1].weight, plain["1.weight"])
    linear, _ = convert_state_dict(given, "legacy-wn", c=2.0)
    torch.testing.assert_close(linear["0.weight_g"], (2 * given["0.weight_s"]).exp())
    again, _ = convert_state_dict(linear, "normconv-wn", like=given, c=2.0)
    torch.testing.assert_close(again["0.weight_s"], given["0.weight_s"])


def test_globs_say_which_layers_and_along_which_axis() -> None:
    plain = vocoder().state_dict()
    made, report = convert_state_dict(
        plain, "torch-wn", layers={"*": 0, "up": 1, "rnn.*_reverse": -1}
    )
    assert made["up.parametrizations.weight.original0"].shape == (1, 6, 1)
    assert made["rnn.parametrizations.weight_hh_l0_reverse.original0"].shape == ()
    assert made["rnn.parametrizations.weight_hh_l0.original0"].shape == (20, 1)
    assert made["norm.weight"] is not None  # one number a channel is no weight of a layer
    assert {row.site for row in report.sites} == {
        key for key, value in plain.items() if value.dim() > 1
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_standardized_layers_of_normconv(dialect: str) -> None:
    net = nn.Sequential(
        weight_standardize_(nn.Conv2d(3, 4, 3), dialect=dialect), nn.Conv2d(4, 4, 1)
    )
    torch.nn.init.normal_(net[0].weight_gain)  # type: ignore[arg-type]
    with pytest.raises(nc.UsageError, match="does not say how"):
        convert_state_dict(net.state_dict())
    plain, _ = convert_state_dict(net.state_dict(), from_=f"ws-{dialect}")
    folded = nc.fold(net).model
    folded.load_state_dict(plain, strict=True)
    assert all(
        ulps(plain[key], value) <= 1 for key, value in nc.fold(net).model.state_dict().items()
    )


def timm_layer(name: str, **options: Any) -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    made: nn.Module = getattr(layers, name)(3, 4, 3, padding=1, **options)
    return made


def test_the_standardized_convolutions_of_timm() -> None:
    x = torch.randn(2, 3, 6, 6)
    net = nn.ModuleDict({"conv": timm_layer("StdConv2d", eps=1e-8), "head": nn.Conv2d(3, 4, 1)})
    with pytest.raises(nc.UsageError, match="--layers"):
        convert_state_dict(net.state_dict(), from_="ws-timm")
    plain, report = convert_state_dict(net.state_dict(), from_="ws-timm", layers="conv", eps=1e-8)
    assert [row.site for row in report.sites] == ["conv.weight"]
    assert torch.equal(plain["head.weight"], net["head"].weight)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    conv.load_state_dict({"weight": plain["conv.weight"]}, strict=True)
    torch.testing.assert_close(conv(x), net["conv"](x))

    scaled = timm_layer("ScaledStdConv2d", gamma=1.7)
    torch.nn.init.normal_(scaled.gain)  # type: ignore[arg-type]
    with pytest.raises(nc.UsageError) as unsaid:
        convert_state_dict(scaled.state_dict())
    assert ["--gamma" in str(p) or "--eps" in str(p) for p in unsaid.value.problems] == [True] * 2
    plain, report = convert_state_dict(scaled.state_dict(), gamma=1.7, eps=1e-6)
    assert report.facts["from"] == "ws-nf"
    conv = nn.Conv2d(3, 4, 3, padding=1)
    conv.load_state_dict(plain, strict=True)
    torch.testing.assert_close(conv(x), scaled(x))


class Standardizer(nn.Module):
    """Composer's."""

    def forward(self, weight: Tensor) -> Tensor:
        var, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True, unbiased=False)
        return (weight - mean) / (var + 1e-10).sqrt()


def test_a_parametrization_that_standardizes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Linear(2, 2))
    torch.nn.utils.parametrize.register_parametrization(net[0], "weight", Standardizer())
    torch.nn.utils.parametrizations.spectral_norm(net[1])
    state_dict = net.state_dict()
    with pytest.raises(nc.LoadError, match=r"0\.weight is computed"):
        convert_state_dict(state_dict)
    plain, report = convert_state_dict(state_dict, from_="ws-bit")
    assert [row.site for row in report.sites] == ["0.weight"]
    expected = nc.fold(net).model.state_dict()["0.weight"]
    assert ulps(plain["0.weight"], expected) <= 1
    assert "1.parametrizations.weight.original" in plain
    with pytest.raises(nc.LoadError, match="become plain ones first"):
        convert_state_dict(state_dict, "legacy-wn", from_="ws-bit", layers="2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    plain = {name: value.to(dtype) for name, value in vocoder().state_dict().items()}
    normed, _ = convert_state_dict(plain, "legacy-wn", layers=["*"])
    back, _ = convert_state_dict(normed)
    assert {value.dtype for value in normed.values()} == {dtype}
    assert all(ulps(back[key], value) <= 1 for key, value in plain.items())


def test_what_is_tied_stays_tied_and_what_is_unknown_passes() -> None:
    layer = weight_norm_(nn.Linear(3, 3))
    state_dict = nn.ModuleDict({"a": layer, "b": layer}).state_dict()
    state_dict["ema.decay"] = torch.tensor(0.9)
    state_dict["a._extra_state"] = {"step": 3}  # type: ignore[assignment]
    made, report = convert_state_dict(state_dict)
    assert made["a.weight"] is made["b.weight"]
    assert made["ema.decay"] == state_dict["ema.decay"]
    assert made["a._extra_state"] == {"step": 3}
    assert set(report.facts["passed through"]) == {"a.bias", "b.bias", "ema.decay"}
    assert report.facts["passed through"]["a.bias"] == {"shape": [3], "dtype": "float32"}


def test_what_spectral_norm_computes_from_is_not_split() -> None:
    net = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    made, _ = convert_state_dict(net.state_dict(), "legacy-wn", layers="*", dim=0)
    assert {"0.weight_orig", "1.weight_g", "1.weight_v"} <= made.keys()
    assert "0.weight_orig_g" not in made


def test_what_else_computes_weights_is_named() -> None:
    spectral = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)))
    with pytest.raises(nc.LoadError, match=r"0\.weight is computed, and not by a weight norm"):
        convert_state_dict(spectral.state_dict())
    spectral.append(parametrized(nn.Linear(2, 2)))
    spectral.append(torch.nn.utils.spectral_norm(nn.Linear(2, 2)))
    made, report = convert_state_dict(spectral.state_dict())
    assert "1.weight" in made
    assert report.notes[-1].startswith("0.weight, 2.weight: computed by another parametrization")


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_one_axis(form: str) -> None:
    """Each of their numbers is a direction: g · sign(v)."""
    net = nn.Sequential(FORMS[form](nn.LayerNorm(3)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.tensor([2.0, -3.0, 0.5]))
    made, _ = convert_state_dict(net.state_dict())
    assert made["0.weight"].tolist() == [2.0, 3.0, 0.5]
    again, _ = convert_state_dict(made, form, like=net.state_dict())
    assert again.keys() == net.state_dict().keys()
    with pytest.raises(nc.LoadError, match="no layer of normconv"):
        convert_state_dict(net.state_dict(), "normconv-wn", from_=form)
