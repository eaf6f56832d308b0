"""Folders of transformers, folded: written, loaded again, compared; nothing wrong gets a name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import normconv as nc
from normconv.deploy import folded_folder
from normconv.deploy.folded_folder import fold_folder
from normconv.deploy.reload import load_and_run, reload_folder
from normconv.numerics import relative_l2
from normconv.proof import evaluate
from normconv.sources.folded import WEIGHTS
from normconv.sources.hf_folder import quiet_transformers

transformers = pytest.importorskip("transformers")
tiny_speech = pytest.importorskip("tests.deploy.tiny_speech")
tiny, inputs_of, save_tiny = tiny_speech.tiny, tiny_speech.inputs_of, tiny_speech.save_tiny

NORMED = ("encodec", "wav2vec2", "vits")
COMPUTED = (*NORMED, "bit")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speech")
    return {name: save_tiny(name, root / name) for name in (*COMPUTED, "hifigan")}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same load and run without the seconds that a new process takes to import."""
    monkeypatch.setattr(folded_folder, "reload_folder", load_and_run)


def fold_it(source: Path, out: Path, name: str, **options: Any) -> nc.Report:
    model = nc.load(f"transformers:{source}")
    return fold_folder(model, source, out, (), inputs_of(name), **options)


def outputs(model: Any, name: str) -> dict[str, torch.Tensor]:
    return evaluate(model, (), inputs_of(name))


def assert_same(model: Any, reference: Any, name: str) -> None:
    for key, expected in outputs(reference, name).items():
        assert relative_l2(outputs(model, name)[key], expected) < 1e-5, key


@pytest.mark.parametrize("name", ["encodec", "wav2vec2"])
def test_the_damage_a_plain_folder_does(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """What these folders are kept from: `from_pretrained` takes it, and computes something else."""
    original = nc.load(f"transformers:{sources[name]}")
    plain = nc.fold(original).model
    with quiet_transformers():
        plain.save_pretrained(tmp_path)
        again = type(original).from_pretrained(tmp_path)
    expected, got = outputs(original, name), outputs(again, name)
    errors = [relative_l2(got[key], value) for key, value in expected.items()]
    assert not all(error < 1e-2 for error in errors)


def test_such_a_folder_gets_no_name(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def naive(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    monkeypatch.setattr(folded_folder, "write_folded", naive)
    with pytest.raises(nc.CheckFailed) as caught:  # in a process of its own
        fold_it(sources["wav2vec2"], tmp_path / "out", "wav2vec2")
    failed = [check.name for check in caught.value.report.failed_checks]
    assert "reloaded: every weight of the folder is its own" in failed
    assert "reloaded: output.last_hidden_state" in failed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.usefixtures("in_this_process")
def test_plain_weights_where_the_class_takes_none(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    original = nc.load(f"transformers:{sources[name]}")
    report = fold_it(sources[name], out, name)
    assert report.passed
    kind = type(original).__name__
    assert f'load_folded("{kind}"' in report.facts["load with"]
    files = {"config.json", "folded.json", WEIGHTS, "normconv.json", "preprocessor_config.json"}
    assert {entry.name for entry in out.iterdir()} == files
    with pytest.raises(OSError, match=r"model\.safetensors"):  # not silently something else
        type(original).from_pretrained(out)
    model = nc.load_folded(type(original), out)
    assert not model.training
    assert not [key for key in model.state_dict() if "original" in key]
    assert_same(model, original, name)
    folded = nc.fold(original).model.state_dict()
    assert all(torch.equal(value, folded[key]) for key, value in model.state_dict().items())
    assert_same(nc.load(f"transformers:{out}"), original, name)  # every command reads it


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.usefixtures("in_this_process")
def test_the_library_s_layout(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    original = nc.load(f"transformers:{sources[name]}")
    report = fold_it(sources[name], out, name, layout="library")
    assert "from_pretrained" in report.facts["load with"]
    with quiet_transformers():
        again, info = type(original).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(again, original, name)
    plain = nc.fold(original).model.state_dict()
    state = again.state_dict()
    directions = [key for key in state if key.endswith(".original1")]
    assert len(directions) == (len(report.sites) if name in NORMED else 0)
    assert report.sites
    for key in directions:
        weight = plain[key.replace(".parametrizations.weight.original1", ".weight")]
        assert torch.equal(state[key], weight)  # v is the plain weight itself


@pytest.mark.usefixtures("in_this_process")
def test_from_folded_back_to_the_library_s(sources: dict[str, Path], tmp_path: Path) -> None:
    fold_it(sources["encodec"], tmp_path / "folded", "encodec")
    fold_it(tmp_path / "folded", tmp_path / "again", "encodec")  # a second fold changes nothing
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("folded", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], value) for key, value in first.items())
    fold_it(tmp_path / "folded", tmp_path / "library", "encodec", layout="library")
    again = nc.load(f"transformers:{tmp_path / 'library'}")
    assert_same(again, nc.load(f"transformers:{sources['encodec']}"), "encodec")
    assert not (tmp_path / "library" / "folded.json").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_class_that_takes_plain_weights(sources: dict[str, Path], tmp_path: Path) -> None:
    report = fold_it(sources["hifigan"], tmp_path / "out", "hifigan")
    assert "from_pretrained" in report.facts["load with"]
    assert report.facts["folded"] == {}
    assert not (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize("form", ["parametrization", "hook", "bin"])
@pytest.mark.usefixtures("in_this_process")
def test_weight_norm_put_on_before_saving(form: str, tmp_path: Path) -> None:
    """A vocoder saved with its weight norm on: `from_pretrained` alone would fill in random numbers."""
    model = tiny("hifigan")
    model.apply_weight_norm()
    tiny_speech.spread_gains_(model)
    source = save_tiny("hifigan", tmp_path / "source", model)
    if form != "parametrization":
        state = {
            key.replace(".parametrizations.weight.original0", ".weight_g").replace(
                ".parametrizations.weight.original1", ".weight_v"
            ): value
            for key, value in model.state_dict().items()
        }
        (source / "model.safetensors").unlink()
        if form == "bin":
            torch.save(state, source / "pytorch_model.bin")
        else:
            save_file(state, source / "model.safetensors", {"format": "pt"})
    loaded = nc.load(f"transformers:{source}")
    assert_same(loaded, model, "hifigan")
    report = fold_it(source, tmp_path / "out", "hifigan")
    assert sum(report.facts["folded"].values()) > 3
    with quiet_transformers():
        again = transformers.SpeechT5HifiGan.from_pretrained(tmp_path / "out")
    assert_same(again, model, "hifigan")


def test_a_gain_that_does_not_fit_its_direction(tmp_path: Path) -> None:
    model = tiny("hifigan")
    model.apply_weight_norm()
    source = save_tiny("hifigan", tmp_path / "source", model)
    tensors = load_file(source / "model.safetensors")
    name = "conv_pre.parametrizations.weight.original0"
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(nc.LoadError, match=r"conv_pre.*original0"):
        nc.load(f"transformers:{source}")


@pytest.mark.usefixtures("in_this_process")
def test_shards_and_half_precision(tmp_path: Path) -> None:
    model = tiny("wav2vec2").bfloat16()
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source", max_shard_size="4KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    given = {"input_values": inputs_of("wav2vec2")["input_values"].bfloat16()}
    source, out = tmp_path / "source", tmp_path / "out"
    loaded = nc.load(f"transformers:{source}")
    fold_folder(loaded, source, out, (), given)
    again = nc.load_folded("Wav2Vec2Model", out)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert not list(out.glob("*index.json"))


@pytest.mark.usefixtures("in_this_process")
def test_a_row_of_zeros_in_the_library_s_layout(tmp_path: Path) -> None:
    """torch's weight norm is NaN where v = 0; the folder's v has a direction there."""
    model = tiny("encodec")
    norm = model.encoder.layers[0].conv.parametrizations.weight
    with torch.no_grad():
        norm.original0[1] = 0.0
    source = save_tiny("encodec", tmp_path / "source", model)
    fold_it(source, tmp_path / "out", "encodec", layout="library")
    again = nc.load(f"transformers:{tmp_path / 'out'}")
    chain = again.encoder.layers[0].conv.parametrizations.weight  # type: ignore[union-attr,operator,index]
    assert chain.original0[1] == 0
    assert chain.original1[1].norm() > 0
    assert_same(again, model, "encodec")


def test_files_in_the_way(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for place in (out, out / "notes.txt", sources["hifigan"], sources["hifigan"] / "inner"):
        with pytest.raises(nc.UsageError, match="--out"):
            fold_it(sources["hifigan"], place, "hifigan")
    assert [entry.name for entry in out.iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("in_this_process")
def test_all_but_the_weights_is_copied(tmp_path: Path) -> None:
    source = save_tiny("hifigan", tmp_path / "source")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.json").write_text("{}")
    (source / "checkpoint-5").mkdir()
    (source / "checkpoint-5" / "model.safetensors").write_bytes(b"old")
    (source / "tf_model.h5").write_bytes(b"other weights")
    (source / ".git").mkdir()
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is no obstacle
    report = fold_it(source, out, "hifigan")
    assert (out / "tokenizer" / "vocab.json").read_text() == "{}"
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not {"checkpoint-5", "tf_model.h5", ".git"} & {entry.name for entry in out.iterdir()}
    assert any("checkpoint-5/" in note and "tf_model.h5" in note for note in report.notes)
    assert json.loads((out / "normconv.json").read_text())["passed"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_process_that_dies_is_a_failed_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho out of memory >&2; exit 9\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert reload_folder(tmp_path, (), {}).failure == "out of memory"


class TestLoadFolded:
    @pytest.fixture
    def folder(self, sources: dict[str, Path], tmp_path: Path, in_this_process: None) -> Path:
        fold_it(sources["wav2vec2"], tmp_path / "out", "wav2vec2")
        return tmp_path / "out"

    def test_it_is_strict_and_names_the_keys(self, folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = "encoder.pos_conv_embed.conv.weight"
        for change, word in (
            ({name: None}, "does not"),
            ({name: tensors[name][:1].clone()}, r"\(1, "),
            ({"stranger": torch.ones(1)}, "stranger"),
        ):
            changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
            save_file(changed, folder / WEIGHTS)
            with pytest.raises(nc.LoadError, match=word):
                nc.load_folded("Wav2Vec2Model", folder)

    def test_wrong_class_and_damage(self, folder: Path, sources: dict[str, Path]) -> None:
        with pytest.raises(nc.LoadError, match="Wav2Vec2Model, not of EncodecModel"):
            nc.load_folded("EncodecModel", folder)
        with pytest.raises(nc.UsageError, match="no class of that name"):
            nc.load_folded("Wav2Vec3Model", folder)
        with pytest.raises(nc.UsageError, match="no model class"):
            nc.load_folded(torch.nn.Linear, folder)
        with pytest.raises(nc.UsageError, match="from_pretrained"):
            nc.load_folded("Wav2Vec2Model", sources["wav2vec2"])
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
        with pytest.raises(nc.LoadError, match="damaged"):
            nc.load_folded("Wav2Vec2Model", folder)
        (folder / "folded.json").write_text("{")
        with pytest.raises(nc.LoadError, match="damaged"):
            nc.load_folded("Wav2Vec2Model", folder)

    def test_it_leaves_the_random_state_alone(self, folder: Path) -> None:
        before = torch.get_rng_state()
        nc.load_folded("Wav2Vec2Model", folder)
        assert torch.equal(torch.get_rng_state(), before)
