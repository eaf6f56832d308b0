"""A few of the models that `benchmarks.fold_zoo` folds."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import normconv as nc
from normconv.proof import prove

pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

from benchmarks.fold_zoo_models import RECIPES, apply_, build, normed  # noqa: E402


@pytest.mark.parametrize("name", ["encodec", "speecht5", "vits", "wav2vec2"])
def test_transformers_under_weight_norm(name: str) -> None:
    model = build(name)
    apply_(model)
    total = normed(model)
    folded, report = nc.fold(model, standalone=True)
    assert total > 0
    assert normed(model) == total
    assert normed(folded) == 0
    assert report.facts == {"folded": {"torch weight_norm (parametrization)": total}, "left": 0}
    assert nc.fold(folded).report.facts == {"folded": {}, "left": 0}
    torch.save(folded, io.BytesIO())
    for part, inputs in RECIPES[name].inputs.items():
        given = inputs()
        args, kwargs = (tuple(given.values()), {}) if part else ((), given)
        proof = prove(model.get_submodule(part), folded.get_submodule(part), (), args, kwargs)
        assert all(check.passed for check in proof.checks), [c.describe() for c in proof.checks]


def test_timm_under_weight_standardization() -> None:
    model = timm.create_model("test_nfnet").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("skipinit_gain"):  # 0 at first: its branch would not be seen
                parameter.fill_(0.5)
    x = torch.randn(1, 3, 48, 48)
    convolutions = [n for n, m in model.named_modules() if "Std" in type(m).__name__]
    folded, report = nc.fold(model)
    assert sum(report.facts["folded"].values()) == len(convolutions) > 5
    assert report.facts["left"] == 0
    assert all(isinstance(folded.get_submodule(name), nn.Conv2d) for name in convolutions)
    assert not any("Std" in type(module).__name__ for module in folded.modules())
    assert all(check.passed for check in prove(model, folded, (), (x,)).checks)
