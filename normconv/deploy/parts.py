"""A part of a model to export: a submodule with the inputs it gets, or another method than forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from normconv.errors import Problem, UsageError
from normconv.graph.within import reach, submodule

__all__ = ["as_forward", "part_of"]


def part_of(
    model: nn.Module, at: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], tuple[str, ...]]:
    """Return the part to export, its inputs, and notes on where they come from.

    Args:
        model: the whole model; not changed.
        at: a submodule's name; empty for the model itself.
        method: a method's name; with one, the inputs are the method's own.
        args: positional inputs of the whole model, or of the method.
        kwargs: keyword inputs of the same.

    Raises:
        UsageError: there is no such submodule or method.
        CaptureError: the model does not call the submodule.
    """
    if method:
        return as_forward(submodule(model, at) if at else model, method), args, kwargs, ()
    if not at:
        return model, args, kwargs, ()
    reached = reach(model, at, args, kwargs)
    return submodule(model, at), reached.args, dict(reached.kwargs), reached.notes


def as_forward(model: nn.Module, method: str) -> nn.Module:
    """Return a view of a module whose ``forward`` is another of its methods.

    It shares tensors and submodules with the module, by the same names.

    Raises:
        UsageError: there is no such method.

    >>> class Codec(nn.Module):
    ...     def decode(self, codes):
    ...         return codes + 1
    >>> as_forward(Codec(), "decode")(1)
    2
    """
    kind = type(model)
    function = getattr(kind, method, None)
    if not callable(function):
        what = f"the {kind.__name__} has no such method"
        raise UsageError(Problem(f"method={method!r}", what, "name one of its methods"))
    # A class of the same name, not a wrapper: a wrapper's name would stand before every module's.
    view_class = type(kind.__name__, (kind,), {"forward": function, "__module__": kind.__module__})
    view: nn.Module = object.__new__(view_class)
    view.__dict__.update(model.__dict__)
    return view
