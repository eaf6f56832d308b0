"""Checkpoints and specs: weights are found, renamed, loaded strictly, or refused by name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normconv.errors import LoadError, UsageError
from normconv.sources import load, open_source, parse_model_args


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def equal(a: nn.Module, b: nn.Module) -> bool:
    right = b.state_dict()
    return all(torch.equal(v, right[k]) for k, v in a.state_dict().items())


def write(path: Path, document: Any) -> Path:
    torch.save(document, path)
    return path


KEYS = (
    "state_dict model model_state_dict net network generator ema state_dict_ema model_ema params "
    "params_ema weights module"
)


@pytest.mark.parametrize("key", KEYS.split())
def test_weights_are_found_under_usual_names(key: str, tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    document = {
        key: net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": np.float64(0.5),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
    }
    loaded = open_source(write(tmp_path / "c.pth", document), model=Net)
    assert equal(net, loaded.model)
    assert loaded.facts["key"] == key


@pytest.mark.parametrize("prefix", ["module.", "_module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_out_and_said(prefix: str, tmp_path: Path) -> None:
    net = Net()
    weights = {prefix + name: value for name, value in net.state_dict().items()}
    loaded = open_source(write(tmp_path / "c.pth", weights), model=Net)
    assert equal(net, loaded.model)
    assert "".join(loaded.facts["prefixes"]) == prefix
    assert any(prefix.split(".")[0] in note for note in loaded.notes)


def test_prefixes_in_the_middle_and_the_other_way_round(tmp_path: Path) -> None:
    inner = nn.Sequential(Net())
    weights = {name.replace("0.", "0._orig_mod.", 1): v for name, v in inner.state_dict().items()}
    path = write(tmp_path / "c.pth", weights)
    assert equal(inner, load(path, model=lambda: nn.Sequential(Net())))
    plain = write(tmp_path / "p.pth", Net().state_dict())
    wrapped = load(plain, model=lambda: nn.DataParallel(Net()))
    assert isinstance(wrapped, nn.DataParallel)


def test_a_nested_key_and_a_prefix_as_key(tmp_path: Path) -> None:
    net = Net()
    deep = {"nets": {"student": net.state_dict(), "teacher": Net().state_dict()}}
    assert equal(net, load(write(tmp_path / "a", deep), model=Net, key="nets.student"))
    lightning = {"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}
    path = write(tmp_path / "b", lightning)
    assert equal(net, load(path, model=Net, key="state_dict.model"))
    with pytest.raises(UsageError, match="no weights under the key 'stat'"):
        load(path, model=Net, key="stat")


def test_model_beside_ema_must_be_chosen(tmp_path: Path) -> None:
    document = {"model": Net().state_dict(), "model_ema": Net().state_dict()}
    path = write(tmp_path / "c.pth", document)
    with pytest.raises(LoadError, match=r"'model' .*'model_ema' .*--key"):
        load(path, model=Net)
    ema = load(path, model=Net, key="model_ema")
    assert torch.equal(ema.conv.weight, document["model_ema"]["conv.weight"])  # type: ignore[union-attr]


def test_the_only_fitting_and_the_usual_one_are_taken_and_said(tmp_path: Path) -> None:
    net = Net()
    other = {"generator": net.state_dict(), "discriminator": nn.Linear(2, 2).state_dict()}
    loaded = open_source(write(tmp_path / "a", other), model=Net)
    assert equal(net, loaded.model)
    assert any("alone fit" in note for note in loaded.notes)
    usual = {"state_dict": net.state_dict(), "best": Net().state_dict()}
    loaded = open_source(write(tmp_path / "b", usual), model=Net)
    assert equal(net, loaded.model)
    assert any("and not best" in note for note in loaded.notes)


def test_what_does_not_fit_is_listed_once_and_nothing_is_loaded(tmp_path: Path) -> None:
    weights = Net(5).state_dict()
    weights["convv.bias"] = weights.pop("conv.bias")
    target = Net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(LoadError) as caught:
        load(write(tmp_path / "c.pth", weights), model=target)
    shown = str(caught.value)
    assert "conv.weight: is (5, 3, 1, 1) in the file and (3, 3, 1, 1) in the model" in shown
    assert "conv.bias: the model has it and the file does not; the file has convv.bias" in shown
    assert "convv.bias: the file has it and the model does not" in shown
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_long_list_is_cut_with_a_count(tmp_path: Path) -> None:
    path = write(tmp_path / "c.pth", {f"w{i}": torch.ones(1) for i in range(40)})
    with pytest.raises(LoadError, match=r"46 names.*\n(.*\n)+.*and 36 more") as caught:
        load(path, model=Net)
    assert len(caught.value.problems) == 12


def test_an_instance_is_not_changed(tmp_path: Path) -> None:
    net, target = Net(), Net()
    before = target.conv.weight.clone()
    back = load(write(tmp_path / "c.pth", net.state_dict()), model=target)
    assert back is not target
    assert torch.equal(target.conv.weight, before)
    assert equal(net, back)


def test_old_checkpoints_without_batch_counters_load(tmp_path: Path) -> None:
    weights = {k: v for k, v in Net().state_dict().items() if "num_batches" not in k}
    assert load(write(tmp_path / "c.pth", weights), model=Net).bn.num_batches_tracked == 0  # type: ignore[union-attr]


def test_another_dtype_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "c.pth", Net().half().state_dict())
    assert any("float16" in note for note in open_source(path, model=Net).notes)


def test_a_whole_module_gives_its_weights_to_a_model(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    path = write(tmp_path / "c.pt", net)
    assert equal(net, load(path, model=lambda: nn.Sequential(nn.Linear(2, 2))))
    inside = write(tmp_path / "d.pt", {"model": net, "epoch": 1})
    assert equal(net, load(inside))


# Specs


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_a_library_model_has_weights_only_when_random_is_asked_for(spec: str) -> None:
    with pytest.raises(UsageError, match="--random-weights"):
        load(spec)
    loaded = open_source(spec, random_weights=True, model_args={"num_classes": 7})
    assert loaded.model.fc.out_features == 7  # type: ignore[union-attr]
    assert any("random" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_inception_below_a_checkpoint_is_quick_and_silent(
    name: str, tmp_path: Path
) -> None:
    from torchvision import models

    with torch.device("meta"):
        weights = models.get_model(name, weights=None, init_weights=False).state_dict()
    path = write(tmp_path / "c.pth", {k: torch.zeros(v.shape) for k, v in weights.items()})
    back = load(path, model=f"torchvision:{name}")
    assert not back.state_dict()["fc.weight"].any()


def test_a_detector_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    load("torchvision:ssdlite320_mobilenet_v3_large", random_weights=True)


def test_downloads_and_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="never done here"):
        load("timm:resnet18", random_weights=True, model_args={"pretrained": True})
    with pytest.raises(UsageError, match="did you mean resnet50"):
        load("timm:resnet_50", random_weights=True)
    with pytest.raises(UsageError, match="no model of that name"):
        load("torchvision:nothing_like_it", random_weights=True)
    with pytest.raises(LoadError, match="num_clases"):
        load("torchvision:resnet18", random_weights=True, model_args={"num_clases": 7})


def test_a_factory_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nc_factory_here.py").write_text(
        "from torch import nn\n"
        "def make(width=2):\n    return nn.Linear(width, 1)\n"
        "def wrong():\n    return 3\n"
        "def broken():\n    raise ValueError('no data')\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model = load("nc_factory_here:make", model_args=parse_model_args(["width=4"]))
    assert model.in_features == 4
    assert sys.path == path
    with pytest.raises(LoadError, match="gives a int"):
        load("nc_factory_here:wrong")
    with pytest.raises(LoadError, match="ValueError: no data"):
        load("nc_factory_here:broken")
    with pytest.raises(UsageError, match="did you mean make"):
        load("nc_factory_here:mak")
    with pytest.raises(UsageError, match="no module 'nc_no_such"):
        load("nc_no_such:make")


def test_a_transformers_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "m")
    back = load(f"transformers:{tmp_path / 'm'}")
    assert type(back) is type(model)
    assert equal(model, back)
    again = load(tmp_path / "m" / "model.safetensors", model=f"transformers:{tmp_path / 'm'}")
    assert equal(model, again)
    with pytest.raises(UsageError, match=r"config\.json"):
        load(f"transformers:{tmp_path}")
    with pytest.raises(LoadError, match="transformers:"):
        load(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no weights"):
        load(f"transformers:{tmp_path / 'm'}")


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from normconv.errors import MissingDependency

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"normconv\[zoo\]"):
        load("timm:resnet18", random_weights=True)


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="goes with a checkpoint"):
        load("timm:resnet18", model="timm:resnet18")
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_model_args(["num_classes"])
    with pytest.raises(UsageError, match="not a path"):
        load(Net())  # type: ignore[arg-type]
