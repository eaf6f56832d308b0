"""Whole-module files: real ones load, hostile ones are refused and nothing of them runs."""

from __future__ import annotations

import functools
import io
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normconv.errors import LoadError, UsageError
from normconv.layers import MeanOnlyBatchNorm, weight_norm_, weight_standardize_
from normconv.layers.reparametrised import rebuild_layer
from normconv.sources import load, open_source, save

timm = pytest.importorskip("timm")
tv = pytest.importorskip("torchvision.models")
transformers = pytest.importorskip("transformers")


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return (
        type(a) is type(b)
        and left.keys() == right.keys()
        and all(v.is_meta or torch.equal(v, right[k]) for k, v in left.items())
    )


def tiny_transformers(name: str) -> nn.Module:
    one = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"hidden_size": 16, "vocab_size": 50, **one}
    make = {
        "resnet": lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ),
        "convnext": lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**text)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=16, **one)
        ),
    }
    return make[name]()


TORCHVISION = (
    "resnet18 mobilenet_v3_small densenet121 swin_t convnext_tiny efficientnet_b0 vit_b_16"
)
TIMM = (
    "resnet50 tf_efficientnet_b0 efficientnet_b0 resnetv2_50 regnety_016 repvgg_a0 "
    "hrnet_w18_small convnext_tiny swin_tiny_patch4_window7_224 vit_tiny_patch16_224 densenet121"
)


@pytest.mark.parametrize("name", TORCHVISION.split())
def test_torchvision_models_round_trip(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tv.get_model(name, weights=None)
    torch.save(model, tmp_path / "m.pt")
    assert same(model, load(tmp_path / "m.pt"))


def test_googlenet_round_trips(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tv.googlenet(weights=None, init_weights=False)
    torch.save(model, tmp_path / "m.pt")
    assert same(model, load(tmp_path / "m.pt"))


def test_a_detector_round_trips(tmp_path: Path) -> None:
    model = tv.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    torch.save(model, tmp_path / "m.pt")
    assert same(model, load(tmp_path / "m.pt"))


@pytest.mark.parametrize("name", TIMM.split())
def test_timm_models_round_trip(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    torch.save(model, tmp_path / "m.pt")
    assert same(model, load(tmp_path / "m.pt"))


@pytest.mark.parametrize("name", ["resnet", "convnext", "bert", "llama", "vit"])
def test_transformers_models_round_trip(name: str, tmp_path: Path) -> None:
    model = tiny_transformers(name)
    torch.save(model, tmp_path / "m.pt")
    assert same(model, load(tmp_path / "m.pt"))


def old_norms() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            nn.utils.weight_norm(nn.Conv2d(2, 2, 1)), nn.utils.spectral_norm(nn.Linear(2, 2))
        )


def with_attributes() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.act = torch.relu  # type: ignore[assignment]
    model.activation = nn.functional.gelu  # type: ignore[assignment]
    model.norm_layer = functools.partial(nn.BatchNorm2d, eps=1e-3)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("make", [old_norms, with_attributes, lambda: nn.LSTM(2, 2)])
def test_hooks_functions_and_partials_round_trip(make, tmp_path: Path) -> None:
    model = make()
    torch.save(model, tmp_path / "m.pt")
    back = load(tmp_path / "m.pt")
    assert same(model, back)
    if hasattr(model, "act"):
        assert back.act is torch.relu
        assert back.norm_layer.keywords == {"eps": 1e-3}


@pytest.mark.parametrize("whole", [True, False])
def test_files_of_the_old_format_load(whole: bool, tmp_path: Path) -> None:
    model = tv.resnet18(weights=None)
    path = tmp_path / "m.pth"
    torch.save(model if whole else model.state_dict(), path, _use_new_zipfile_serialization=False)
    back = load(path, model=None if whole else tv.resnet18)
    assert same(model, back)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), back.eval()(x))


def test_a_converted_layer_round_trips(tmp_path: Path) -> None:
    layer = rebuild_layer("wn", nn.Linear, wn_state(nn.Linear(3, 2)))
    torch.save(nn.Sequential(layer), tmp_path / "m.pt")
    back = load(tmp_path / "m.pt")
    assert type(back[0]) is type(layer)


@pytest.mark.parametrize("kind", ["wn", "ws", "mean-only"])
def test_our_layers_load_in_a_whole_module(kind: str, tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 4, 3)
    layers = {
        "wn": lambda: [weight_norm_(conv)],
        "ws": lambda: [weight_standardize_(conv, dialect="qiao")],
        "mean-only": lambda: [weight_norm_(conv), MeanOnlyBatchNorm(4, momentum=None)],
    }
    model = nn.Sequential(*layers[kind]())
    x = torch.randn(2, 3, 5, 5)
    model(x)
    save(model, tmp_path / "m.pt")
    back = load(tmp_path / "m.pt")
    assert [type(layer) for layer in back] == [type(layer) for layer in model]
    assert repr(back) == repr(model)
    assert torch.equal(back.eval()(x), model.eval()(x))


def wn_state(linear: nn.Linear) -> dict[str, object]:
    state = dict(vars(linear))
    parameters = dict(state["_parameters"])
    weight = parameters.pop("weight").detach()
    parameters["weight_g"] = nn.Parameter(weight.norm(dim=1))
    parameters["weight_v"] = nn.Parameter(weight)
    return state | {"_parameters": parameters}


def test_a_data_parallel_model_is_unwrapped(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(nn.Linear(2, 2)), tmp_path / "m.pt")
    loaded = open_source(tmp_path / "m.pt")
    assert isinstance(loaded.model, nn.Linear)
    assert any("DataParallel" in note for note in loaded.notes)


def test_torchs_own_list_is_left_as_it_was(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.pt")
    with torch.serialization.safe_globals([nn.Linear]):
        before = set(torch.serialization.get_safe_globals())
        load(tmp_path / "m.pt")
        assert set(torch.serialization.get_safe_globals()) == before


# Hostile files. Each would create the sentinel if any of it ran.


def torch_zip(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def command(sentinel: Path) -> str:
    return f"touch {sentinel}"


LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
MADE = LINEAR + b")\x81"


def module_with(key: str, value: bytes) -> bytes:
    return b"\x80\x02" + MADE + b"}" + text(key) + value + b"sb."


def call(name: bytes, *args: bytes) -> bytes:
    return name + b"(" + b"".join(args) + b"tR"


def attacks(word: str) -> dict[str, tuple[bytes, str]]:
    system = b"cos\nsystem\n"
    bad = call(system, text(word))
    module, name = text("os"), text("system")
    return {
        "reduce": (b"\x80\x02" + bad + b".", "os.system"),
        "posix": (b"\x80\x02" + call(b"cposix\nsystem\n", text(word)) + b".", "posix.system"),
        "in an attribute": (module_with("note", bad), "os.system"),
        "in a state dict": (b"\x80\x02}" + text("fc.weight") + bad + b"s.", "os.system"),
        "eval": (
            b"\x80\x02" + call(b"cbuiltins\neval\n", text(f"open({word!r},'w')")) + b".",
            "builtins.eval",
        ),
        "python 2 names": (
            b"\x80\x02" + call(b"c__builtin__\neval\n", text("1")) + b".",
            "builtins.eval",
        ),
        "stack global": (
            b"\x80\x04" + module + name + b"\x93" + text(word) + b"\x85R.",
            "os.system",
        ),
        "stack global from the memo": (
            b"\x80\x04"
            + name
            + b"\x94"
            + module
            + b"\x9400"
            + b"h\x01h\x00\x93"
            + text(word)
            + b"\x85R.",
            "os.system",
        ),
        "memo overwritten": (
            b"\x80\x02" + LINEAR + b"q\x00" + system + b"q\x000h\x00(" + text(word) + b"tR.",
            "os.system",
        ),
        "computed name": (
            b"\x80\x04" + call(b"ccollections\nOrderedDict\n") + name + b"\x93.",
            "not written in it as text",
        ),
        "inst": (b"\x80\x02(" + text(word) + b"ios\nsystem\n.", "os.system"),
        "obj": (b"\x80\x02(" + system + text(word) + b"o.", "os.system"),
        "extension code": (b"\x80\x02\x82\x01.", "extension code 1"),
        "layer called": (
            b"\x80\x02" + call(LINEAR, b"K\x02", b"K\x02") + b".",
            "calls torch.nn.modules.linear.Linear with arguments",
        ),
        "layer made with arguments": (
            b"\x80\x02" + LINEAR + b"K\x02K\x02\x86\x81.",
            "creates torch.nn.modules.linear.Linear with arguments",
        ),
        "arguments in a list": (b"\x80\x02" + LINEAR + b"]K\x02aR.", "in an unusual way"),
        "layer by obj": (b"\x80\x02(" + LINEAR + b"K\x02K\x02o.", "in an unusual way"),
        "dotted name": (
            b"\x80\x02ctorch.nn\nmodules.linear.Linear\n.",
            "torch.nn.modules.linear.Linear",
        ),
        "module as a name": (b"\x80\x02ctorch.nn.modules\nconv\n.", "torch.nn.modules.conv"),
        "os through torch": (
            b"\x80\x02" + call(b"ctorch.serialization\nos.system\n", text(word)) + b".",
            "torch.serialization.os.system",
        ),
        "os through torch.nn": (
            b"\x80\x02" + call(b"ctorch.nn.modules.module\nfunctools.os\n") + b".",
            "torch.nn.modules.module.functools.os",
        ),
        "getattr": (
            b"\x80\x02"
            + call(b"cbuiltins\ngetattr\n", b"ctorch.nn.modules.linear\nLinear\n", text("__init__"))
            + b".",
            "calls builtins.getattr",
        ),
        "result called": (
            b"\x80\x02" + call(call(b"cfunctools\npartial\n", LINEAR), b"K\x02", b"K\x02") + b".",
            "calls something that it made itself",
        ),
        "partial over os": (
            b"\x80\x02" + call(b"cfunctools\npartial\n", system) + b".",
            "os.system",
        ),
        "tensor rebuilt by a layer": (
            b"\x80\x02"
            + call(
                b"ctorch._tensor\n_rebuild_from_type_v2\n",
                LINEAR,
                b"ctorch\nTensor\n",
                b"K\x02K\x02\x86",
                b"}",
            )
            + b".",
            "calls torch._tensor._rebuild_from_type_v2 with arguments",
        ),
        "hidden pickle": (
            b"\x80\x02" + call(b"ctorch.storage\n_load_from_bytes\n", text("x")) + b".",
            "another pickle hidden",
        ),
        "forward replaced": (
            module_with("forward", call(b"cfunctools\npartial\n", LINEAR)),
            "replaces the method forward",
        ),
        "foreign hook": (
            module_with("_forward_hooks", b"}K\x00ctorch.nn.functional\nrelu\ns"),
            "foreign hook",
        ),
        "class set": (module_with("__class__", LINEAR), "sets __class__"),
        "state no dict": (
            b"\x80\x02" + MADE + b"N}" + text("a") + b"K\x01s\x86b.",
            "a state that is no dict",
        ),
        "state for a class": (b"\x80\x02" + LINEAR + b"}b.", "gives state to something"),
        "odd numpy dtype": (
            b"\x80\x02" + call(b"cnumpy\ndtype\n", text("O8"), b"\x89", b"\x88") + b".",
            "calls numpy.dtype",
        ),
        "odd codec": (
            b"\x80\x02" + call(b"c_codecs\nencode\n", text("a"), text("zip")) + b".",
            "calls _codecs.encode",
        ),
        "weird reference": (b"\x80\x02" + text("a") + b"Q.", "no tensor"),
        "graph module": (
            b"\x80\x02ctorch.fx.graph_module\nreduce_graph_module\n}\x85R.",
            "torch.fx.graph_module.reduce_graph_module",
        ),
        "graph module class": (
            b"\x80\x02ctorch.fx.graph_module\nGraphModule\n)\x81}b.",
            "GraphModule",
        ),
        "script module": (b"\x80\x02ctorch.jit._script\nScriptModule\n)\x81.", "torch.jit"),
        "distributed": (
            b"\x80\x02ctorch.nn.parallel.distributed\nDistributedDataParallel\n)\x81}b.",
            "DistributedDataParallel",
        ),
        "hub": (b"\x80\x02" + call(b"ctorch.hub\nload\n", text("x")) + b".", "torch.hub.load"),
        "timm factory": (
            b"\x80\x02" + call(b"ctimm.models._factory\ncreate_model\n", text("resnet18")) + b".",
            "timm.models._factory.create_model",
        ),
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_a_hostile_file_is_refused_and_nothing_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = tmp_path / "ran"
    data, said = attacks(command(sentinel))[name]
    path = torch_zip(tmp_path / "m.pt", data)
    monkeypatch.chdir(tmp_path)
    for model in (None, lambda: nn.Linear(2, 2)):
        with pytest.raises(LoadError) as caught:
            load(path, model=model)
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt"]


def test_the_attack_itself_works(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    data, _ = attacks(command(sentinel))["reduce"]
    pickle.loads(data)  # what a plain unpickler would do
    assert sentinel.exists()


def test_everything_is_refused_at_once(tmp_path: Path) -> None:
    data = b"\x80\x02(cos\nsystem\ncmypkg.net\nNet\nctorch.hub\nload\nc__main__\nNet\nt."
    with pytest.raises(LoadError) as caught:
        load(torch_zip(tmp_path / "m.pt", data))
    assert len(caught.value.problems) == 4
    shown = str(caught.value)
    assert "--trust mypkg" in shown
    assert "--trust train.py" in shown
    assert "--trust os" not in shown


def test_an_old_file_with_a_hostile_pickle_is_refused(tmp_path: Path) -> None:
    sentinel, buffer = tmp_path / "ran", io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    good = buffer.getvalue()
    bad = b"\x80\x02" + call(b"cos\nsystem\n", text(command(sentinel))) + b"."
    stream, ends = io.BytesIO(good), [0]
    for _ in range(5):
        for _op in __import__("pickletools").genops(stream):
            pass
        ends.append(stream.tell())
    for index in range(1, 5):
        data = good[: ends[index]] + bad + good[ends[index + 1] :]
        (tmp_path / "m.pt").write_bytes(data)
        with pytest.raises(LoadError, match=r"os\.system"):
            load(tmp_path / "m.pt", model=lambda: nn.Linear(1, 1))
    assert not sentinel.exists()


def test_another_pickle_protocol_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt", pickle_protocol=4)
    with pytest.raises(LoadError, match="pickle_protocol"):
        load(tmp_path / "m.pt")


# Files that are no model.


def script_module(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))


def exported(path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, path)


def truncated(path: Path) -> None:
    torch.save(nn.Linear(50, 50), path)
    path.write_bytes(path.read_bytes()[:3000])


def old_truncated(path: Path) -> None:
    torch.save(nn.Linear(50, 50), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (script_module, "TorchScript"),
        (exported, "exported program"),
        (truncated, "truncated"),
        (old_truncated, "damaged"),
        (lambda p: p.mkdir(), "folder"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("hello\n"), "is text"),
        (lambda p: p.write_text("<!DOCTYPE html><html></html>"), "HTML"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "plain pickle"),
        (lambda p: p.write_bytes(b"\x80\x02X\xff"), "damaged"),
        (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x00\xff"), "ONNX"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "no model file"),
        (lambda p: torch.save([1, 2], p), "an object of class list"),
        (lambda p: torch.save(nn.Linear(2, 2).state_dict(), p), "--model"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_with_a_reason(make, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    make(path)
    with pytest.raises(LoadError) as caught:
        load(path)
    assert said in str(caught.value)
    assert "model.pt" in str(caught.value)


def test_a_missing_file_names_close_ones(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(UsageError, match=r"did you mean model\.pt"):
        load(tmp_path / "modle.pt")


def test_files_load_after_torch_compile_has_wrapped_setstate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nn.Module.__setstate__

    def wrapped(self: nn.Module, state: Any) -> None:
        plain(self, state)

    wrapped.__module__ = "torch._dynamo.mutation_guard"
    monkeypatch.setattr(nn.Module, "__setstate__", wrapped)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), tmp_path / "m.pt")
    assert isinstance(load(tmp_path / "m.pt"), nn.Sequential)
