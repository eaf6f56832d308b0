"""What is refused: every key that is wrong is named, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normconv as nc
from normconv.bridges import convert_state_dict

G, V = torch.ones(4, 1, 1), torch.ones(4, 3, 2)
LEGACY = {"a.weight_g": G, "a.weight_v": V}
TORCH = {"b.parametrizations.weight.original0": G, "b.parametrizations.weight.original1": V}
OWN = {"c.weight_gain": G, "c.weight_v": V}


def wrong_keys(given: dict[str, Any], to: str = "plain", **options: Any) -> list[str]:
    with pytest.raises(nc.LoadError) as refused:
        convert_state_dict(given, to, **options)
    return [problem.where for problem in refused.value.problems]


def test_mixed_conventions_name_keys_of_each() -> None:
    keys = wrong_keys(LEGACY | TORCH)
    assert keys == ["a.weight_v", "b.parametrizations.weight.original1"]
    assert wrong_keys(LEGACY | OWN) == ["a.weight_v", "c.weight_v"]


def test_parts_without_the_other_and_shapes_that_disagree_come_together() -> None:
    given = {
        "a.weight_g": G,
        "b.weight_v": V,
        "c.parametrizations.weight.original0": G,
        "d.weight_g": G,
        "d.weight_s": G,
        "d.weight_v": V,
    }
    assert wrong_keys(given) == [
        "a.weight_g",
        "b.weight_v",
        "d.weight_v",
        "c.parametrizations.weight.original0",
    ]
    shapes = {
        "a.weight_g": torch.ones(3, 1, 1),
        "b.weight_g": G[:, 0],
        "c.weight_g": torch.ones(1, 1, 1),
        "d.weight_g": torch.ones(3, 3, 1),
    }
    shapes |= {key.replace("_g", "_v"): V for key in shapes}
    assert wrong_keys(shapes) == ["a.weight_g", "b.weight_g", "c.weight_g", "d.weight_g"]


def test_a_weight_beside_its_own_parts() -> None:
    assert wrong_keys(LEGACY | {"a.weight": V}) == ["a.weight"]


def test_a_chain_of_parametrizations_is_no_weight_norm() -> None:
    chain = TORCH | {"b.parametrizations.weight.1._u": torch.ones(4)}
    assert wrong_keys(chain) == ["b.parametrizations.weight.1._u"]
    spectral = {"c.parametrizations.weight.original": V, "c.parametrizations.weight.0._u": G}
    made, _ = convert_state_dict(TORCH | spectral)
    assert set(made) == {"b.weight", *spectral}
    older = nn.utils.spectral_norm(nn.Linear(3, 2)).state_dict()  # whose weight_v is no direction
    made, _ = convert_state_dict(LEGACY | older)
    assert set(made) == {"a.weight", *older}


def test_the_convention_that_was_said_must_be_the_file_s() -> None:
    assert wrong_keys(LEGACY, from_="torch-wn") == ["a.weight_v"]
    assert wrong_keys(LEGACY, "torch-wn", from_="plain") == ["a.weight_v"]
    assert wrong_keys({"a.weight": V}) == ["the state dict"]


def test_a_dim_out_of_range() -> None:
    given = {"a.weight": V, "b.weight": V[0]}
    assert wrong_keys(given, "legacy-wn", layers="*", dim=2) == ["b.weight"]
    assert wrong_keys(given, "legacy-wn", layers="*", dim=-2) == ["a.weight", "b.weight"]


def test_gains_that_no_layer_of_normconv_has() -> None:
    given = {"a.weight_g": torch.ones(1, 1, 2), "a.weight_v": V}
    assert wrong_keys(given, "normconv-wn") == ["a.weight"]


def test_into_weight_norm_the_keys_must_come_from_somewhere() -> None:
    with pytest.raises(nc.UsageError, match=r"--like FILE .*--plan.*--layers GLOB with --dim"):
        convert_state_dict({"a.weight": V}, "legacy-wn")
    with pytest.raises(nc.UsageError, match="matches no layer"):
        convert_state_dict({"a.weight": V}, "legacy-wn", layers=["b*"])


def test_like_must_be_like_it() -> None:
    given = {"a.weight": V[:3], "x.weight": V}
    assert wrong_keys(given, "legacy-wn", like=LEGACY | {"b.weight_g": G, "b.weight_v": V}) == [
        "a.weight",
        "b.weight",
    ]
    assert wrong_keys(given, "legacy-wn", like={"a.weight_g": G}) == ["--like: a.weight_g"]
    with pytest.raises(nc.UsageError, match="no weight in the form"):
        convert_state_dict(given, "legacy-wn", like=given)
    assert wrong_keys(given, "legacy-wn", like=TORCH) == [
        "--like: b.parametrizations.weight.original1"
    ]
    assert wrong_keys(LEGACY, "torch-wn", like=TORCH) == ["b.weight", "a.weight"]


def test_quantised_weights_and_standardized_targets() -> None:
    given = {"a.weight_g": G, "a.weight_v": V.to(torch.int8)}
    assert wrong_keys(given) == ["a.weight"]
    with pytest.raises(nc.UsageError, match="computes the same"):
        convert_state_dict({"a.weight": V}, "ws-timm")
    assert wrong_keys(OWN, "legacy-wn", from_="ws-bit") == ["c.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "plian"}, "did you mean plain"),
        ({"to": "plain", "from_": "plain"}, "both are plain"),
        ({"to": "plain", "like": LEGACY}, "needs no keys"),
        ({"to": "torch-wn", "like": LEGACY, "layers": "*"}, "more than one is given"),
        ({"to": "torch-wn", "scale": "exp"}, "has no gains"),
        ({"to": "torch-wn", "scale": "log"}, "'linear' or 'exp'"),
        ({"c": 0.0}, "c: 0.0 is no number other than 0"),
        ({"eps": float("nan")}, "no positive number"),
        ({"gamma": 1.0, "from_": "legacy-wn"}, "has none"),
    ],
)
def test_calls_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(nc.UsageError, match=message):
        convert_state_dict(LEGACY, **options)
