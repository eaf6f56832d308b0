"""`--device`: where modules run."""

from __future__ import annotations

from typing import Annotated

import typer

from normconv.errors import Problem, UsageError

__all__ = ["Device", "checked_device"]

Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where modules run.")]


def checked_device(name: str) -> str:
    """Return the name of a device that is there.

    Raises:
        UsageError: neither cpu nor cuda, or torch sees no such device.
    """
    import torch

    if name not in ("cpu", "cuda"):
        raise UsageError(Problem("--device", f"{name!r} is neither cpu nor cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(Problem("--device", "torch sees no CUDA device", "normconv doctor"))
    return name
