"""How fast models run, side by side: modules on torch, files in ONNX Runtime."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normconv.deploy.contenders import BACKENDS, Contender, Ready, Settings, backend_problem, takes
from normconv.deploy.inputs import batch_size, resized
from normconv.deploy.onnx_graph import external_files, node_counts, norm_nodes, weight_arithmetic
from normconv.deploy.runners import Model, tf32_set
from normconv.deploy.verification import Batch, batches_of
from normconv.errors import NormconvError, Problem, Refused, UsageError
from normconv.graph import is_norm
from normconv.numerics import peak_memory, quartiles, ratios_by_turn, take_turns
from normconv.report import Report

__all__ = ["bench"]

Row = dict[str, Any]

_CALLS = 3  # measured, of a turn
_TURNS = 5  # at least
_WARM_UP = 2  # calls, besides the one that shows that the model runs
_PAUSE = 0.005  # seconds: threads of the one before stop spinning

_MODEL_FACTS = ("bytes", "nodes", "norm_nodes", "weight_arithmetic")


def bench(
    models: Mapping[str, Model],
    inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = None,
    backends: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 5.0,
    tf32: bool = False,
    cuda_graphs: bool = False,
    progress: Callable[[str], object] = lambda line: None,
) -> Report:
    """Time models side by side: latency, throughput, memory, load time, size, node counts.

    All that run at one batch size take turns of three calls, in an order that is turned round after
    each round, so that whatever else the machine does falls on all of them. A ratio compares the
    median calls of one turn with those of the first model on the same backend, or of the first of all
    where that model does not run there; the median over the turns is given with its quartiles.

    A module runs as it is, without its weight norms folded: fold it first. A call of a file reads
    inputs that are in place and leaves its outputs there.

    Args:
        models: modules and paths of ``.onnx`` and ``.pt2`` files, by the name they get in the report.
        inputs: as `verify` takes them; of several batches the first.
        batch_sizes: samples a call, made of the inputs' own; None takes as many as there are.
        backends: of ``eager``, ``compile``, ``ort-cpu``, ``ort-cuda`` and ``ort-tensorrt``; None takes
            all but ``compile``. What this machine lacks is listed with the reason.
        threads: of one operator, in torch and in ONNX Runtime; None takes torch's number.
        seconds: for the turns at each batch size; at least five rounds are taken.
        tf32: allow TF32 on CUDA.
        cuda_graphs: let ONNX Runtime capture and replay a CUDA graph.
        progress: called with a line before each stage.

    Returns:
        The report. ``facts["timings"]`` has a row for each model, backend and batch size,
        ``facts["models"]`` the sizes and node counts, ``facts["absent"]`` what was not measured and
        why.

    Raises:
        UsageError: no model, an unknown backend, a batch size below 1, no such file.
        Refused: nothing of what was asked for can run here; every reason is listed.

    >>> report = bench({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}, torch.zeros(2, 4), seconds=0)
    >>> [(row["model"], row["backend"], row["ratio_to"]) for row in report.facts["timings"]]
    [('a', 'eager', 'a on eager'), ('b', 'eager', 'a on eager')]
    """
    batch = batches_of(inputs)[0]
    sizes = _sizes(batch, batch_sizes)
    absent: list[Row] = []
    contenders = _contenders(models, backends, absent)
    settings = Settings(threads or torch.get_num_threads(), tf32, cuda_graphs)
    rows: list[Row] = []
    with _settled(settings):
        for size in sizes:
            args, kwargs = resized(batch, batch_size(*batch) or size, size)
            rows += _measured(contenders, (args, kwargs), size, settings, seconds, absent, progress)
    if not rows:
        raise Refused([Problem(row["what"], row["reason"]) for row in absent])
    facts = {
        "machine": _machine(settings, batch),
        "models": {name: _about(model) for name, model in models.items()},
        "timings": rows,
        "absent": absent,
    }
    return Report("bench", ", ".join(models), facts=facts)


def _sizes(batch: Batch, wanted: Sequence[int] | None) -> list[int]:
    own = batch_size(*batch)
    if wanted is None:
        return [own or 1]
    sizes = list(dict.fromkeys(wanted))
    if not sizes or min(sizes) < 1:
        raise UsageError(Problem("batch_sizes", f"{list(wanted)} are not all 1 or more"))
    if own is None:
        raise UsageError(Problem("batch_sizes", "no input has a batch axis", "leave them out"))
    if own < 1:
        raise UsageError(Problem("inputs", "they hold no sample"))
    return sizes


def _contenders(
    models: Mapping[str, Model], backends: Sequence[str] | None, absent: list[Row]
) -> list[Contender]:
    """Pair models with the backends that work here and take them; note those that do not work."""
    if not models:
        raise UsageError(Problem("models", "there is none"))
    asked = [name for name in BACKENDS if name != "compile"] if backends is None else backends
    if unknown := [name for name in asked if name not in BACKENDS]:
        what = f"{', '.join(map(repr, unknown))}: there are {', '.join(BACKENDS)}"
        raise UsageError(Problem("backends", what))
    found = []
    for backend in dict.fromkeys(asked):
        taken = [name for name, model in models.items() if takes(backend, model)]
        if not taken:
            if backends is not None:
                kind = ".onnx files" if backend.startswith("ort-") else "modules"
                absent.append({"what": backend, "reason": f"it runs {kind}, and there is none"})
        elif problem := backend_problem(backend):
            absent.append({"what": backend, "reason": problem})
        else:
            found += [Contender(name, models[name], backend) for name in taken]
    timed = {contender.name for contender in found}
    asked_of = ", ".join(asked)
    for name in models:
        if name not in timed:
            absent.append({"what": name, "reason": f"none of {asked_of} runs it here"})
    return found


@contextmanager
def _settled(settings: Settings) -> Iterator[None]:
    """Set torch's threads and TF32, and set them back."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(settings.threads)
        with tf32_set(settings.tf32):
            yield
    finally:
        torch.set_num_threads(threads)


def _measured(
    contenders: Sequence[Contender],
    batch: Batch,
    size: int,
    settings: Settings,
    seconds: float,
    absent: list[Row],
    progress: Callable[[str], object],
) -> list[Row]:
    """Load all, one after the other, and time them in turns."""
    if any(contender.backend == "compile" for contender in contenders):
        torch.compiler.reset()  # else a compiled model's variants for other sizes count against it
    rows: list[Row] = []
    loaded: list[Ready] = []
    with ExitStack() as stack:
        for contender in contenders:
            progress(f"batch {size}: load {contender}")
            try:
                ready, memory = _loaded(stack, contender, batch, settings)
            except Exception as error:
                # Whatever a model raises on these inputs is why it is not among the timed.
                reason = _first_line(error)
                absent.append({"what": f"{contender} at batch {size}", "reason": reason})
                continue
            loaded.append(ready)
            row: Row = {"model": contender.name, "backend": contender.backend}
            rows.append({**row, "device": ready.device, "batch_size": size, **memory})
        progress(f"batch {size}: {len(loaded)} take turns")
        for ready in loaded:
            for _ in range(_WARM_UP):
                ready.call()
            ready.events.clear()
        works = [ready.call for ready in loaded]
        times = take_turns(
            works, seconds=seconds, least=_TURNS, calls=_CALLS, unmeasured=1, pause=_PAUSE
        )
    for row, ready, turns in zip(rows, loaded, times, strict=True):
        first = _compared_with(row, rows)
        row.update(_latency(turns, size))
        row.update(_ratio(turns, times[first], rows[first]))
        row["load_ms"] = None if ready.load_seconds is None else 1e3 * ready.load_seconds
        row["device_ms"] = 1e3 * statistics.median(ready.events) if ready.events else None
        row["nodes_by_provider"] = ready.nodes
    return rows


def _loaded(
    stack: ExitStack, contender: Contender, batch: Batch, settings: Settings
) -> tuple[Ready, Row]:
    """Load a model and run it once, and see what memory that takes."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    with peak_memory() as peak:
        ready = stack.enter_context(contender.ready(*batch, settings))
    row: Row = {"peak_bytes": peak.bytes, "device_bytes": None}
    if cuda and ready.device != "cpu":
        # torch counts what it allocates; ONNX Runtime's arena is never given back while it is open.
        torch_peak = torch.cuda.max_memory_allocated() - before
        taken = free - torch.cuda.mem_get_info()[0]
        row["device_bytes"] = taken if contender.backend.startswith("ort-") else torch_peak
    return ready, row


def _compared_with(row: Row, rows: Sequence[Row]) -> int:
    """The place of the first row's model on this row's backend; where it does not run there, 0."""
    model = rows[0]["model"]
    same = (i for i, r in enumerate(rows) if (r["model"], r["backend"]) == (model, row["backend"]))
    return next(same, 0)


def _latency(turns: Sequence[Sequence[float]], size: int) -> Row:
    """Summarise the calls of one contender."""
    calls = [1e3 * call for turn in turns for call in turn]
    low, middle, high = quartiles(calls)
    return {
        "latency_ms": middle,
        "latency_ms_quartiles": [low, high],
        "p95_ms": statistics.quantiles(calls, n=20, method="inclusive")[-1],
        "throughput": 1e3 * size / middle,
        "calls": len(calls),
        "turns": len(turns),
    }


def _ratio(turns: Sequence[Sequence[float]], first: Sequence[Sequence[float]], of: Row) -> Row:
    low, middle, high = quartiles(ratios_by_turn(turns, first))
    return {
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "ratio_to": f"{of['model']} on {of['backend']}",
    }


def _about(model: Model) -> Row:
    """Size and node counts; of a module the bytes of its tensors and its norm layers."""
    if isinstance(model, nn.Module):
        tensors = (*model.parameters(), *model.buffers())
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        norms = sum(is_norm(module) for module in model.modules())
        values: tuple[int | None, ...] = (size, None, norms, None)
        return {"form": type(model).__name__, **dict(zip(_MODEL_FACTS, values, strict=True))}
    path = Path(model)
    if path.suffix != ".onnx":
        values = (path.stat().st_size, None, None, None)
    else:
        files = (path, *external_files(path))
        size = sum(file.stat().st_size for file in files)
        counts = sum(node_counts(path).values())
        values = (size, counts, len(norm_nodes(path)), len(weight_arithmetic(path)))
    return {"form": path.name, **dict(zip(_MODEL_FACTS, values, strict=True))}


def _machine(settings: Settings, batch: Batch) -> Row:
    found: Row = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "system": f"{platform.system()} {platform.machine()}",
        "inputs": ", ".join(
            f"{str(leaf.dtype).removeprefix('torch.')} {'x'.join(map(str, leaf.shape))}"
            for leaf in torch.utils._pytree.tree_leaves(batch)
            if isinstance(leaf, torch.Tensor)
        ),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
        found["CUDA"] = torch.version.cuda
        found["TF32"] = "allowed" if settings.tf32 else "off"
        found["CUDA graphs"] = "in ONNX Runtime" if settings.cuda_graphs else "off"
    return found


def _processor() -> str:
    """The processor's name; platform gives only its family on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return lines[0] if isinstance(error, NormconvError) else f"{type(error).__name__}: {lines[0]}"
