"""A model on each backend: as it is, compiled, as a program, as a file on a provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from normconv.deploy.clean import clean
from normconv.deploy.contenders import BACKENDS as TIMED
from normconv.deploy.contenders import backend_problem
from normconv.deploy.inputs import batch_size, resized
from normconv.deploy.probing import provider_problem
from normconv.deploy.profiles import PROFILES
from normconv.deploy.program import to_onnx
from normconv.deploy.rounded import HALVES, Float64File, weights_dtype
from normconv.deploy.runners import (
    CompiledRunner,
    FileRunner,
    Model,
    ModuleRunner,
    OnnxRunner,
    ProgramRunner,
    Runner,
)
from normconv.deploy.write import save
from normconv.errors import (
    CaptureError,
    CheckFailed,
    MissingDependency,
    Problem,
    Refused,
    UsageError,
)
from normconv.folding import fold
from normconv.graph.quiet import quiet
from normconv.layers import copy_model

__all__ = ["ALL", "BACKENDS", "Chosen", "Forms", "chosen_backends", "is_finding", "open_file"]

_ORT = "ort-"

#: Where a model can be verified: where it can be timed, and as a program of torch.export.
BACKENDS = ("eager", "compile", "pt2", *(name for name in TIMED if name.startswith(_ORT)))

#: Stands for every backend that works here and takes the model.
ALL = "all"


class Chosen(NamedTuple):
    """Backends to judge on, and what was asked for and cannot be.

    Args:
        backends: those that work here and take the model.
        refused: the reason by name; asked for by name.
        absent: the reason by name; part of "all".
    """

    backends: tuple[str, ...]
    refused: dict[str, str]
    absent: dict[str, str]


def chosen_backends(asked: Sequence[str], model: Model) -> Chosen:
    """Say which backends a model is judged on.

    Args:
        asked: of `BACKENDS`, or ``"all"``.
        model: the candidate.

    Raises:
        UsageError: an unknown backend, or none.

    >>> chosen_backends(["eager", "pt2"], nn.ReLU()).backends
    ('eager', 'pt2')
    """
    unknown = [name for name in asked if name not in (*BACKENDS, ALL)]
    if unknown or not asked:
        what = f"{', '.join(map(repr, unknown)) or 'none'}: there are {', '.join(BACKENDS)}, {ALL}"
        raise UsageError(Problem("backends", what))
    found: list[str] = []
    refused: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys(BACKENDS if ALL in asked else asked):
        reason = _unfit(name, model) or backend_problem(name)
        if not reason:
            found.append(name)
        elif name in asked:
            refused[name] = reason
        else:
            absent[name] = reason
    return Chosen(tuple(found), refused, absent)


def _unfit(backend: str, model: Model) -> str:
    """Say why a backend does not take such a model; empty when it does."""
    if isinstance(model, nn.Module):
        return ""
    if Path(model).suffix == ".onnx":
        return "" if backend.startswith(_ORT) else "an .onnx file runs on ort-cpu and its like"
    return "it takes modules and .onnx files" if backend.startswith(_ORT) else ""


class Forms:
    """A model in the forms that backends take; what has to be made is made once, in a folder.

    Args:
        model: a module, or the path of a file.
        folder: where files are made.
        args: example inputs to capture with.
        kwargs: example keyword inputs.
        dtype: cast a copy of the module to this first; None leaves it as it is.
    """

    def __init__(
        self,
        model: Model,
        folder: Path,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and isinstance(model, nn.Module):
            model = copy_model(model).to(dtype)
        self.model = model
        self._folder = folder
        self._inputs = (args, dict(kwargs))
        self._dtype = dtype
        self._file: Path | None = None
        self._program: Path | None = None

    def on(self, backend: str, tf32: bool = False) -> Runner:
        """Return the runner of a backend.

        Raises:
            NormconvError: the form cannot be made, or does not run there.
        """
        if backend.startswith(_ORT):
            return open_file(self.file(), backend.removeprefix(_ORT), tf32)
        if isinstance(self.model, nn.Module):
            if backend == "pt2":
                return ProgramRunner(self.program())
            runner = ModuleRunner if backend == "eager" else CompiledRunner
            return runner(self.model)
        program = ProgramRunner(Path(self.model))
        return program if backend != "compile" else CompiledRunner(program.model, program.subject)

    def file(self) -> Path:
        """Return the ``.onnx`` file."""
        if not isinstance(self.model, nn.Module):
            return Path(self.model)
        if self._file is None:
            path = self._folder / f"{type(self.model).__name__}.onnx"
            model, (args, kwargs) = self._to_capture()
            folded = fold(model, share_tensors=True).model.eval()
            opset = PROFILES["generic"].opset
            program = to_onnx(folded, args, kwargs, dynamic_batch=True, opset=opset)
            clean(program.model)
            save(program.model, path)
            self._file = path
        return self._file

    def program(self) -> Path:
        """Return the ``.pt2`` file: folded, with a free batch where torch.export finds it free."""
        if not isinstance(self.model, nn.Module):
            return Path(self.model)
        if self._program is None:
            path = self._folder / f"{type(self.model).__name__}.pt2"
            model, (args, kwargs) = self._to_capture()
            folded = fold(model, share_tensors=True).model.eval()
            _save_program(folded, args, kwargs, path)
            self._program = path
        return self._program

    def _to_capture(self) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the module and its inputs on the processor, inputs in its dtype."""
        assert isinstance(self.model, nn.Module)
        runner = ModuleRunner(self.model)
        model = self.model if runner.provider == "cpu" else copy_model(self.model).cpu()

        def place(leaf: torch.Tensor) -> torch.Tensor:
            cast = self._dtype is not None and leaf.is_floating_point()
            return leaf.to("cpu", self._dtype if cast else leaf.dtype)

        return model, pytree.tree_map_only(torch.Tensor, place, self._inputs)


def _save_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path
) -> None:
    batch = batch_size(args, kwargs)
    free = torch.export.Dim.AUTO
    wide = (args, kwargs) if batch is None else resized((args, kwargs), batch, max(batch, 2))

    def axes(leaf: Any) -> Any:
        has_batch = isinstance(leaf, torch.Tensor) and leaf.ndim and batch is not None
        return {0: free} if has_batch and leaf.shape[0] == max(batch or 0, 2) else None

    shapes = pytree.tree_map(axes, wide)
    dynamic = (*shapes[0], *shapes[1].values())
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                model, *wide, dynamic_shapes=dynamic if batch is not None else None, strict=False
            )
            torch.export.save(program, path)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        what = f"torch.export made no program: {type(error).__name__}: {line}"
        raise CaptureError(Problem(type(model).__name__, what)) from error


def open_file(path: Path, provider: str | None, tf32: bool) -> FileRunner:
    """Open an ``.onnx`` file on a provider, or, of half precision on the processor, in float64.

    Raises:
        NormconvError: it does not run there.
    """
    on_cpu = provider == "cpu" or (provider is None and bool(provider_problem("cuda")))
    if not on_cpu or weights_dtype(path) not in HALVES:
        return OnnxRunner(path, provider, tf32=tf32)
    # ONNX Runtime is not even asked: 1.31 ends the process where it fuses a float16 MatMul with the
    # Transpose before it on the CPU.
    try:
        return Float64File(path)
    except Exception as error:
        # onnx's evaluator has its own ways to say that it has no such operator.
        try:
            return OnnxRunner(path, provider, tf32=tf32)
        except Refused:
            what = f"neither ONNX Runtime nor onnx's evaluator runs it ({error})"
            raise Refused(Problem(str(path), what)) from error


def is_finding(error: Exception) -> bool:
    """Tell a candidate that does not work (a finding) from a call that cannot be answered."""
    return isinstance(error, (Refused, CheckFailed)) and not isinstance(error, MissingDependency)
