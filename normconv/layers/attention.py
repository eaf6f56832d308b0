"""Attention layers read a weight several times a call, to see its dtype: one computation serves all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["computing_once"]


def computing_once(plain_class: type[nn.Module]) -> Callable[..., Any]:
    """Return the `forward` of a class of layers, within which each weight is computed once.

    A compiler finds out by itself that it is always the same one.
    """

    @functools.wraps(plain_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = self.__dict__
        if torch.compiler.is_compiling() or "computed" in held:
            return plain_class.forward(self, *args, **kwargs)
        held["computed"] = functools.cache(self.computed)
        try:
            return plain_class.forward(self, *args, **kwargs)
        finally:
            del held["computed"]

    return forward
