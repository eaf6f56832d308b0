"""Checkpoint files: streamed, sharded, nested, tied; whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normconv as nc
from normconv.bridges import convert_file, convert_state_dict
from normconv.bridges.streaming import SafetensorsWriter
from normconv.bridges.tensors import DTYPES, Spec


def weight_normed(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "a.weight_g": torch.randn(4, 1, 1, generator=random),
        "a.weight_v": torch.randn(4, 3, 2, generator=random),
        "a.bias": torch.randn(4, generator=random),
        "steps": torch.tensor(3),
        "up.weight_g": torch.randn(1, 5, 1, generator=random).half(),
        "up.weight_v": torch.randn(4, 5, 2, generator=random).half(),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def sharded(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Gain and v in different shards."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    homes = {key: names[key.endswith(("_v", "bias"))] for key in tensors}
    for name in names:
        own = {key: value for key, value in tensors.items() if homes[key] == name}
        save_file(own, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1, "by": "me"}, "weight_map": homes}))
    return index


def test_a_safetensors_file_with_its_metadata(tmp_path: Path) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "new" / "out.safetensors"
    save_file(weight_normed(), source, {"format": "pt", "author": "somebody"})
    report = convert_file(source, out)
    made = load_file(out)
    assert same(made, convert_state_dict(weight_normed()).state_dict)
    assert made["up.weight"].dtype == torch.float16
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["author"] == "somebody"
    assert metadata["normconv.version"] == nc.__version__
    assert report.facts["from"] == "legacy-wn"
    assert list(report.facts["passed through"]) == ["a.bias", "steps"]
    assert [entry.name for entry in out.parent.iterdir()] == ["out.safetensors"]


def test_like_a_file(tmp_path: Path) -> None:
    save_file(weight_normed(), tmp_path / "like.safetensors")
    plain, _ = convert_state_dict(weight_normed())
    torch.save(plain, tmp_path / "plain.pt")
    convert_file(
        tmp_path / "plain.pt",
        tmp_path / "out.safetensors",
        "legacy-wn",
        like=tmp_path / "like.safetensors",
    )
    made = load_file(tmp_path / "out.safetensors")
    assert made["up.weight_g"].shape == (1, 5, 1)
    assert same(convert_state_dict(made).state_dict, plain)


def test_shards_come_out_as_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path, weight_normed())
    out = tmp_path / "out" / "plain.safetensors.index.json"
    convert_file(index, out)
    written = json.loads(out.read_text())
    made = {}
    for name in set(written["weight_map"].values()):
        part = load_file(out.parent / name)
        assert set(part) == {k for k, home in written["weight_map"].items() if home == name}
        made |= part
    assert same(made, convert_state_dict(weight_normed()).state_dict)
    assert written["weight_map"]["a.weight"] == "plain-00001-of-00002.safetensors"
    size = sum(value.numel() * value.element_size() for value in made.values())
    assert written["metadata"] == {"total_size": size, "by": "me"}
    convert_file(index, tmp_path / "one.safetensors")
    assert same(load_file(tmp_path / "one.safetensors"), made)


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    index = sharded(tmp_path, weight_normed())
    out = tmp_path / "out.safetensors"
    twin = tmp_path / "twin.safetensors.index.json"
    twin.write_text(index.read_text())
    with pytest.raises(nc.UsageError, match="would replace one of the source"):
        convert_file(twin, index)
    with pytest.raises(nc.UsageError, match="is the source"):
        convert_file(index, index)
    written = json.loads(index.read_text())
    written["weight_map"]["b.bias"] = "model-00001-of-00002.safetensors"
    del written["weight_map"]["steps"]
    index.write_text(json.dumps(written))
    with pytest.raises(nc.LoadError) as refused:
        convert_file(index, out)
    assert {problem.where for problem in refused.value.problems} == {"b.bias", "steps"}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        nc.LoadError, match=r"a.weight_v.*model-00002-of-00002.safetensors is missing"
    ):
        convert_file(index, out)
    assert not out.exists()


def test_shards_of_torch_save(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    homes = {key: names[key.endswith("_v")] for key in weight_normed()}
    for name in names:
        own = {key: value for key, value in weight_normed().items() if homes[key] == name}
        torch.save(own, tmp_path / name)
    index, out = tmp_path / "pytorch_model.bin.index.json", tmp_path / "out.safetensors"
    index.write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    convert_file(index, out)
    assert same(load_file(out), convert_state_dict(weight_normed()).state_dict)
    with pytest.raises(nc.UsageError, match="no index of safetensors"):
        convert_file(index, tmp_path / "out.safetensors.index.json")
    with pytest.raises(nc.UsageError, match="do not nest"):
        convert_file(index, out, key="generator")
    torch.save({"c.bias": torch.ones(1)}, tmp_path / names[0])
    with pytest.raises(nc.LoadError) as refused:
        convert_file(index, tmp_path / "no.safetensors")
    assert {"a.weight_g", "c.bias"} <= {problem.where for problem in refused.value.problems}
    torch.save([1], tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(nc.LoadError, match=r"(?s)no state dict.*00002-of-00002.bin is missing"):
        convert_file(index, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_nested_dicts_keep_their_nesting(tmp_path: Path) -> None:
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    document = {
        "generator": weight_normed(),
        "more": {"discriminator": weight_normed(1), "codes": {"table": torch.ones(2)}},
        "epoch": 7,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
    }
    torch.save(document, source)
    report = convert_file(source, out)
    made = torch.load(out)
    assert same(made["generator"], convert_state_dict(weight_normed()).state_dict)
    assert same(made["more"]["discriminator"], convert_state_dict(weight_normed(1)).state_dict)
    assert made["more"]["codes"]["table"].tolist() == [1, 1]
    assert made["epoch"] == 7
    assert made["optimizer"]["state"][0]["step"] == 1
    assert report.sites[0].site == "generator.a.weight"
    with pytest.raises(nc.UsageError, match="choose with --key"):
        convert_file(source, tmp_path / "out.safetensors")
    convert_file(source, tmp_path / "out.safetensors", key="more.discriminator")
    assert same(load_file(tmp_path / "out.safetensors"), made["more"]["discriminator"])
    with pytest.raises(nc.UsageError, match="there are no weights under the key 'g'"):
        convert_file(source, out, key="g")


def test_problems_of_all_nested_dicts_come_together(tmp_path: Path) -> None:
    broken = {name: value for name, value in weight_normed().items() if name != "a.weight_v"}
    torch.save({"g": broken, "d": broken}, tmp_path / "in.pt")
    with pytest.raises(nc.LoadError) as refused:
        convert_file(tmp_path / "in.pt", tmp_path / "out.pt")
    assert [p.where for p in refused.value.problems] == ["g.a.weight_g", "d.a.weight_g"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.pt"]


def test_an_older_output_is_untouched_when_the_input_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"a.weight_g": torch.ones(2, 1)}, source)
    out.write_bytes(b"older")
    with pytest.raises(nc.LoadError, match=r"a.weight_g: its v is missing"):
        convert_file(source, out)
    assert out.read_bytes() == b"older"
    # While tensors are written already: all gains 0 is only seen then.
    save_file({"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}, source)
    with pytest.raises(nc.LoadError, match=r"b.weight: all its gains are 0"):
        convert_file(source, out, "normconv-wn", layers="*", scale="exp")
    assert out.read_bytes() == b"older"
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.safetensors", "out.safetensors"}


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file(weight_normed(), source)
    with pytest.raises(nc.UsageError, match="is the source"):
        convert_file(source, source)
    with pytest.raises(nc.UsageError, match="does not end in"):
        convert_file(source, tmp_path / "out.onnx")
    with pytest.raises(nc.UsageError, match="no index of safetensors"):
        convert_file(source, tmp_path / "out.safetensors.index.json")
    with pytest.raises(nc.UsageError, match="no such file"):
        convert_file(tmp_path / "im.safetensors", tmp_path / "out.pt")
    with pytest.raises(nc.UsageError, match="does not nest"):
        convert_file(source, tmp_path / "out.pt", key="generator")
    torch.save(nn.Linear(1, 1), tmp_path / "whole.pt")
    with pytest.raises(nc.LoadError, match="holds a whole model"):
        convert_file(tmp_path / "whole.pt", tmp_path / "out.pt")
    (tmp_path / "bad.safetensors").write_bytes(source.read_bytes()[:-4])
    with pytest.raises(nc.LoadError, match="damaged"):
        convert_file(tmp_path / "bad.safetensors", tmp_path / "out.pt")
    extra = weight_normed() | {"a._extra_state": {"step": 1}}
    torch.save(extra, tmp_path / "extra.pt")
    with pytest.raises(nc.LoadError, match=r"a._extra_state: is no tensor"):
        convert_file(tmp_path / "extra.pt", tmp_path / "out.safetensors")


def converted_files(tmp_path: Path) -> Any:
    def factory() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    net, x = factory().eval(), torch.randn(2, 3, 5, 5)
    nn.init.normal_(net[1].bias)  # type: ignore[arg-type]
    save_file(net.state_dict(), tmp_path / "bn.safetensors")
    return factory, net, x


def test_normconv_loads_what_comes_out(tmp_path: Path) -> None:
    """The file's history leads a fresh model to the new keys."""
    factory, net, x = converted_files(tmp_path)
    plan = nc.make_plan(net, "wn", layers="all", options={"scale": "exp"}, example_inputs=(x,))
    normed, plain = tmp_path / "wn.safetensors", tmp_path / "plain.safetensors"
    convert_file(tmp_path / "bn.safetensors", normed, "normconv-wn", plan=plan, eps=1e-5)
    model = nc.load(normed, model=factory).eval()
    torch.testing.assert_close(model(x), net(x))
    report = convert_file(normed, plain)  # and c is in the history
    assert report.facts["from"] == "normconv-wn"
    folded = nc.load(plain, model=factory).eval()
    assert type(folded[0]) is nn.Conv2d
    torch.testing.assert_close(folded(x), net(x))
    convert_file(tmp_path / "bn.safetensors", plain, plan=plan, eps=1e-5)
    torch.testing.assert_close(nc.load(plain, model=factory).eval()(x), net(x))
    convert_file(plain, normed, "normconv-wn", like=normed)
    torch.testing.assert_close(nc.load(normed, model=factory).eval()(x), net(x))
    convert_file(normed, tmp_path / "legacy.safetensors", "legacy-wn")
    with safe_open(tmp_path / "legacy.safetensors", "pt") as file:
        assert "normconv.history" not in file.metadata()


def test_standardized_files_of_normconv_know_their_dialect(tmp_path: Path) -> None:
    def factory() -> nn.Sequential:
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
        return nn.Sequential(*layers)

    net, x = factory().eval(), torch.randn(2, 3, 6, 6)
    plan = nc.make_plan(net, "gn+ws", options={"dialect": "qiao"}, example_inputs=(x,))
    assert [step.action for step in plan.steps] == ["fold", "standardize"]
    model = nc.apply_plan(net, plan).model
    nn.init.normal_(model[2].weight_v)  # type: ignore[arg-type]
    nc.save(model, tmp_path / "ws.safetensors")
    report = convert_file(tmp_path / "ws.safetensors", tmp_path / "out.safetensors")
    assert [row.site for row in report.sites] == ["2.weight"]
    loaded = nc.load(tmp_path / "out.safetensors", model=factory).eval()
    torch.testing.assert_close(loaded(x), model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tokens(x))
        return out


def test_tensors_that_a_file_leaves_out_stay_left_out(tmp_path: Path) -> None:
    net, x = Tied(), torch.arange(5)
    recipe = nc.Recipe((nc.Rule("wn", options={"embeddings": True}),))
    model = nc.convert(net, recipe, layers="all", example_inputs=(x,)).model
    nc.save(model, tmp_path / "wn.safetensors")
    with safe_open(tmp_path / "wn.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2
    convert_file(tmp_path / "wn.safetensors", tmp_path / "plain.safetensors")
    assert len(load_file(tmp_path / "plain.safetensors")) == 1
    loaded = nc.load(tmp_path / "plain.safetensors", model=Tied)
    assert loaded.head.weight is loaded.tokens.weight
    torch.testing.assert_close(loaded(x), net(x))


def test_the_writer_and_every_dtype(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3, dtype=torch.float32).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.ones(0, 4), "view": torch.ones(2, 3).T}
    specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    path = tmp_path / "all.safetensors"
    writer = SafetensorsWriter(path, specs, {"π": "3"})
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    made = load_file(path)
    assert set(made) == set(tensors)
    for name, value in tensors.items():
        assert made[name].dtype == value.dtype
        one, other = (each.reshape(-1).view(torch.uint8) for each in (made[name], value))
        assert made[name].shape == value.shape
        assert torch.equal(one, other)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"π": "3"}


def test_a_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Anonymous memory grows by some layers of a file of 16."""
    if not sys.platform.startswith("linux"):
        pytest.skip("RssAnon is Linux's")
    from benchmarks.bridge_memory import Peak, make_file

    layer = 1024 * 1024 * 4
    make_file(tmp_path / "in.safetensors", 16, 1024)
    make_file(tmp_path / "small.safetensors", 2, 1024)
    convert_file(tmp_path / "small.safetensors", tmp_path / "out.safetensors")
    with Peak() as peak:
        convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert peak.extra < 6 * layer
