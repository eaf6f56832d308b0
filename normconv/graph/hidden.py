"""Modules that a model holds outside of its registered modules, where an edit does not reach them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["hidden_references"]


def _held_by_function(function: Any) -> list[Any]:
    """What a function closes over or is bound to; deepcopy and edits do not reach it."""
    if isinstance(function, partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, MethodType):
        return [function.__self__, *_held_by_function(function.__func__)]
    if not isinstance(function, FunctionType):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [value for value in cells if isinstance(value, (nn.Module, list, tuple, dict))]


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def hidden_references(model: nn.Module) -> dict[int, str]:
    """Modules that lists, dicts and functions on some module hold: an edit would not reach those."""
    found: dict[int, str] = {}

    def look(value: Any, where: str) -> None:
        if isinstance(value, nn.Module):
            found.setdefault(id(value), where)
        elif isinstance(value, Mapping):
            for item in value.values():
                look(item, where)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                look(item, where)
        elif isinstance(value, (FunctionType, MethodType, partial)):
            for item in _held_by_function(value):
                look(item, where)

    inner = nn.Module().__dict__.keys()
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in inner:
                look(value, f"{path}.{name}" if path else name)
    return found
