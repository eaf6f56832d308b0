"""The noise floor of a backend: how far the unconverted model itself is off there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from normconv.deploy.compare import Reference, paired
from normconv.deploy.forms import Forms
from normconv.deploy.runners import FileRunner, ModuleRunner, ProgramRunner, Runner
from normconv.errors import NormconvError
from normconv.layers import copy_model

__all__ = ["TF32_EPS", "Floors"]

#: TF32 keeps ten bits of the mantissa.
TF32_EPS = 2.0**-10


class Floors:
    """Runs the reference where a candidate runs: same backend, dtype and TF32 setting.

    Args:
        reference: the runner of the reference.
        tf32: float32 may be computed in TF32 on CUDA.
    """

    def __init__(self, reference: Runner, tf32: bool = False) -> None:
        self._reference = reference
        self.tf32 = tf32
        self._runners: dict[tuple[str, torch.dtype | None], Runner | None] = {}
        self._folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        """Remove the files that were made."""
        self._folder.cleanup()

    def errors(
        self,
        backend: str,
        candidate: Runner,
        dtype: torch.dtype | None,
        reference: Reference,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> dict[str, float]:
        """Measure the rel-L2 error that the original itself has on a backend, output by output.

        At most ten times the larger of the error on torch and the eps of the dtype (or of TF32) is
        forgiven.

        Args:
            backend: of `normconv.deploy.forms.BACKENDS`.
            candidate: what runs there.
            dtype: what the original is cast to first; None leaves it in its own.
            reference: the float64 run, and the one in the original's dtype.
            args: the inputs of both.
            kwargs: likewise.

        Returns:
            The error by output; empty when the original does not run there.
        """
        runner = self._runner(backend, dtype, candidate, args, kwargs)
        if runner is None:
            return {}
        try:
            own, _ = paired(runner.run(args, kwargs), reference.exact)
        except (NormconvError, RuntimeError, ValueError):
            return {}
        on_gpu = candidate.provider != "cpu"
        found = {}
        for name, value in reference.exact.items():
            native = reference.native[name]
            if name not in own or own[name].shape != value.shape or not native.is_floating_point():
                continue
            eps = torch.finfo(dtype or native.dtype).eps
            if self.tf32 and on_gpu and native.dtype == torch.float32:
                eps = max(eps, TF32_EPS)
            found[name] = reference.backend_error(name, own[name], eps)
        return found

    def _runner(
        self,
        backend: str,
        dtype: torch.dtype | None,
        candidate: Runner,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Runner | None:
        """Return the original on a backend, made once; None where it does not run there."""
        key = (backend, dtype)
        if key not in self._runners:
            try:
                self._runners[key] = self._made(backend, dtype, candidate, args, kwargs)
            except (NormconvError, RuntimeError, ValueError):
                self._runners[key] = None
        return self._runners[key]

    def _made(
        self,
        backend: str,
        dtype: torch.dtype | None,
        candidate: Runner,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Runner | None:
        reference = self._reference
        if isinstance(reference, FileRunner):
            same = backend.startswith("ort-") and dtype is None
            return (
                Forms(reference.path, Path(), args, kwargs).on(backend, self.tf32) if same else None
            )
        if isinstance(reference, ProgramRunner) or not isinstance(reference, ModuleRunner):
            return None
        folder = Path(self._folder.name) / f"{len(self._runners)}"
        folder.mkdir()
        forms = Forms(reference.model, folder, args, kwargs, dtype)
        if backend.startswith("ort-"):
            return forms.on(backend, self.tf32)
        assert isinstance(forms.model, torch.nn.Module)
        device = candidate.device if isinstance(candidate, ModuleRunner) else None
        if device is not None and device != reference.device:
            forms.model = copy_model(forms.model).to(device)
        return forms.on("compile" if backend == "compile" else "eager")
