"""Models by name: timm:NAME, torchvision:NAME, transformers:FOLDER, package.module:factory.

Nothing is downloaded here, ever.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from normconv.errors import LoadError, MissingDependency, Problem, UsageError
from normconv.sources.trust import importable_from_here

__all__ = ["Built", "build", "is_spec", "named_object", "parse_model_args"]

_LIBRARIES = ("timm", "torchvision", "transformers")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DOWNLOADS = ("pretrained", "weights", "weights_backbone", "checkpoint_path")


class Built(NamedTuple):
    """A model made from a spec; `weighted` says that it brings weights of its own."""

    model: nn.Module
    weighted: bool
    origin: str


def is_spec(text: str) -> bool:
    """Say whether a text is a spec and no path.

    >>> is_spec("timm:resnet50"), is_spec("net:make"), is_spec("model.pt")
    (True, True, False)
    """
    library, colon, name = text.partition(":")
    return bool(colon and name and library in _LIBRARIES) or bool(_FACTORY.fullmatch(text))


def parse_model_args(words: Iterable[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` words; a value that is no Python literal is text.

    Raises:
        UsageError: for a word without ``=`` or with a name that is none.

    >>> parse_model_args(["num_classes=10", "act=relu"])
    {'num_classes': 10, 'act': 'relu'}
    """
    parsed: dict[str, Any] = {}
    problems = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip().isidentifier():
            problems.append(Problem(f"--model-arg {word}", "is not NAME=VALUE"))
            continue
        try:
            parsed[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[name.strip()] = value
    if problems:
        raise UsageError(problems)
    return parsed


def build(
    model: str | Callable[..., Any] | nn.Module,
    model_args: Mapping[str, Any] | None = None,
    *,
    keep_weights: bool,
) -> Built:
    """Make the model that a spec, a factory or an instance stands for.

    Args:
        model: the spec string, a callable that returns a module, or a module (copied).
        model_args: keyword arguments for it.
        keep_weights: the model's own weights will be used (False: others are loaded over them).

    Raises:
        UsageError: the spec, the name or an argument is wrong.
        LoadError: the factory fails or returns no module; the folder holds no model.
        MissingDependency: the library is not installed.
    """
    args = dict(model_args or {})
    if isinstance(model, nn.Module):
        if args:
            raise UsageError(Problem("model_args", "a module that is made already takes none"))
        return Built(copy.deepcopy(model), True, f"a {type(model).__name__} that was passed")
    if not isinstance(model, str):
        name = getattr(model, "__qualname__", repr(model))
        return Built(_call(model, args, name), True, f"factory {name}")
    if not is_spec(model):
        ways = "timm:NAME, torchvision:NAME, transformers:FOLDER or package.module:factory"
        raise UsageError(Problem(f"--model {model}", "is no model spec", f"pass {ways}"))
    library, _, name = model.partition(":")
    if library not in _LIBRARIES:
        return Built(_from_factory(model, args), True, f"factory {model}")
    if importlib.util.find_spec(library) is None:
        raise MissingDependency.needs(library, "zoo")
    if library == "transformers":
        return _from_folder(Path(name), args, keep_weights)
    for word in _DOWNLOADS:
        if args.get(word):
            what = f"{word} would download weights, which is never done here"
            way_out = "download them yourself and pass the file"
            raise UsageError(Problem(f"--model-arg {word}", what, way_out))
        args.pop(word, None)
    make = _from_timm if library == "timm" else _from_torchvision
    return Built(make(name, args, keep_weights), False, model)


def _from_timm(name: str, args: dict[str, Any], keep_weights: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise _unknown_name("timm", name, timm.list_models())
    return _call(timm.create_model, {"model_name": name, "pretrained": False, **args}, name)


def _from_torchvision(name: str, args: dict[str, Any], keep_weights: bool) -> nn.Module:
    from torchvision import models

    names = models.list_models()
    if name.lower() not in names:
        raise _unknown_name("torchvision", name, names)
    builder = models.get_model_builder(name)
    args["weights"] = None
    if "weights_backbone" in inspect.signature(builder).parameters:
        args["weights_backbone"] = None  # the default would download a backbone
    if name.lower() in ("googlenet", "inception_v3"):
        args.setdefault("init_weights", keep_weights)  # slow, and no use below other weights
    model: Any = _call(builder, args, name)
    if preset := _preset_of(name):
        model.image_preset = preset  # timm's models carry theirs too
    return cast(nn.Module, model)


def _preset_of(name: str) -> dict[str, Any]:
    """What images the published weights of a torchvision classifier are for; empty where it is none.

    >>> _preset_of("efficientnet_b1")["resize"], _preset_of("raft_small")
    (255, {})
    """
    from torchvision import models

    try:
        preset: Any = models.get_model_weights(name).DEFAULT.transforms()
        (resize,), (crop,) = preset.resize_size, preset.crop_size
        mean, std = (tuple(map(float, values)) for values in (preset.mean, preset.std))
    except (AttributeError, TypeError, ValueError):  # no weights; or not for classes of images
        return {}
    return {"mean": mean, "std": std, "size": int(crop), "resize": int(resize)}


def _unknown_name(library: str, name: str, names: list[str]) -> UsageError:
    close = difflib.get_close_matches(name.lower(), names, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"see {library}'s list of models"
    return UsageError(Problem(f"{library}:{name}", f"{library} has no model of that name", hint))


def _from_folder(folder: Path, args: dict[str, Any], keep_weights: bool) -> Built:
    """Make a transformers model from a local folder, with its weights where they are wanted."""
    from normconv.sources.hf_folder import open_folder

    return Built(*open_folder(folder, args, keep_weights), f"transformers:{folder}")


def _from_factory(spec: str, args: dict[str, Any]) -> nn.Module:
    """Import ``package.module`` (also from the current folder) and call its ``factory``."""
    with importable_from_here():
        found = named_object(spec)
        if isinstance(found, nn.Module):
            return copy.deepcopy(found)
        if not callable(found):
            what = f"{spec.partition(':')[2]} is a {type(found).__name__}, not a factory"
            raise UsageError(Problem(spec, what))
        return _call(found, args, spec)


def named_object(spec: str) -> Any:
    """Import what ``package.module:name`` names, also from the current folder.

    Raises:
        UsageError: there is no such module, or nothing of that name in it.
        LoadError: its import fails.
    """
    module_name, _, path = spec.partition(":")
    with importable_from_here():
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise LoadError(Problem(spec, f"its import fails ({error})")) from None
            what = f"there is no module {error.name!r}, installed or in the current folder"
            raise UsageError(Problem(spec, what)) from None
        except Exception as error:
            what = f"its import fails ({type(error).__name__}: {error})"
            raise LoadError(Problem(spec, what)) from error
        for part in path.split("."):
            if not hasattr(found, part):
                close = difflib.get_close_matches(part, dir(found), n=3)
                hint = f"did you mean {', '.join(close)}?" if close else ""
                raise UsageError(Problem(spec, f"{module_name} has no {path}", hint))
            found = getattr(found, part)
        return found


def _call(factory: Callable[..., Any], args: dict[str, Any], where: str) -> nn.Module:
    try:
        made = factory(**args)
    except Exception as error:  # the factory is the user's or a library's
        shown = ", ".join(f"{key}={value!r}" for key, value in args.items())
        what = f"making the model fails with ({shown}): {type(error).__name__}: {error}"
        raise LoadError(Problem(where, what)) from error
    if not isinstance(made, nn.Module):
        what = f"gives a {type(made).__name__}, not an nn.Module"
        raise LoadError(Problem(where, what))
    return made
