"""Giving memory back between stages that each need much of it, and measuring how much one takes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Peak", "give_back_memory", "peak_memory"]


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


@dataclass
class Peak:
    """What was taken at most.

    Args:
        bytes: beyond what was held before; None where the system does not tell (it is Linux that does).
    """

    bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure how far the process's resident memory rises at most, beyond what it holds at entry.

    What was freed before is handed back first: else it would be taken again without being seen.

    >>> with peak_memory() as peak:
    ...     block = bytearray(1 << 24)
    >>> peak.bytes is None or peak.bytes > 1 << 23
    True
    """
    peak = Peak()
    give_back_memory()
    before = _status("VmRSS:") if _forget_peak() else None
    yield peak
    after = _status("VmHWM:")
    if before is not None and after is not None:
        peak.bytes = max(0, after - before)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None
