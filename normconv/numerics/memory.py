"""Giving memory back between stages that each need much of it."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable

__all__ = ["give_back_memory"]


def give_back_memory(*, cycles: bool = False) -> None:
    """Hand freed memory back to the system.

    The C allocator of Linux keeps what is freed in pieces of a few megabytes, which weights are:
    without this the peaks of stages that follow each other add up.

    Args:
        cycles: collect garbage first. A traced model is a cycle that holds its weights; a collection
            takes a fifth of a second with torch loaded.
    """
    if cycles:
        gc.collect()
    _trim()()


@functools.cache
def _trim() -> Callable[[], object]:
    if sys.platform == "linux":
        try:
            return functools.partial(ctypes.CDLL(None).malloc_trim, 0)
        except (OSError, AttributeError):  # another C library, which has no such call
            pass
    return lambda: None
