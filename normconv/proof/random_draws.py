"""Random numbers of a run in a wider dtype: those that the model draws as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["DrawnAsBefore"]

_FACTORIES = (torch.rand, torch.randn)
_LIKE = (torch.rand_like, torch.randn_like)
_IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.exponential_)


class DrawnAsBefore(TorchFunctionMode):
    """Let what would be drawn in `wide` be drawn in the dtype it has without, and widened.

    Under one seed torch draws other numbers in another dtype. A model that samples in its forward would
    then be judged by a run on other noise.

    Args:
        wide: the dtype of the run.
        own: the model's dtype.
        default: torch's default dtype outside of the run.

    >>> _ = torch.manual_seed(0)
    >>> plain = torch.randn(2)
    >>> _ = torch.manual_seed(0)
    >>> with DrawnAsBefore(torch.float64, own=torch.float32, default=torch.float32):
    ...     wide = torch.randn(2, dtype=torch.float64)
    >>> torch.equal(wide, plain.double())
    True
    """

    def __init__(self, wide: torch.dtype, *, own: torch.dtype, default: torch.dtype) -> None:
        super().__init__()
        self._wide = wide
        self._own = own
        self._default = default

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("dtype")
        if func in _FACTORIES and "out" not in kwargs and asked in (None, self._wide):
            kwargs["dtype"] = self._default if asked is None else self._own
            return func(*args, **kwargs).to(self._wide)
        if func in _LIKE and (asked or args[0].dtype) == self._wide:
            kwargs["dtype"] = self._own
            return func(*args, **kwargs).to(self._wide)
        if func in _IN_PLACE and args[0].dtype == self._wide:
            return args[0].copy_(
                func(torch.empty_like(args[0], dtype=self._own), *args[1:], **kwargs)
            )
        return func(*args, **kwargs)
