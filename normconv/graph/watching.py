"""Modes that see what a running model does with tensors between its norms and linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normconv.graph.calls import function_name
from normconv.graph.tracing import Trace, tensors_in

__all__ = ["Functions", "Operators", "Watch"]

# What hands a tensor's numbers to something that torch does not see.
_ESCAPES = frozenset(
    [
        "numpy",
        "tolist",
        "data_ptr",
        "untyped_storage",
        "storage",
        "_typed_storage",
        "__array__",
        "__dlpack__",
        "__cuda_array_interface__",
    ]
)


# Operators that normalize; with `training` absent or False, by fixed statistics.
_NORM_OPERATORS = frozenset(
    [
        "batch_norm",
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
    ]
)


class Watch:
    """What hooks and modes share."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._deaf = False

    @property
    def deaf(self) -> bool:
        """Whether what happens now is our own doing."""
        return self._deaf

    @contextmanager
    def ours(self) -> Iterator[Trace]:
        """Do not watch ourselves."""
        before, self._deaf = self._deaf, True
        try:
            yield self.trace
        finally:
            self._deaf = before

    def in_leaf(self) -> bool:
        """Whether a norm or linear operator runs."""
        group = self.trace.innermost
        return group is not None and group.kind == "module"


class Functions(TorchFunctionMode):
    """Sees the calls of torch's functions and methods that Python makes."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._watch.deaf or self._watch.in_leaf():
            return func(*args, **kwargs)
        name = function_name(_name_of(func), (None, kwargs["p"]) if "p" in kwargs else args)
        with self._watch.ours() as trace:
            group = trace.enter("function", name)
            makers = {id(t): trace.peek(t) for _, t in tensors_in((args, kwargs))}
        output: Any = None
        try:
            output = func(*args, **kwargs)
        finally:
            with self._watch.ours():
                makes = [tensor for _, tensor in tensors_in(output)]
                escapes = getattr(func, "__name__", "") in _ESCAPES or name in _ESCAPES
                if escapes or not group.operators:
                    for tensor in makes or [t for _, t in tensors_in((args, kwargs)) if escapes]:
                        trace.read(tensor)
                if group.operators or makes or escapes:
                    known = {key: made for key, made in makers.items() if made in group.reads}
                    trace.leave(output, _computation(func, args, kwargs, known))
                else:
                    trace.drop()
        return output


def _name_of(func: Any) -> str:
    name = str(getattr(func, "__name__", type(func).__name__))
    if name == "__get__":
        return f"getattr {getattr(getattr(func, '__self__', None), '__name__', '')}"
    return name.strip("_") if name.startswith("__") else name


def _computation(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], makers: Mapping[int, int | None]
) -> Callable[[Mapping[int, Any]], Any]:
    """Return what computes a function from the values of its inputs.

    Of a tensor that it did not read it took the shape alone.
    """

    def reference(tensor: Tensor) -> Any:
        made = makers.get(id(tensor))
        if made is None:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return _Reference(made)

    skeleton = pytree.tree_map_only(Tensor, reference, (args, dict(kwargs)))

    def compute(values: Mapping[int, Any]) -> Any:
        a, k = pytree.tree_map_only(_Reference, lambda it: values[it.index], skeleton)
        return func(*a, **k)

    return compute


class _Reference:
    def __init__(self, index: int) -> None:
        self.index = index


class Operators(TorchDispatchMode):
    """Sees every operator and which memory it reads and writes."""

    supports_higher_order_operators = True

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._watch.deaf:
            return func(*args, **kwargs)
        with self._watch.ours() as trace:
            name = str(getattr(func, "__name__", func)).partition(".")[0]
            alone = trace.innermost is None
            group = trace.enter("function", name) if alone else trace.innermost
            assert group is not None
            group.operators += 1
            for _, tensor in tensors_in((args, kwargs)):
                trace.read(tensor)
            output = func(*args, **kwargs)
            for tensor in _written(func, args, kwargs):
                trace.wrote(tensor)
            for _, tensor in tensors_in(output):
                trace.made(tensor)
            if group.kind != "module" and _is_fixed_norm(name, func, args, kwargs):
                trace.functional_norm()
            if alone:
                trace.leave(output)
        return output


def _arguments(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[Any, Any]]:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return []
    by_place = list(zip(schema.arguments, args, strict=False))
    return by_place + [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [
        tensor
        for argument, value in _arguments(func, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
        for _, tensor in tensors_in(value)
    ]


def _is_fixed_norm(name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name not in _NORM_OPERATORS:
        return False
    given = {argument.name: value for argument, value in _arguments(func, args, kwargs)}
    return not given.get("training", False)
