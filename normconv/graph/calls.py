"""A neutral call graph: what a model calls, in order, and who uses whose output.

Both captures end here, and everything that judges dataflow reads only this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

__all__ = ["LIKE", "Call", "CallGraph", "first_shape", "function_name"]

CallKind = Literal["input", "module", "function", "attribute", "output"]


@dataclass(frozen=True)
class Call:
    """One node.

    Args:
        index: its place in call order.
        kind: what it is.
        target: the module's first name, the function's name, or the attribute's path.
        inputs: indices of the calls whose outputs it takes, without repeats.
        shape: of its first output tensor, where the trace told it.
        constant: its value, where that is traced and no tensor (a size, a tuple of sizes).
        compute: computes it from the values of its inputs, by index; only for calls that hold no
            parameters.
    """

    index: int
    kind: CallKind
    target: str
    inputs: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    constant: Any = field(default=None, compare=False, repr=False)
    compute: Callable[[Mapping[int, Any]], Any] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def reads_shape(self) -> bool:
        """Whether it asks only for the shape, dtype or device of what it takes."""
        return self.kind == "function" and self.target in _SHAPE_READS


_SHAPE_READS = frozenset(
    [f"getattr {name}" for name in ("shape", "dtype", "device", "ndim", "is_cuda")]
    + ["size", "dim", "numel", "ndimension", "sym_size"]
)


@dataclass(frozen=True)
class CallGraph:
    """The calls of one forward pass.

    Args:
        calls: in order; `calls[i].index == i`.
        method: the capture that made it, ``fx`` or ``export``.
        outside_reads: modules (first names) of which some tensor is read outside their own calls.
        functional_norms: where `F.batch_norm` with fixed statistics is called outside of a norm.
        failures: why the captures tried before failed, by capture.
    """

    calls: tuple[Call, ...]
    method: str
    outside_reads: frozenset[str] = frozenset()
    functional_norms: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def users(self) -> Mapping[int, tuple[int, ...]]:
        """For each call the calls that take its output."""
        found: dict[int, list[int]] = defaultdict(list)
        for call in self.calls:
            for index in call.inputs:
                found[index].append(call.index)
        return {index: tuple(users) for index, users in found.items()}

    @cached_property
    def calls_of(self) -> Mapping[str, tuple[Call, ...]]:
        """The calls of each module, by first name."""
        found: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            if call.kind == "module":
                found[call.target].append(call)
        return {name: tuple(calls) for name, calls in found.items()}


# Functions that take of their second argument only its shape, and what does the same with a shape.
LIKE = {"reshape_as": "reshape", "view_as": "view", "expand_as": "expand"}


def function_name(name: str, args: tuple[Any, ...]) -> str:
    """Name a call of a function; a dropout of nothing has a name of its own.

    >>> function_name("dropout", (None, 0.0, False)), function_name("dropout", (None, 0.5, False))
    ('dropout of nothing', 'dropout')
    """
    drops_nothing = name == "dropout" and len(args) > 1 and args[1] == 0
    return "dropout of nothing" if drops_nothing else name


def first_shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of the first tensor in a traced value; None where it holds none.

    >>> import torch
    >>> first_shape((torch.empty(2, 3), 1))
    (2, 3)
    """
    while isinstance(value, (tuple, list)) and value and not hasattr(value, "shape"):
        value = value[0]
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(int(size) for size in shape)
