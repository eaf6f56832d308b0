"""Whether a run turned values computed from the inputs into Python numbers: a trace of it would lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["values_read"]

# What leaves torch's graph: the Python value of a tensor.
_READING = {
    getattr(Tensor, name): what
    for name, what in {
        "__bool__": "a truth value",
        "__int__": "a Python int",
        "__float__": "a Python float",
        "__complex__": "a Python complex",
        "__index__": "an index",
        "item": "a Python number",
        "tolist": "Python numbers",
        "numpy": "a NumPy array",
        "__array__": "a NumPy array",
    }.items()
}


def values_read(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Run a module and list what it makes of values that depend on its inputs outside of torch.

    Sizes do not count, nor does what is computed from them or from buffers alone. A tracer fixes each of
    these values as the example has it, so that a file would be wrong for other inputs.

    Args:
        model: run once, as it is.
        args: inputs.
        kwargs: keyword inputs.

    >>> class Looks(nn.Module):
    ...     def forward(self, x):
    ...         return x if x.sum() > 0 else -x
    >>> values_read(Looks(), (torch.ones(2),), {}), values_read(nn.ReLU(), (torch.ones(2),), {})
    (['a truth value'], [])
    """
    with _Followed((args, dict(kwargs))) as followed, torch.no_grad():
        model(*args, **kwargs)
    return sorted(followed.read)


class _Followed(TorchFunctionMode):
    """Follows what is computed from the inputs through every function of torch."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._from_inputs: Any = WeakTensorKeyDictionary()
        self._mark(inputs)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        depends = any(
            leaf in self._from_inputs
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        )
        result = function(*args, **kwargs)
        if depends:
            if what := _READING.get(function):
                self.read.add(what)
            self._mark(result)
            if _writes(function):
                self._mark(args[:1])
            self._mark(kwargs.get("out"))
        return result

    def _mark(self, values: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._from_inputs[leaf] = True


def _writes(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
