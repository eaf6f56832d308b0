"""What a model file may name: one table of exact names, and rules for classes of five packages.

`resolve` decides on a name alone. What may be *done* with the name (be created, be called with
which arguments) is its kind, and `normconv.sources.judge` holds the file to it.
"""

from __future__ import annotations

import argparse
import codecs
import enum
import importlib.util
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import nn

from normconv.errors import MissingDependency
from normconv.sources.pickle_scan import Global
from normconv.sources.trust import Trust, import_quietly

__all__ = ["PURE_BUILTINS", "REBUILD_LAYER", "TENSOR_CALLS", "Entry", "Kind", "Refusal", "resolve"]


class Kind(enum.Enum):
    """What a file may do with a name."""

    MODULE = "module"  # create plainly, give state
    PLAIN = "plain"  # the same, not an nn.Module: a configuration, a hook, a helper
    HOOK = "hook"  # the same, and may hang on a module as a hook
    ENUM = "enum"  # call with one plain value
    VALUE = "value"  # pass around: a dtype, a storage type
    FUNCTION = "function"  # keep as an attribute, never call
    CALL = "call"  # call, with arguments of the kind that the name's checker takes
    TRUSTED = "trusted"  # whatever it likes


@dataclass(frozen=True)
class Entry:
    """A name that a file may use: what it stands for, and for what."""

    kind: Kind
    value: Any


@dataclass(frozen=True)
class Refusal:
    """A name that a file may not use: why, and what the user can do."""

    why: str
    way_out: str


# Where in each package its layers live. Classes elsewhere (torch.fx, torch.jit, ...) run code.
_ROOMS = {
    "torch": ("torch.nn", "torch.ao.nn"),
    "torchvision": ("torchvision.models", "torchvision.ops", "torchvision.transforms"),
    "timm": ("timm.models", "timm.layers"),
    "transformers": ("transformers",),
    "normconv": ("normconv.layers", "normconv.graph.passes", "normconv.demo"),
}
_CLOSED = ("torch.nn.parallel.distributed", "torch.nn.parallel.replicate")

_ACTIVATIONS_TEXT = """
relu relu6 elu selu celu leaky_relu rrelu silu mish hardswish hardsigmoid hardtanh sigmoid
tanh softsign softmax log_softmax tanhshrink glu _threshold softmin gumbel_softmax
normalize
"""
_ACTIVATIONS = frozenset(_ACTIVATIONS_TEXT.split())
_PURE_BUILTINS_TEXT = """
relu tanh sigmoid softmax selu hardshrink prelu celu rrelu
"""
PURE_BUILTINS = frozenset(_PURE_BUILTINS_TEXT.split())

_HOOKS = {
    "torch.nn.utils.weight_norm.WeightNorm",
    "torch.nn.utils.spectral_norm.SpectralNorm",
    "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
    "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
    "torch.nn.modules.module._WrappedHook",
}
_HELPERS = {
    f"torchvision.models.detection._utils.{name}"
    for name in ("BoxCoder", "Matcher", "SSDMatcher", "BalancedPositiveNegativeSampler")
}
_FUNCTIONS = {
    *(f"torch.nn.functional.{name}" for name in _ACTIVATIONS),
    *(f"torch._C._nn.{name}" for name in ("gelu", "softplus", "log_sigmoid", "softshrink")),
    *(f"torchvision.ops.boxes.{name}" for name in ("box_iou", "generalized_box_iou")),
}
REBUILD_LAYER = "normconv.layers.reparametrised.rebuild_layer"
TENSOR_CALLS = frozenset(
    f"torch._utils.{name}"
    for name in (
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_sparse_tensor",
        "_rebuild_qtensor",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_device_tensor_from_cpu_tensor",
    )
)


def variable_function(owner: Any, name: str) -> Any:
    """Stand in for `getattr` where a file keeps ``torch.relu``: pure functions, no more."""
    if owner is not torch._C._VariableFunctionsClass or name not in PURE_BUILTINS:  # type: ignore[attr-defined]
        raise ValueError(f"getattr of {name!r}")
    return getattr(torch, name)


def _calls() -> dict[str, Any]:
    """Everything that a file may call by exact name; `judge` has a checker for each."""
    table: dict[str, Any] = {
        "collections.OrderedDict": OrderedDict,
        "collections.Counter": Counter,
        "functools.partial": partial,
        "builtins.set": set,
        "builtins.frozenset": frozenset,
        "builtins.slice": slice,
        "builtins.range": range,
        "builtins.bytearray": bytearray,
        "builtins.complex": complex,
        "builtins.getattr": variable_function,
        "_codecs.encode": codecs.encode,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "torch.serialization._get_layout": torch.serialization._get_layout,
        "torch._tensor._rebuild_from_type_v2": torch._tensor._rebuild_from_type_v2,
    }
    for name in ("pathlib", "pathlib._local"):
        table[f"{name}.PosixPath"] = table[f"{name}.PurePosixPath"] = PurePosixPath
        table[f"{name}.WindowsPath"] = table[f"{name}.PureWindowsPath"] = PureWindowsPath
    for path in TENSOR_CALLS:
        if (function := getattr(torch._utils, path.rpartition(".")[2], None)) is not None:
            table[path] = function
    return table


def _numpy(path: str) -> Entry | None:
    if path not in {
        "numpy.dtype",
        "numpy.ndarray",
        *(f"{m}.{n}" for m in _NUMPY_CORE for n in ("scalar", "_reconstruct")),
    }:
        return None
    import numpy as np

    if path == "numpy.ndarray":
        return Entry(Kind.VALUE, np.ndarray)
    # NumPy 1 and 2 call the same functions by different modules.
    makers: dict[str, Any] = {
        "dtype": np.dtype,
        "scalar": np.float64(0).__reduce__()[0],
        "_reconstruct": np.empty(0).__reduce__()[0],
    }
    return Entry(Kind.CALL, makers[path.rpartition(".")[2]])


_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
_CALLS = _calls()


def resolve(name: Global, trust: Trust) -> Entry | Refusal:
    """Decide what a file may do with a name.

    Imports only modules of torch, torchvision, timm, transformers and normconv; a trusted name is
    not imported here.
    """
    path, package = name.path, name.module.partition(".")[0]
    if path in _CALLS:
        return Entry(Kind.CALL, _CALLS[path])
    if package == "numpy" and (entry := _numpy(path)) is not None:
        return entry
    if path == "argparse.Namespace":
        return Entry(Kind.PLAIN, argparse.Namespace)
    if path == "torch._C._VariableFunctionsClass":
        return Entry(Kind.VALUE, torch._C._VariableFunctionsClass)  # type: ignore[attr-defined]
    if trust.covers(name.module):
        return Entry(Kind.TRUSTED, None)
    if package == "torch" and (entry := _torch_value(name)) is not None:
        return entry
    if package in _ROOMS and "." not in name.name:
        return _library_class(name, package)
    return _refuse(name, package)


def _torch_value(name: Global) -> Entry | None:
    """Dtypes, storage types and tensor classes: what torch itself always takes, uncalled."""
    value = getattr(torch, name.name, None) if name.module == "torch" else None
    if name.module == "torch.storage" and name.name in ("UntypedStorage", "TypedStorage"):
        value = getattr(torch.storage, name.name)
    if name.path == "torch.nn.parameter.Parameter":
        value = nn.Parameter
    if name.path == "torch.nn.parameter.Buffer":
        value = nn.Buffer
    if isinstance(value, (torch.dtype, torch.qscheme)):
        return Entry(Kind.VALUE, value)
    if value is not None and (
        value in (torch.Tensor, nn.Parameter, nn.Buffer) or value in torch._storage_classes
    ):
        return Entry(Kind.VALUE, value)
    return None


def _library_class(name: Global, package: str) -> Entry | Refusal:
    if not _in_room(name.module) and name.path not in _FUNCTIONS:
        return _refuse(name, package)
    if importlib.util.find_spec(package) is None:
        raise MissingDependency.needs(package, "zoo")
    try:
        value = getattr(import_quietly(name.module), name.name)
    except Exception as error:  # a module of another version may fail in any way
        version = getattr(sys.modules[package], "__version__", "?")
        return Refusal(
            f"which the installed {package} {version} does not have ({type(error).__name__})",
            f"install the {package} the file was saved with, or pass --model and the weights",
        )
    if name.path in _FUNCTIONS and callable(value) and not isinstance(value, type):
        return Entry(Kind.FUNCTION, value)
    if name.path == REBUILD_LAYER:
        return Entry(Kind.CALL, value)
    if not isinstance(value, type) or not _in_room(value.__module__):
        return _refuse(name, package)
    kind = _kind_of_class(value, name.path)
    if kind is None:
        return _refuse(name, package)
    if reason := _runs_code(value):
        return Refusal(
            f"which {reason}", _TRUST.format(package) if package != "torch" else _WEIGHTS
        )
    return Entry(kind, value)


def _kind_of_class(value: type, path: str) -> Kind | None:
    if issubclass(value, nn.Module):
        return Kind.MODULE
    if path in _HOOKS:
        return Kind.HOOK
    if path in _HELPERS:
        return Kind.PLAIN
    if issubclass(value, enum.Enum):
        return Kind.ENUM
    names = {f"{base.__module__}.{base.__name__}".lower() for base in value.__mro__}
    configurations = {
        "transformers.configuration_utils.pretrainedconfig",
        "transformers.generation.configuration_utils.generationconfig",
    }
    return Kind.PLAIN if names & configurations else None


def _runs_code(value: type) -> str:
    """Say what of the class's own would run while it is created and given state."""
    if issubclass(value, enum.Enum):
        return ""
    if value.__new__ is not object.__new__:
        return "has its own __new__"
    setter = getattr(value, "__setstate__", None)
    home = getattr(setter, "__module__", "torch.nn") or ""
    # torch.compile wraps the one of nn.Module for the whole process.
    inherited = setter is getattr(nn.Module, "__setstate__", None)
    if setter is not None and not inherited and not home.startswith("torch.nn."):
        return f"has its own __setstate__ (in {home})"
    return ""


def _in_room(module: str) -> bool:
    rooms = _ROOMS.get(module.partition(".")[0], ())
    return any(module == room or module.startswith(room + ".") for room in rooms) and not any(
        module == closed or module.startswith(closed + ".") for closed in _CLOSED
    )


_TRUST = "if you trust that code: --trust {}"
_WEIGHTS = "no option takes it; save the model's state_dict and pass it with --model"


def _refuse(name: Global, package: str) -> Refusal:
    if package == "__main__":
        return Refusal(
            "a class of the script that saved the file",
            "if you trust that script: --trust train.py (its path)",
        )
    if name.path == "torch.storage._load_from_bytes":
        return Refusal("which reads another pickle hidden in the file", _WEIGHTS)
    if package == "torch":
        return Refusal("which is not a layer of torch.nn and can run code", _WEIGHTS)
    if package in sys.stdlib_module_names:
        return Refusal("which is no part of a model and can run code", _WEIGHTS)
    if package in _ROOMS and package != "normconv":
        return Refusal(f"which is no layer of {package}", _TRUST.format(package))
    return Refusal(f"which is not on the list of known layers ({package})", _TRUST.format(package))
