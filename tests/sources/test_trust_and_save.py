"""Trusting code by name, and saving so that loading gives the model back."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import normconv
from normconv.errors import LoadError, UsageError
from normconv.sources import load, open_source, save
from normconv.sources import save as save_verb

NET = (
    "import torch\nfrom torch import nn\n"
    "class Net(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.fc = nn.Linear(2, 2)\n"
    "    def forward(self, x):\n"
    "        return self.fc(x)\n"
)
RUN = "import torch\nif __name__ == '__main__':\n    torch.save(Net(), 'm.pt')\n"


def run(script: str, folder: Path) -> None:
    subprocess.run([sys.executable, script], cwd=folder, check=True, timeout=120)


@pytest.fixture
def clean_modules(monkeypatch: pytest.MonkeyPatch):
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("nc_"):
            del sys.modules[name]
    sys.path[:] = path


@pytest.mark.usefixtures("clean_modules")
def test_package_folder_and_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src" / "nc_pkg").mkdir(parents=True)
    (tmp_path / "src" / "nc_pkg" / "__init__.py").touch()
    (tmp_path / "src" / "nc_pkg" / "net.py").write_text(NET)
    (tmp_path / "nc_train.py").write_text(NET + RUN)
    (tmp_path / "save_pkg.py").write_text(
        "import sys, torch\nsys.path.insert(0, 'src')\nfrom nc_pkg.net import Net\n"
        "torch.save(Net(), 'p.pt')\n"
    )
    run("nc_train.py", tmp_path)
    run("save_pkg.py", tmp_path)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(LoadError, match="--trust nc_pkg"):
        load("p.pt")
    assert "nc_pkg" not in sys.modules
    with pytest.raises(LoadError, match="cannot be imported"):
        load("p.pt", trust=("nc_pkg",))
    loaded = open_source("p.pt", trust=("./src",))
    assert type(loaded.model).__name__ == "Net"
    assert loaded.facts["trusted"] == ["./src"]
    assert load("p.pt", trust=("nc_pkg",))(torch.ones(1, 2)).shape == (1, 2)

    with pytest.raises(LoadError, match=r"__main__\.Net.*--trust train\.py"):
        load("m.pt")
    assert "nc_train" not in sys.modules
    model = load("m.pt", trust=("nc_train.py",))
    assert type(model).__module__ == "nc_train"
    save(model, "again.pt")
    again = load("again.pt", trust=("nc_train.py",))
    assert torch.equal(again.fc.weight, model.fc.weight)  # type: ignore[union-attr]
    assert (tmp_path / "m.pt").exists()


@pytest.mark.parametrize("word", ["os", "builtins", "subprocess", "sys", "torch", "torch.hub"])
def test_python_and_torch_are_never_trusted(word: str, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="trusted"):
        load(tmp_path / "m.pt", trust=(word,))


def test_a_trust_word_that_is_nothing(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "m.pt", trust=("nothing.py",))
    with pytest.raises(UsageError, match="neither a folder"):
        load(tmp_path / "m.pt", trust=("./nothing",))


@pytest.mark.usefixtures("clean_modules")
def test_trusted_code_does_not_run_when_the_file_is_refused_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nc_side.py").write_text("open('ran', 'w')\ndef make(): pass\n")
    import zipfile

    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        data = b"\x80\x02(cnc_side\nmake\ncos\nsystem\nt."
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError) as caught:
        load("m.pt", trust=("nc_side",))
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "ran").exists()


# Saving


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("view", torch.arange(6.0).reshape(2, 3).t())


def test_safetensors_round_trip_with_tied_and_strided_tensors(tmp_path: Path) -> None:
    model = Tied()
    model.to(memory_format=torch.preserve_format)
    save(model, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors", model=Tied)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    assert back.head.weight is back.embed.weight  # type: ignore[union-attr]


def test_tied_tensors_that_other_writers_leave_out_are_filled(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Tied()
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "head.weight"}
    save_file(weights, str(tmp_path / "m.safetensors"))
    back = load(tmp_path / "m.safetensors", model=Tied)
    assert torch.equal(back.head.weight, model.embed.weight)  # type: ignore[union-attr]


def test_overlapping_views_are_saved_apart(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    model = nn.Module()
    model.register_buffer("left", base[:4])
    model.register_buffer("right", base[2:])
    save(model, tmp_path / "m.safetensors")
    twin = nn.Module()
    twin.register_buffer("left", torch.zeros(4))
    twin.register_buffer("right", torch.zeros(4))
    back = load(tmp_path / "m.safetensors", model=twin)
    assert back.right.tolist() == [2.0, 3.0, 4.0, 5.0]  # type: ignore[operator, union-attr]


def test_the_history_is_written_and_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    module = sys.modules["normconv.sources.saving"]
    monkeypatch.setattr(module, "history_of", lambda model: [{"step": "double"}])
    save(nn.Linear(4, 2), tmp_path / "m.safetensors")
    with safe_open(str(tmp_path / "m.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["normconv.version"] == normconv.__version__
    assert json.loads(metadata["normconv.history"]) == [{"step": "double"}]

    seen = []

    def rebuild(model: nn.Module, history: list[dict[str, str]]) -> nn.Module:
        seen.append(history)
        return nn.Linear(4, 2)

    monkeypatch.setattr("normconv.sources.loading.rebuild", rebuild)
    loaded = open_source(tmp_path / "m.safetensors", model=lambda: nn.Linear(2, 2))
    assert seen == [[{"step": "double"}]]
    assert loaded.facts["rebuilt"] == 1


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_converted_model_comes_back(name: str, tmp_path: Path) -> None:
    from normconv.plan.history import history_of

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    model, x = make(), torch.randn(4, 3, 8, 8)
    model(x)
    plan = normconv.make_plan(model.eval(), to="wn", example_inputs=(x,))
    converted = normconv.apply_plan(model, plan).model.eval()
    save(converted, tmp_path / name)
    back = load(tmp_path / name, model=make if name.endswith("safetensors") else None).eval()
    assert type(back[0]) is type(converted[0])  # type: ignore[index]
    assert history_of(back) == history_of(converted) != []
    assert torch.equal(back(x), converted(x))


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(nn.Linear(40, 40), path)
    whole = path.read_bytes()
    for data in (whole[:500], whole[:30], b"not one at all"):
        path.write_bytes(data)
        with pytest.raises(LoadError):
            load(path, model=lambda: nn.Linear(40, 40))
    path.write_bytes(whole)
    with pytest.raises(LoadError, match="--model"):
        load(path)


def test_a_model_that_does_not_pickle_leaves_no_file_and_says_where(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].scale = lambda x: x
    path = tmp_path / "m.pt"
    path.write_text("older")
    with pytest.raises(LoadError, match=r"1\.scale: cannot be pickled"):
        save(model, path)

    class Local(nn.Module):
        pass

    with pytest.raises(LoadError, match="Local is defined inside a function"):
        save(nn.Sequential(Local()), path)
    assert path.read_text() == "older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt"]


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"use \.pt"):
        save(nn.Linear(2, 2), tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="no numbers"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_what_it_says() -> None:
    module = importlib.import_module("normconv.sources")
    assert module.save is save_verb
    assert normconv.load is load


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_an_average_of_weights_is_saved_by_its_module(tmp_path: Path) -> None:
    """torch's AveragedModel holds a copy: its own names and counter would not fit the plan."""
    net = _small().eval()
    model = normconv.convert(net, "wn", example_inputs=(torch.randn(4, 2),)).model
    average = AveragedModel(model)
    with pytest.raises(UsageError, match=r"save its \.module"):
        save(average, tmp_path / "average.safetensors")
    assert not list(tmp_path.iterdir())
    save(average.module, tmp_path / "average.safetensors")
    torch.save({"ema": AveragedModel(net).state_dict()}, tmp_path / "checkpoint.pt")
    loaded: Any = load(tmp_path / "checkpoint.pt", model=_small, key="ema")
    assert torch.equal(loaded[0].weight, net[0].weight)
