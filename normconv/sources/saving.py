"""`save`: a whole module, or its tensors with the record of what was done to it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from normconv.errors import LoadError, Problem, UsageError
from normconv.files import atomic_path
from normconv.plan.history import history_of

__all__ = ["HISTORY", "SHARED", "VERSION", "save"]

VERSION = "normconv.version"
HISTORY = "normconv.history"
SHARED = "normconv.shared"

_WHOLE = (".pt", ".pth")
_TENSORS = (".safetensors",)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model so that `load` reads it: all or nothing.

    Args:
        model: the model.
        path: ``.pt`` or ``.pth`` keeps the whole module; ``.safetensors`` keeps the tensors, and
            the record from which `load` with `model=` rebuilds a converted model.

    Raises:
        UsageError: for another ending.
        LoadError: when the model cannot be pickled, or has state that is no tensor.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _WHOLE:
        _save_whole(model, path)
    elif suffix in _TENSORS:
        _save_tensors(model, path)
    else:
        what = f"{suffix or 'no ending'} is no ending that a model is saved with"
        raise UsageError(Problem(str(path), what, "use .pt, .pth or .safetensors"))


def _save_whole(model: nn.Module, path: Path) -> None:
    try:
        with atomic_path(path) as temporary:
            torch.save(model, temporary)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, RecursionError) as error:
        problems = _unpicklable(model) or [Problem(str(path), f"cannot be pickled ({error})")]
        raise LoadError([*problems, _USE_TENSORS]) from None


_USE_TENSORS = Problem(
    "", "the model cannot be saved whole", "save it as .safetensors and load it with --model"
)


def _unpicklable(model: nn.Module) -> list[Problem]:
    """Name the classes and attributes that pickle does not take."""
    problems = []
    for name, module in model.named_modules():
        where = name or type(module).__name__
        kind = type(module)
        if "<locals>" in kind.__qualname__:
            what = f"its class {kind.__qualname__} is defined inside a function"
            problems.append(Problem(where, what, "define it at the top of a module"))
        elif hasattr(module, "parametrizations"):
            problems.append(Problem(where, "it carries torch parametrizations", "fold it first"))
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                pickle.dumps(value)
            except Exception as error:
                place = f"{name}.{attribute}" if name else attribute
                problems.append(Problem(place, f"cannot be pickled ({error})"))
    return problems


def _save_tensors(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    import normconv

    wrapped = getattr(model, "module", None)
    if isinstance(wrapped, nn.Module) and history_of(wrapped) and not history_of(model):
        what = "it wraps a converted model, whose plan would not go with the file"
        raise UsageError(Problem(type(model).__name__, what, "save its .module"))
    tensors, shared = _tensors_of(model)
    metadata = {VERSION: normconv.__version__, HISTORY: json.dumps(history_of(model))}
    if shared:
        metadata[SHARED] = json.dumps(shared)
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata)


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, in memory of its own, and the names that share another's."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    problems = []
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            problems.append(Problem(name, f"is a {type(value).__name__}, not a tensor"))
            continue
        if value.is_meta or torch.nn.parameter.is_lazy(value):
            problems.append(Problem(name, "has no numbers (meta or uninitialised)"))
            continue
        storage = value.untyped_storage().data_ptr()
        place = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in owners:
            shared[name] = owners[place]
            continue
        owners[place] = name
        # A view into memory that another tensor is saved from would be refused.
        whole = value.numel() * value.element_size() == value.untyped_storage().nbytes()
        alone = whole and storage not in storages and value.is_contiguous()
        kept[name] = value if alone else value.contiguous().clone()
        storages.add(storage)
    if problems:
        raise LoadError(problems)
    return kept, shared
