"""What is timed: a module on torch, a file on a provider of ONNX Runtime, each ready to be called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.deploy.probing import provider_problem
from normconv.deploy.runners import Model, ModuleRunner, OnnxRunner, ProgramRunner
from normconv.deploy.session import PROVIDERS, Session
from normconv.errors import Problem, UsageError
from normconv.graph.quiet import quiet
from normconv.numerics import state_kept

__all__ = [
    "BACKENDS",
    "Contender",
    "Ready",
    "Settings",
    "backend_problem",
    "compiler_problem",
    "takes",
]

_ORT = "ort-"

#: Where a model can run: torch as it is, torch.compile, and ONNX Runtime's providers.
BACKENDS = ("eager", "compile", *(_ORT + provider for provider in PROVIDERS))


@dataclass(frozen=True)
class Settings:
    """What all are timed under.

    Args:
        threads: of one operator, in torch and in ONNX Runtime.
        tf32: allow TF32 on CUDA.
        cuda_graphs: let ONNX Runtime replay a captured graph on CUDA.
    """

    threads: int
    tf32: bool = False
    cuda_graphs: bool = False


@dataclass
class Ready:
    """A model that is loaded and has run once.

    Args:
        call: runs it once and waits for its device.
        device: where.
        load_seconds: to open the file; with torch.compile, the first call; None for a module.
        nodes: of a file, by provider.
        events: seconds on the device of each call, by its own events; torch on CUDA alone.
    """

    call: Callable[[], object]
    device: str
    load_seconds: float | None = None
    nodes: dict[str, int] = field(default_factory=dict)
    events: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Contender:
    """A model on a backend.

    Args:
        name: the model's.
        model: a module, or the path of an ``.onnx`` or ``.pt2`` file.
        backend: one of `BACKENDS`.
    """

    name: str
    model: Model
    backend: str

    def __str__(self) -> str:
        return f"{self.name} on {self.backend}"

    @contextmanager
    def ready(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], settings: Settings
    ) -> Iterator[Ready]:
        """Load the model and run it once; a module's flags and buffers come back afterwards.

        Raises:
            NormconvError: the file cannot be run there, or not on these inputs.
        """
        if self.backend.startswith(_ORT):
            yield self._session(args, kwargs, settings)
            return
        started = time.perf_counter()
        runner = (
            ModuleRunner(self.model)
            if isinstance(self.model, nn.Module)
            else ProgramRunner(Path(self.model))
        )
        opened = time.perf_counter() - started
        with state_kept(runner.model), torch.inference_mode():
            runner.model.eval()
            device = _device_of(runner.model)
            if self.backend == "eager":
                load = None if isinstance(self.model, nn.Module) else opened
                yield self._torch(runner.model, args, kwargs, device, load)
                return
            with quiet():  # what the compiler has to say of its own code
                compiled = torch.compile(runner.model, dynamic=False)
                made = self._torch(compiled, args, kwargs, device, 0.0)
            yield made

    def _torch(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        device: torch.device,
        load: float | None,
    ) -> Ready:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, dict(kwargs)))
        events: list[float] = []

        def call() -> None:
            model(*args, **kwargs)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

        def call_on_cuda() -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            model(*args, **kwargs)
            end.record()
            torch.cuda.synchronize(device)
            events.append(begin.elapsed_time(end) / 1e3)

        chosen = call_on_cuda if device.type == "cuda" else call
        started = time.perf_counter()
        chosen()
        first = time.perf_counter() - started
        seconds = first if load is not None and self.backend == "compile" else load
        return Ready(chosen, device.type, seconds, events=events)

    def _session(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], settings: Settings
    ) -> Ready:
        assert not isinstance(self.model, nn.Module)
        path, provider = Path(self.model), self.backend.removeprefix(_ORT)
        options = _graph_options(provider) if settings.cuda_graphs else {}
        started = time.perf_counter()
        runner = OnnxRunner(
            path, provider, threads=settings.threads, tf32=settings.tf32, provider_options=options
        )
        seconds = time.perf_counter() - started
        feeds = runner.feeds(args, kwargs)
        # A captured graph writes to the addresses it was captured with: they must stay.
        fixed = Session(path, "cpu").run(feeds) if options else None
        call = runner.session.bound(feeds, fixed)
        return Ready(call, runner.provider, seconds, runner.session.nodes_per_provider())


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _graph_options(provider: str) -> dict[str, str]:
    names = {"cuda": "enable_cuda_graph", "tensorrt": "trt_cuda_graph_enable"}
    return {names[provider]: "1"} if provider in names else {}


def takes(backend: str, model: Model) -> bool:
    """Tell whether a backend runs such a model: torch modules and ``.pt2``, ONNX Runtime ``.onnx``.

    Raises:
        UsageError: another kind of file.

    >>> [takes(backend, nn.ReLU()) for backend in ("eager", "compile", "ort-cpu")]
    [True, True, False]
    """
    if isinstance(model, nn.Module):
        return not backend.startswith(_ORT)
    path = Path(model)
    if path.suffix not in (".onnx", ".pt2"):
        what = "a file to time ends in .onnx or .pt2"
        raise UsageError(Problem(str(path), what, "load others with normconv.load"))
    if not path.is_file():
        raise UsageError(Problem(str(path), "there is no such file"))
    return backend == "eager" if path.suffix == ".pt2" else backend.startswith(_ORT)


def backend_problem(backend: str) -> str:
    """Say why one of `BACKENDS` cannot be used here; nothing when it can, as a tiny model shows."""
    if backend.startswith(_ORT):
        return provider_problem(backend.removeprefix(_ORT))
    return compiler_problem() if backend == "compile" else ""


def compiler_problem() -> str:
    """Compile a ReLU and say what is wrong with torch.compile here; nothing when it works."""
    try:
        with quiet(), torch.no_grad():
            found = torch.compile(nn.ReLU())(torch.tensor([-1.0, 2.0]))
    except Exception as error:
        # No compiler, no Triton, a Python that is too new: each says so in its own way.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return "" if found.tolist() == [0.0, 2.0] else f"it computes {found.tolist()} for [0, 2]"
