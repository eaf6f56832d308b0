"""Run a folder of transformers in a process of its own: ``python -m normconv.deploy.reload``.

Only what stands on the disk can reach the outputs here: no module, patch or cache of the process that
wrote the folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normconv.proof import evaluate
from normconv.sources.folded import RECORD, load_folded
from normconv.sources.hf_folder import class_of_folder, quiet_transformers

__all__ = ["Reloaded", "load_and_run", "reload_folder"]

_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys")


class Reloaded(NamedTuple):
    """What a folder gave in a fresh process.

    Args:
        outputs: by name.
        misfits: names that `from_pretrained` filled with random numbers, or left out.
        failure: why there are no outputs.
    """

    outputs: dict[str, Tensor]
    misfits: list[str]
    failure: str = ""


def reload_folder(folder: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reloaded:
    """Load a folder in a fresh process and run it in eval mode, as its own documents say.

    Args:
        folder: written by `save_pretrained` (read by the class's `from_pretrained`) or folded (read by
            `load_folded`).
        args: positional inputs: tensors, numbers, and containers of them.
        kwargs: keyword inputs.
    """
    with tempfile.TemporaryDirectory(prefix="normconv-") as place:
        given, made = Path(place, "inputs.pt"), Path(place, "outputs.pt")
        torch.save((args, dict(kwargs)), given)
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, str(folder), str(given), str(made)],
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not made.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return Reloaded({}, [], lines[-1])
        return Reloaded(*torch.load(made, weights_only=True))


def load_and_run(folder: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reloaded:
    """Do what `reload_folder` does, in this process."""
    kind, misfits = class_of_folder(folder), []
    if (folder / RECORD).is_file():
        model = load_folded(kind, folder)
    else:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
        misfits = sorted(str(key) for name in _INFO for key in info.get(name) or ())
    return Reloaded(evaluate(model, args, kwargs), misfits)


def _main(words: Sequence[str]) -> None:
    folder, given, made = map(Path, words)
    args, kwargs = torch.load(given, weights_only=True)
    torch.save(tuple(load_and_run(folder, args, kwargs)), made)


if __name__ == "__main__":
    _main(sys.argv[1:])
