"""`load`: from a file or a spec to a model, safely."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from normconv.errors import LoadError, Problem, UsageError
from normconv.files import sha256_of
from normconv.folding import rebuild
from normconv.sources.checkpoints import choose, load_strictly, modules_in
from normconv.sources.recognise import FileKind, recognise
from normconv.sources.safe_load import safe_load
from normconv.sources.saving import HISTORY, SHARED
from normconv.sources.specs import build, is_spec
from normconv.sources.tensor_file import json_of, read_safetensors
from normconv.sources.trust import Trust

__all__ = ["Loaded", "ModelLike", "load", "open_source"]

ModelLike = str | Callable[..., Any] | nn.Module


class Loaded(NamedTuple):
    """A model, where it came from, and what the user should know of that."""

    model: nn.Module
    facts: dict[str, Any]
    notes: tuple[str, ...]


def load(
    source: str | os.PathLike[str],
    *,
    model: ModelLike | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    trust: Sequence[str] = (),
    random_weights: bool = False,
) -> nn.Module:
    """Load a model from a file or a spec without running code that the file brings.

    Args:
        source: a whole-module ``.pt``; a checkpoint or ``.safetensors``, with `model`; or a spec:
            ``timm:NAME``, ``torchvision:NAME``, ``transformers:FOLDER``, ``pkg.mod:factory``.
        model: for a checkpoint, the model it is for: a spec, a factory, or a module (copied).
        model_args: keyword arguments for the model.
        key: where in the checkpoint the weights stand, dotted.
        trust: packages, folders or scripts whose classes the file may name and run.
        random_weights: take a timm or torchvision model as it is initialised.

    Raises:
        UsageError: there is no such file or name, or an argument is wrong.
        LoadError: the file is no model, is damaged, does not fit, or names what is not trusted.
        MissingDependency: a library that the model needs is not installed.
    """
    return open_source(
        source,
        model=model,
        model_args=model_args,
        key=key,
        trust=trust,
        random_weights=random_weights,
    ).model


def open_source(
    source: str | os.PathLike[str],
    *,
    model: ModelLike | None = None,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    trust: Sequence[str] = (),
    random_weights: bool = False,
) -> Loaded:
    """Load as `load` does, and say what was found.

    Args:
        source: as for `load`, and so the others.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(Problem("source", f"is a {type(source).__name__}, not a path or a spec"))
    text = os.fspath(source)
    if is_spec(text) and not Path(text).exists():
        return _from_spec(text, model, model_args, key, random_weights)
    vouched = Trust.parse(trust)
    path = Path(text)
    kind = recognise(path)
    facts: dict[str, Any] = {"source": text, "sha256": sha256_of(path)}
    if trust:
        facts["trusted"] = list(trust)
    if kind is FileKind.SAFETENSORS:
        document, metadata = read_safetensors(path)
    else:
        document, metadata = safe_load(path, kind, vouched, mmap=model is not None), {}
    if model is None:
        return _whole_module(document, path, key, model_args, facts)
    return _with_weights(document, metadata, path, model, model_args, key, facts)


def _from_spec(
    spec: str,
    model: ModelLike | None,
    model_args: Mapping[str, Any] | None,
    key: str | None,
    random_weights: bool,
) -> Loaded:
    wrong = {"--model": model, "--key": key}
    if problems := [
        Problem(option, f"goes with a checkpoint, and {spec} is a model spec")
        for option, value in wrong.items()
        if value is not None
    ]:
        raise UsageError(problems)
    if spec.startswith(("timm:", "torchvision:")) and not random_weights:
        what = "is a model without weights (nothing is downloaded here)"
        way_out = f"pass a checkpoint with --model {spec}, or --random-weights"
        raise UsageError(Problem(spec, what, way_out))
    made = build(spec, model_args, keep_weights=True)
    if not made.weighted and not random_weights:
        what = "holds a config.json and no weights"
        raise UsageError(Problem(spec, what, "pass a checkpoint with --model, or --random-weights"))
    facts = {"source": spec, "class": _class_name(made.model), "weights": "its own"}
    notes: tuple[str, ...] = ()
    if not made.weighted:
        facts["weights"] = "random"
        notes = (f"{spec} has random weights: its outputs mean nothing",)
    return Loaded(made.model, facts, notes)


def _whole_module(
    document: Any,
    path: Path,
    key: str | None,
    model_args: Mapping[str, Any] | None,
    facts: dict[str, Any],
) -> Loaded:
    where = str(path)
    if model_args:
        raise UsageError(Problem("--model-arg", "goes with --model"))
    found = modules_in(document)
    if key is not None:
        found = {name: module for name, module in found.items() if name == key}
    if not found:
        if isinstance(document, Mapping):
            what = "holds weights or other data, not a whole model"
            ways = "timm:NAME, torchvision:NAME or pkg.mod:factory"
            way_out = f"say which model they are for: --model {ways}"
            raise LoadError(Problem(where, what, way_out))
        what = f"holds an object of class {type(document).__name__}, not a model"
        raise LoadError(Problem(where, what, "save the model with torch.save"))
    if len(found) > 1:
        names = ", ".join(found)
        raise LoadError(Problem(where, f"holds several models: {names}", "choose with --key"))
    ((name, module),) = found.items()
    notes = []
    if name:
        facts["key"] = name
        notes.append(f"took the model under {name!r}")
    if isinstance(module, nn.DataParallel):
        module = module.module
        notes.append("took the model out of its DataParallel")
    facts["class"] = _class_name(module)
    return Loaded(module, facts, tuple(notes))


def _with_weights(
    document: Any,
    metadata: Mapping[str, str],
    path: Path,
    model: ModelLike,
    model_args: Mapping[str, Any] | None,
    key: str | None,
    facts: dict[str, Any],
) -> Loaded:
    where = str(path)
    made = build(model, model_args, keep_weights=False)
    target, notes = made.model, []
    if history := json_of(metadata, HISTORY, where, list):
        target = rebuild(target, history)
        facts["rebuilt"] = len(history)
        notes.append(f"rebuilt the converted structure from {len(history)} recorded steps")
    if isinstance(document, nn.Module):
        document = document.state_dict()
        notes.append("took the weights of the whole model in the file")
    found, choice = choose(document, target, key, where)
    shared = json_of(metadata, SHARED, where, dict) or dict(metadata)
    marks = load_strictly(target, found.tensors, where, shared)
    facts |= {"model": made.origin, "class": _class_name(target)}
    if found.key:
        facts["key"] = found.key
    if choice:
        notes.append(choice)
    if marks:
        facts["prefixes"] = list(marks)
        notes.append(f"took {', '.join(repr(mark) for mark in marks)} out of the weights' names")
    if cast := _other_dtype(found.tensors, target):
        notes.append(cast)
    return Loaded(target, facts, tuple(notes))


def _other_dtype(tensors: Mapping[str, Any], model: nn.Module) -> str:
    """Say so where the file's numbers are rounded or widened to the model's dtype."""
    given = {v.dtype for v in tensors.values() if isinstance(v, Tensor) and v.is_floating_point()}
    wanted = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not given or not wanted or given <= wanted:
        return ""
    names = [" and ".join(sorted(str(d)[6:] for d in dtypes)) for dtypes in (given, wanted)]
    return f"the file's weights are {names[0]}, the model's {names[1]}"


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
