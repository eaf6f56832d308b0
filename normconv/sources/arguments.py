"""Which arguments a file may pass to the few names that it may call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Protocol

from normconv.sources.allow import PURE_BUILTINS, REBUILD_LAYER, TENSOR_CALLS, Entry, Kind
from normconv.sources.pickle_scan import Atom, Call, Container, Global, Node

__all__ = ["Names", "arguments_fit", "numpy_state_fits", "target_path", "values_of", "walk"]

_LATIN = ("latin1", "latin-1", "iso-8859-1")
_NUMBERS = re.compile(r"[<>=|]?([biufc]\d+|[SU]\d+|[mM]8(\[\w+\])?)")


class Names(Protocol):
    """What a checker asks about the nodes of a pickle."""

    def entry(self, node: Node) -> Entry | None:
        """Return what a name stands for."""

    def kind(self, node: Node) -> Kind | None:
        """Return what may be done with a name."""

    def is_data(self, node: Node) -> bool:
        """Say whether a node holds data only."""

    def is_callable_value(self, node: Node) -> bool:
        """Say whether a node is a class or function that may be kept as an attribute."""

    def state_reason(self, path: str, owner: type, state: Node) -> str:
        """Say what is odd in the state of an object."""


def arguments_fit(judge: Names, path: str, args: list[Node]) -> bool:
    """Say whether a file may call `path` with `args`."""
    if path in TENSOR_CALLS:
        return all(judge.is_data(arg) for arg in args)
    checker = _CHECKERS.get(path) or _CHECKERS.get(path.rpartition(".")[2])
    return checker is not None and checker(judge, args)


def target_path(call: Call) -> str:
    """Return the name that is called, or nothing."""
    return call.target.path if isinstance(call.target, Global) else ""


def walk(node: Node, *, into_calls: bool = True) -> Iterator[Node]:
    """Yield a node and what it holds, once each; not arguments of calls: those are judged."""
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, Container) or (into_calls and isinstance(current, Call)):
            todo.extend(current.items)


def values_of(node: Node) -> list[Node]:
    """Return what a dict (or an OrderedDict) holds."""
    return node.items[1::2] if isinstance(node, (Container, Call)) else [node]


def _atoms(*types: type) -> Callable[[Names, list[Node]], bool]:
    def check(_: Names, args: list[Node]) -> bool:
        return all(isinstance(arg, Atom) and isinstance(arg.value, types) for arg in args)

    return check


def _one_collection(judge: Names, args: list[Node]) -> bool:
    return len(args) <= 1 and all(isinstance(a, Container) and judge.is_data(a) for a in args)


def _encoded_bytes(_: Names, args: list[Node]) -> bool:
    match args:
        case [Atom(str()), Atom(codec)]:
            return codec in _LATIN
    return False


def _bytes_of(_: Names, args: list[Node]) -> bool:
    match args:
        case []:
            return True
        case [Call() as call]:
            return target_path(call) == "_codecs.encode"
        case [Atom(str()), Atom(codec)]:
            return codec in _LATIN
    return False


def _tensor_with_attributes(judge: Names, args: list[Node]) -> bool:
    match args:
        case [Global() as maker, Global() as kind, Container() as arguments, state]:
            return (
                maker.path in TENSOR_CALLS
                and judge.kind(kind) is Kind.VALUE
                and judge.is_data(arguments)
                and judge.is_data(state)
            )
    return False


def numpy_state_fits(path: str, items: list[Node]) -> bool:
    """Take plain dtypes and arrays of bytes only: never fields, never Python objects."""
    if path == "numpy.dtype":
        return all(isinstance(item, Atom) for item in items) and all(
            isinstance(item, Atom) and item.value is None for item in items[2:5]
        )
    match items:
        case [Atom(), Container("tuple"), Call() as dtype, Atom(), Call() as data]:
            return target_path(dtype) == "numpy.dtype" and target_path(data) == "_codecs.encode"
    return False


def _layer(judge: Names, args: list[Node]) -> bool:
    match args:
        case [Atom(str()), Global() as base, Container("dict") as state]:
            found = judge.entry(base)
            if found is None or found.kind not in (Kind.MODULE, Kind.TRUSTED):
                return False
            return found.kind is Kind.TRUSTED or not judge.state_reason(
                base.path, found.value, state
            )
    return False


def _pure_builtin(judge: Names, args: list[Node]) -> bool:
    match args:
        case [Global() as owner, Atom(str() as name)]:
            return owner.path == "torch._C._VariableFunctionsClass" and name in PURE_BUILTINS
    return False


def _partial(judge: Names, args: list[Node]) -> bool:
    return len(args) == 1 and judge.is_callable_value(args[0])


def _array_dtype(_: Names, args: list[Node]) -> bool:
    match args:
        case [Atom(str() as code), *flags]:
            numbers = _NUMBERS.fullmatch(code) is not None
            return numbers and all(isinstance(flag, Atom) for flag in flags)
    return False


def _numpy_scalar(judge: Names, args: list[Node]) -> bool:
    return (
        len(args) == 2
        and all(isinstance(arg, Call) for arg in args)
        and [target_path(arg) for arg in args if isinstance(arg, Call)]
        == ["numpy.dtype", "_codecs.encode"]
    )


def _numpy_array(judge: Names, args: list[Node]) -> bool:
    match args:
        case [Global() as base, shape, code]:
            return base.path == "numpy.ndarray" and judge.is_data(shape) and judge.is_data(code)
    return False


# By full path, else by the last part of it (the pathlib classes, the numpy functions).
_CHECKERS: dict[str, Callable[[Names, list[Node]], bool]] = {
    "collections.OrderedDict": lambda _, args: not args,
    "collections.Counter": _one_collection,
    "functools.partial": _partial,
    "builtins.set": _one_collection,
    "builtins.frozenset": _one_collection,
    "builtins.slice": _atoms(int, type(None)),
    "builtins.range": _atoms(int),
    "builtins.bytearray": _bytes_of,
    "builtins.complex": _atoms(int, float),
    "builtins.getattr": _pure_builtin,
    "_codecs.encode": _encoded_bytes,
    "torch.Size": _one_collection,
    "torch.device": _atoms(str, int),
    "torch.serialization._get_layout": _atoms(str),
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    REBUILD_LAYER: _layer,
    "numpy.dtype": _array_dtype,
    "scalar": _numpy_scalar,
    "_reconstruct": _numpy_array,
    **{
        name: _atoms(str)
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}
