"""Folders that transformers' `save_pretrained` wrote, or `fold` after it. Nothing is downloaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normconv.errors import LoadError, Problem, UsageError
from normconv.sources.folded import RECORD, fresh_folded, load_folded
from normconv.sources.recognise import recognise
from normconv.sources.safe_load import safe_load
from normconv.sources.tensor_file import read_safetensors
from normconv.sources.trust import Trust

__all__ = ["class_of_folder", "open_folder", "quiet_transformers"]


def class_of_folder(folder: Path) -> Any:
    """Return the class of transformers that a folder's config.json names.

    Raises:
        UsageError: it is no such folder.
        LoadError: no such class.
    """
    where = f"transformers:{folder}"
    if not (folder / "config.json").is_file():
        what = "is no folder with a config.json (models are not downloaded here)"
        raise UsageError(Problem(where, what, "pass a folder that save_pretrained wrote"))
    import transformers

    try:
        architectures = json.loads((folder / "config.json").read_text("utf-8"))["architectures"]
        return getattr(transformers, architectures[0])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = (
            f"its config.json names no architecture that is known ({type(error).__name__}: {error})"
        )
        raise LoadError(Problem(where, what)) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and progress bars back; what matters of them is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def open_folder(
    folder: Path, args: Mapping[str, Any], keep_weights: bool
) -> tuple[nn.Module, bool]:
    """Make the model of a folder, and say whether it has the folder's weights.

    A weight that the file has as gain and direction and the class as a plain parameter (one that was
    saved with `apply_weight_norm` on) is weight-normed in the model too.

    Args:
        folder: the folder.
        args: keyword arguments for `from_pretrained`.
        keep_weights: load the weights; False makes what they would be loaded into.

    Raises:
        UsageError: it is no such folder.
        LoadError: it does not load, or its weights do not fit the class.
    """
    where = f"transformers:{folder}"
    kind = class_of_folder(folder)
    if (folder / RECORD).is_file():
        if args:
            raise UsageError(Problem("--model-arg", f"{where} is a folded folder and takes none"))
        model = load_folded(kind, folder) if keep_weights else fresh_folded(kind, folder)
        return model, keep_weights
    import transformers

    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    try:
        with quiet_transformers():
            if weights and keep_weights:
                model, info = kind.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, **args
                )
            else:
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                model, info = kind(config, **args), {}
    except Exception as error:  # transformers raises every kind
        what = f"does not load ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise LoadError(Problem(where, what)) from None
    if missing := set(info.get("missing_keys") or ()):
        missing -= _norm_afterwards_(model, missing, weights)
    if missing:
        what = f"its weights lack {len(missing)} names: {', '.join(sorted(missing)[:5])}"
        raise LoadError(Problem(where, what))
    return model, bool(weights) and keep_weights


def _norm_afterwards_(
    model: nn.Module, missing: Collection[str], files: Iterable[Path]
) -> set[str]:
    """Weight-norm the tensors that the files hold as g and v; return their plain names."""
    pairs = {name: forms for name in missing if (forms := _pairs(name))}
    wanted = {key for forms in pairs.values() for form in forms for key in form}
    found: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found |= read_safetensors(file, wanted)[0]
        else:
            document = safe_load(file, recognise(file), Trust())
            found |= {name: document[name] for name in wanted & document.keys()}
    done = set()
    for name, forms in pairs.items():
        for g_name, v_name in forms:
            if g_name in found and v_name in found:
                prefix, _, tensor = name.rpartition(".")
                module = model.get_submodule(prefix)
                _norm_(module, tensor, found[g_name], found[v_name], g_name)
                done.add(name)
    return done


def _pairs(name: str) -> list[tuple[str, str]]:
    """Name what torch's two weight norms keep in place of a tensor."""
    prefix, _, tensor = name.rpartition(".")
    chain = f"{prefix}.parametrizations.{tensor}"
    return [(f"{chain}.original0", f"{chain}.original1"), (f"{name}_g", f"{name}_v")]


def _norm_(module: nn.Module, tensor: str, g: Tensor, v: Tensor, where: str) -> None:
    plain = getattr(module, tensor)
    # The axis that the norm keeps is the one along which g is long; with none it is the whole tensor.
    long = [axis for axis, length in enumerate(g.shape) if length != 1]
    axis = long[0] if long else -1
    expected = [length if i == axis else 1 for i, length in enumerate(v.shape)]
    if v.shape != plain.shape or (g.dim() and list(g.shape) != expected):
        what = (
            f"is {tuple(g.shape)}, its direction {tuple(v.shape)}, the weight {tuple(plain.shape)}"
        )
        raise LoadError(Problem(where, what))
    parametrizations.weight_norm(module, tensor, axis)
    chain: Any = getattr(module.parametrizations, tensor)
    with torch.no_grad():
        chain.original0.copy_(g.reshape(chain.original0.shape))
        chain.original1.copy_(v)
