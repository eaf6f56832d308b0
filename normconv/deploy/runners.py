"""One way to run a module, an exported program and an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from normconv.deploy.session import Session
from normconv.errors import LoadError, Problem, Refused, UsageError
from normconv.graph.quiet import quiet
from normconv.layers import copy_model
from normconv.proof.outputs import cast_inputs, evaluate, flat_outputs

__all__ = ["Model", "ModuleRunner", "OnnxRunner", "Runner", "open_runner", "session_outputs"]

#: What can be verified: a module, or the path of an ``.onnx`` or ``.pt2`` file.
Model = nn.Module | str | os.PathLike[str]

_FLOATS = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
}


class Runner(Protocol):
    """Something that gives outputs by name."""

    subject: str

    @property
    def provider(self) -> str:
        """Where it computes: ``"cpu"`` or ``"cuda"``."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run it once in its own dtype."""

    def exact(self) -> Runner | None:
        """Return a runner of the same in float64; None when it cannot be had."""


class ModuleRunner:
    """A module in eval mode with a fixed seed; its flags are restored after each run."""

    def __init__(self, model: nn.Module, subject: str = "") -> None:
        self.model = model
        self.subject = subject or type(model).__name__

    @property
    def provider(self) -> str:
        """The device of its first tensor."""
        tensor = next((t for t in (*self.model.parameters(), *self.model.buffers())), None)
        return str(tensor.device.type) if tensor is not None else "cpu"

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the module."""
        return evaluate(self.model, args, kwargs)

    def exact(self) -> Runner | None:
        """Return a runner of a float64 copy, made once for all batches."""
        return _Float64(copy_model(self.model).double(), self.subject)


class _Float64(ModuleRunner):
    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        return super().run(
            cast_inputs(args, torch.float64), cast_inputs(dict(kwargs), torch.float64)
        )

    def exact(self) -> Runner | None:
        return self


class ProgramRunner(ModuleRunner):
    """A ``.pt2`` file.

    Its float64 run is the program read again and cast. A program that has a dtype written into its
    graph does not run so, or gives float32 all the same: `verify` finds out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(_Program(_loaded(path)), path.name)

    def exact(self) -> Runner | None:
        """Return a runner of the program in float64."""
        return _Float64(_Program(_loaded(self.path).double()), self.subject)


class _Program(nn.Module):
    """Holds the module of an exported program, which refuses train() and eval()."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # A plain attribute: as a submodule it would be told to eval().
        self.__dict__["program"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["program"](*args, **kwargs)


def _loaded(path: Path) -> nn.Module:
    try:
        with quiet():
            return torch.export.load(path).module()
    except Exception as error:
        # A damaged archive fails in zipfile, json, pickle or torch, each with its own classes.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadError(Problem(str(path), f"this is no exported program: {line}")) from error


class OnnxRunner:
    """An ``.onnx`` file in ONNX Runtime."""

    def __init__(self, path: Path, provider: str | None, **options: Any) -> None:
        self.subject = path.name
        self.session = Session(path, provider, **options)

    @property
    def provider(self) -> str:
        """The provider that took its nodes."""
        return self.session.provider

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the file on torch tensors."""
        return session_outputs(self.session, self.feeds(args, kwargs))

    def exact(self) -> Runner | None:
        """Return None: a file computes in the dtype it was written in."""
        return None

    def feeds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give keyword inputs by name and the others in order; floats get the dtype of the file."""
        specs = {spec.name: spec for spec in self.session.inputs}
        named = flat_outputs({key: value for key, value in kwargs.items() if key in specs})
        feeds = {name.removeprefix("output."): value for name, value in named.items()}
        rest = {key: value for key, value in kwargs.items() if key not in specs}
        ordered = list(flat_outputs([list(args), rest]).values())
        free = [name for name in specs if name not in feeds]
        if len(ordered) != len(free):
            takes = "; ".join(str(spec) for spec in specs.values())
            given = len(ordered) + len(feeds)
            raise Refused(Problem(self.subject, f"takes {takes}, and {given} tensors were given"))
        feeds.update(zip(free, ordered, strict=True))
        return {name: _cast(value, specs[name].type) for name, value in feeds.items()}


def _cast(value: Tensor, type_name: str) -> Tensor:
    dtype = _FLOATS.get(type_name)
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def session_outputs(session: Session, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a session on torch tensors and return torch tensors."""
    return {name: torch.from_numpy(value) for name, value in session.run(inputs).items()}


def open_runner(model: Model, provider: str | None = None) -> Runner:
    """Return the runner for a module or a file.

    Args:
        model: a module, or the path of an ``.onnx`` or ``.pt2`` file.
        provider: where an ``.onnx`` file runs.

    Raises:
        UsageError: no such file, or another kind of file.
        Refused: the file cannot be run, or not on that provider.
    """
    if isinstance(model, nn.Module):
        return ModuleRunner(model)
    path = Path(model)
    if not path.is_file():
        raise UsageError(Problem(str(path), "there is no such file"))
    if path.suffix == ".onnx":
        return OnnxRunner(path, provider)
    if path.suffix == ".pt2":
        return ProgramRunner(path)
    raise UsageError(
        Problem(str(path), "only .onnx and .pt2 files are run", "load others with normconv.load")
    )
