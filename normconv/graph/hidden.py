"""Modules that a model holds outside of its registered modules, where an edit does not reach them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["held_by_functions", "hidden_references"]

_SEQUENCES = (list, tuple, set, frozenset, deque)
_DEPTH = 20  # of objects in objects; deeper ones are no longer the model's own
_MOST = 1000  # items of one container: longer ones hold data
# What holds no module of the user: numbers, names, torch's own things.
_CLOSED = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, torch.Tensor)


def hidden_references(model: nn.Module) -> dict[int, str]:
    """Return the modules that containers, objects and functions on some module hold, and where.

    By identity. An edit that puts another module into the registered place would not reach those.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> net.also = [net[0]]
    >>> hidden_references(net)[id(net[0])]
    'also'
    """
    return _references(model, functions_only=False)


def held_by_functions(model: nn.Module) -> dict[int, str]:
    """Return those that functions close over: a copy of the model goes on with the originals of them.

    >>> net = nn.Sequential(nn.Linear(1, 1)); inner = net[0]
    >>> net.bound, net.listed = (lambda x: inner(x)), [inner]
    >>> list(held_by_functions(net).values())
    ['bound']
    """
    return _references(model, functions_only=True)


def _references(model: nn.Module, *, functions_only: bool) -> dict[int, str]:
    found: dict[int, str] = {}
    seen: set[tuple[int, bool]] = set()
    inner = {*nn.Module().__dict__, "_compiled_call_impl"}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in inner and not isinstance(value, _CLOSED):
                where = f"{path}.{name}" if path else name
                for held, by_function in _held(value, seen, 0, False):
                    if by_function or not functions_only:
                        found.setdefault(id(held), where)
    return found


def _held(
    value: Any, seen: set[tuple[int, bool]], depth: int, by_function: bool
) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that a value leads to, and whether through a function's closure."""
    if isinstance(value, nn.Module):
        yield value, by_function
        return
    if isinstance(value, _CLOSED) or (id(value), by_function) in seen or depth > _DEPTH:
        return
    seen.add((id(value), by_function))
    for item, through_function in _inside(value):
        yield from _held(item, seen, depth + 1, by_function or through_function)


def _inside(value: Any) -> Iterator[tuple[Any, bool]]:
    """What a container, a function or a plain object holds; whether deepcopy leaves it as it is."""
    if isinstance(value, dict):
        yield from ((item, False) for item in islice(value.values(), _MOST))
    elif isinstance(value, _SEQUENCES):
        yield from ((item, False) for item in islice(value, _MOST))
    elif isinstance(value, partial):
        yield from ((item, False) for item in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, MethodType):
        yield value.__self__, False
        yield value.__func__, True
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        modules = [item for item in named if isinstance(item, nn.Module)]
        yield from ((item, True) for item in (*cells, *defaults, *modules))
    else:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from ((item, False) for item in attributes.values())


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
