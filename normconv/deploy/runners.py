"""One way to run a module, an exported program and an ONNX file."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.deploy.session import Session
from normconv.deploy.values import InputSpec
from normconv.errors import LoadError, Problem, Refused, UsageError
from normconv.graph.quiet import quiet
from normconv.layers import copy_model
from normconv.proof.outputs import cast_inputs, evaluate, flat_outputs

__all__ = [
    "CompiledRunner",
    "FileRunner",
    "Model",
    "ModuleRunner",
    "OnnxRunner",
    "ProgramRunner",
    "Runner",
    "open_runner",
    "session_outputs",
    "tf32_set",
]

#: What can be verified: a module, or the path of an ``.onnx`` or ``.pt2`` file.
Model = nn.Module | str | os.PathLike[str]

_PROTOBUF = (2 << 30) - (64 << 20)  # a message ends at 2 GiB

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
    def device(self) -> torch.device | None:
        """The device of its first tensor; None where it has none."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return next((tensor.device for tensor in tensors), None)

    @property
    def provider(self) -> str:
        """The kind of its device."""
        return "cpu" if self.device is None else str(self.device.type)

    def placed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return inputs on the module's device."""
        device = self.device
        if device is None:
            return args, dict(kwargs)
        placed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (args, dict(kwargs))
        )
        return placed

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the module."""
        return evaluate(self.model, *self.placed(args, kwargs))

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


class CompiledRunner(ModuleRunner):
    """A module under ``torch.compile``."""

    def __init__(self, model: nn.Module, subject: str = "") -> None:
        super().__init__(model, subject)
        compiled: Any = torch.compile(model)
        self._compiled: nn.Module = compiled

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run what the compiler made of it."""
        with quiet():  # what the compiler has to say of its own code
            return evaluate(self._compiled, *self.placed(args, kwargs))


class ProgramRunner(ModuleRunner):
    """A ``.pt2`` file.

    Its float64 run is the program read again and cast. A program that has a dtype written into its
    graph does not run so, or gives float32 all the same: `verify` finds out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(_Program(_loaded(path)), path.name)

    def input_shapes(self) -> list[tuple[Any, ...]]:
        """Return the shape of each input tensor; a free axis is a symbol."""
        graph = self.model.__dict__["program"].graph
        values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
        return [tuple(value.shape) for value in values if isinstance(value, Tensor)]

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


class FileRunner(ABC):
    """An ``.onnx`` file, whatever runs it.

    Args:
        path: the file.
        specs: its inputs.
    """

    def __init__(self, path: Path, specs: tuple[InputSpec, ...]) -> None:
        self.path = path
        self.subject = path.name
        self.specs = specs

    @property
    @abstractmethod
    def provider(self) -> str:
        """Where it computes."""

    @abstractmethod
    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the file on torch tensors."""

    @abstractmethod
    def run_model(
        self, model: onnx.ModelProto, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Run a variant of the file that takes the same inputs."""

    def exact(self) -> Runner | None:
        """Return None: a file computes in the dtype it was written in."""
        return None

    def feeds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what the file is fed: `named`, floats in the dtype of the file."""
        types = {spec.name: spec.type for spec in self.specs}
        named = self.named(args, kwargs)
        return {name: _cast(value, types[name]) for name, value in named.items()}

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give keyword inputs by name and the others in order.

        Raises:
            Refused: the file takes another number of tensors.
        """
        specs = {spec.name: spec for spec in self.specs}
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
        return feeds


class OnnxRunner(FileRunner):
    """An ``.onnx`` file in ONNX Runtime."""

    def __init__(self, path: Path, provider: str | None, **options: Any) -> None:
        self.session = Session(path, provider, **options)
        self._tf32 = bool(options.get("tf32"))
        super().__init__(path, self.session.inputs)

    @property
    def provider(self) -> str:
        """The provider that took its nodes."""
        return self.session.provider

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the file on torch tensors."""
        return session_outputs(self.session, self.feeds(args, kwargs))

    def run_model(
        self, model: onnx.ModelProto, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Run a variant of the file on the same provider."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.path.name
            onnx.save(model, path, save_as_external_data=model.ByteSize() > _PROTOBUF)
            session = Session(path, self.provider, tf32=self._tf32)
            return session_outputs(session, self.feeds(args, kwargs))


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


@contextmanager
def tf32_set(allowed: bool) -> Iterator[None]:
    """Let torch compute float32 in TF32 on CUDA, or not, and set it back; nothing without CUDA."""
    holders: tuple[Any, ...] = ()
    if torch.cuda.is_available():
        holders = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv"))  # noqa: B009
    precisions = [(holder, holder.fp32_precision) for holder in holders]
    try:
        for holder, _ in precisions:
            holder.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for holder, precision in precisions:
            holder.fp32_precision = precision
