"""Folders of plain weights for classes that reparametrise themselves when they are made.

`from_pretrained` of such a class would not find a plain weight under its own name, and would go on with
random numbers. So the weights stand in a file that it does not read, and `load_folded` makes the class,
folds it, and loads them strictly.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normconv.errors import LoadError, MissingDependency, Problem, UsageError
from normconv.folding import fold
from normconv.sources.checkpoints import load_strictly
from normconv.sources.saving import SHARED, save
from normconv.sources.tensor_file import json_of, read_safetensors

__all__ = ["RECORD", "WEIGHTS", "fresh", "fresh_folded", "load_folded", "write_folded"]

RECORD = "folded.json"
WEIGHTS = "folded.safetensors"
_FORMAT = "normconv.folded"


def write_folded(model: nn.Module, folder: Path) -> None:
    """Write the plain weights of a folded transformers model, and what `load_folded` needs to know.

    Args:
        model: folded; its class is recorded.
        folder: is there already; its config.json comes from elsewhere.
    """
    save(model, folder / WEIGHTS)
    record = {"format": _FORMAT, "version": 1, "class": type(model).__name__, "weights": WEIGHTS}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_folded(cls: Any, folder: str | Path) -> Any:
    """Load a folder that `fold` wrote for a class that applies weight norm when it is made.

    The class is made from config.json, its weight norms are folded away, and ``folded.safetensors`` is
    loaded strictly: every name and shape must fit.

    Args:
        cls: the class of transformers (`EncodecModel`), or its name.
        folder: with config.json, folded.json and folded.safetensors.

    Returns:
        The model, in eval mode.

    Raises:
        UsageError: there is no such folder or class.
        LoadError: the folder is of another class, damaged, or its names or shapes do not fit; names
            the keys.
        MissingDependency: transformers is not installed.
    """
    folder = Path(folder)
    kind = _class_named(cls) if isinstance(cls, str) else cls
    if not isinstance(kind, type) or not hasattr(kind, "config_class"):
        what = "is no model class of transformers"
        raise UsageError(Problem(str(cls), what, 'pass e.g. EncodecModel or "EncodecModel"'))
    recorded = _record(folder)
    if recorded not in {base.__name__ for base in kind.__mro__}:
        what = f"holds the weights of {recorded}, not of {kind.__name__}"
        raise LoadError(Problem(str(folder), what, f"pass {recorded}"))
    model: Any = fresh_folded(kind, folder)
    path = folder / WEIGHTS
    tensors, metadata = read_safetensors(path)
    _cast_(model, {name: tensor.dtype for name, tensor in tensors.items()})
    load_strictly(model, tensors, str(path), json_of(metadata, SHARED, str(path), dict))
    if getattr(model, "can_generate", bool)() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def fresh(kind: Any, folder: Path) -> nn.Module:
    """Make a class from the configuration in a folder, with whatever weights it begins with.

    Raises:
        LoadError: when that fails.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            config = kind.config_class.from_pretrained(folder, local_files_only=True)
            made: nn.Module = kind._from_config(config)
            return made
    except Exception as error:  # transformers raises every kind
        what = f"{kind.__name__} cannot be made ({type(error).__name__}: {error})"
        raise LoadError(Problem(str(folder), what)) from None


def fresh_folded(kind: Any, folder: Path) -> nn.Module:
    """Make a class from the configuration in a folder, its reparametrisations folded away."""
    return fold(fresh(kind, folder), share_tensors=True).model


def _class_named(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependency.needs("transformers", "zoo") from None
    found = getattr(transformers, name, None)
    if not isinstance(found, type):
        raise UsageError(Problem(name, "transformers has no class of that name"))
    return found


def _record(folder: Path) -> str:
    """Return the name of the class that a folded folder is of."""
    path = folder / RECORD
    if not path.is_file():
        way_out = "write it with `normconv fold transformers:DIR -o OUT`"
        if (folder / "model.safetensors").is_file():
            way_out = "load it with the class's from_pretrained"
        raise UsageError(Problem(str(folder), f"is no folder with a {RECORD}", way_out))
    try:
        document = json.loads(path.read_text("utf-8"))
        known = (document["format"], document["version"], document["weights"])
        name = str(document["class"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"is damaged ({type(error).__name__}: {error})"
        raise LoadError(Problem(str(path), what)) from None
    if known != (_FORMAT, 1, WEIGHTS):
        raise LoadError(Problem(str(path), f"is of another format, {known}", "update normconv"))
    return name


def _cast_(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give each tensor the dtype that the file has it in, so that loading rounds nothing."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and dtypes.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(dtypes[name])
