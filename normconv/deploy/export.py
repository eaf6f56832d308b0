"""Exporting a model to ONNX: fold, capture, clean, check the graph, check the numbers, publish."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from normconv.deploy import onnx_graph
from normconv.deploy.axes import Asked, Axes, asked_axes, axis_names
from normconv.deploy.certify import certified, check_golden_path
from normconv.deploy.clean import clean
from normconv.deploy.inputs import batch_size, named_inputs
from normconv.deploy.parity import backend_parity, rounded_parity
from normconv.deploy.parts import part_of
from normconv.deploy.precision import precision_of
from normconv.deploy.probing import provider_problem
from normconv.deploy.profiles import Profile, profile_of
from normconv.deploy.program import Program
from normconv.deploy.provenance import Origin
from normconv.deploy.rounding import round_graph
from normconv.deploy.session import onnxruntime_module
from normconv.deploy.stamp import stamp
from normconv.deploy.tracing import to_onnx_or_traced
from normconv.deploy.write import data_path, draft, publish, save
from normconv.errors import CheckFailed, Problem, Refused, UsageError
from normconv.folding import fold
from normconv.numerics import give_back_memory
from normconv.report import Check, Report

__all__ = ["export_onnx"]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: tuple[Any, ...] | torch.Tensor,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic: Asked | None = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    check: bool = True,
    providers: Sequence[str] | None = None,
    runtime: str = "generic",
    at: str = "",
    method: str = "",
    dtype: str | None = None,
    golden: str | os.PathLike[str] | None = None,
    origin: Origin | None = None,
) -> Report:
    """Write a model as an ONNX file with plain weights, and prove the file.

    A copy is folded, captured by torch.export and translated. What was written is read again and
    checked: its graph, and its outputs in ONNX Runtime against a float64 run of `model`, at the
    example's batch and, where the batch axis is free, at one and at an odd other batch.

    Args:
        model: any module; not changed.
        path: the file to write. Weights above 2 GB go to ``NAME.data`` beside it.
        example_inputs: positional inputs, as torch.export takes them; one tensor stands for itself.
        example_kwargs: keyword inputs.
        dynamic_batch: leave axis 0 of the inputs free. Every input tensor whose axis 0 has the size
            of the first one's counts as batched.
        dynamic: other axes to leave free, and their names in the file: ``{2: "frames"}`` for every
            input that has the first one's size there, ``{"x": {2: "frames"}}`` for one input, or
            both together. The file is run at three sizes or more of each. Where it names an axis 0,
            or an axis "batch", `dynamic_batch` adds nothing.
        opset: the operator set; None takes the one of `runtime`.
        input_names: names of the inputs, instead of the parameters of ``forward``.
        output_names: names of the outputs, instead of ``output``, ``output_0`` or the model's own.
        check: compare with ONNX Runtime; the graph is checked in any case.
        providers: what to run on, of ``"cpu"``, ``"cuda"`` and ``"tensorrt"``; None takes that of
            `runtime` where this machine has it, else the best there is.
        runtime: what the file is for: ``"generic"``, ``"ort-cpu"``, ``"ort-cuda"``, ``"tensorrt"``.
        at: export this submodule only, with the inputs it gets when the whole model runs.
        method: export this method instead of ``forward``; the example inputs are then its own.
        dtype: what the file computes in: ``"fp32"``, ``"fp16"`` or ``"bf16"``; None leaves it as the
            model is. Norms stay in float32 between casts, inputs and outputs too. A bf16 file has
            opset 22.
        golden: an ``.npz`` file to write: the example inputs, the original's float64 outputs and the
            bound of each, for `verify_certificate` on another machine.
        origin: where the model comes from, for the certificate: the file or spec it was loaded from,
            or the report of its conversion.

    Returns:
        The report; `path` holds the file, and ``NAME.certificate.json`` beside it the certificate.

    Raises:
        UsageError: an unknown runtime, dtype, submodule or method, an opset out of range, names that do
            not fit, an axis that no input has, a folder or a disk that takes no file.
        Refused: a provider that was asked for is not there; an LSTM with a projection, which ONNX has
            not; an axis of `dynamic` whose size the model fixes; weights beyond the range of `dtype`.
        CaptureError: no graph could be made.
        MissingDependency: no ONNX Runtime to check with.
        CheckFailed: a check failed; the file stands at ``NAME.rejected`` and `path` is untouched.
    """
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    profile = profile_of(runtime)
    precision = precision_of(dtype, model, opset, golden)
    opset = profile.checked_opset(None if precision.least_opset else opset)
    # Before the work: what is missing to check with.
    on, note = _providers(profile, providers) if check else ((), "")
    model, args, kwargs, notes = part_of(model, at, method, args, kwargs)
    _refuse_projections(model)
    free = asked_axes(dynamic or {}, named_inputs(model, args, kwargs))
    if any(0 in axes for axes in free.values()) or "batch" in axis_names(free):
        dynamic_batch = False
    clock = _Clock()
    path = Path(path)
    check_golden_path(golden, path)
    with draft(path) as written:
        program = _program(model, args, kwargs, dynamic_batch, free, opset, clock, traceable=check)
        _rename(program, input_names, output_names)
        clean(program.model)
        rounded = round_graph(program.model, precision) if precision.is_half else None
        program.model.metadata_props.update(stamp(model))
        save(program.model, written)
        inputs = tuple(str(value.name) for value in program.model.graph.inputs)
        report = _described(model, path, args, kwargs, program).extended(
            facts={
                "runtime": profile.name,
                "group_norm": profile.group_norm(opset),
                "exporter": program.exporter,
                **({"at": at} if at else {}),
                **({"method": method} if method else {}),
                **(rounded.facts if rounded else {}),
            },
            notes=(*notes, note) if note else notes,
        )
        batch_norms, batched, limits = program.batch_norms, program.dynamic, program.limits
        # The graph shares the folded weights: with it goes the folded copy.
        _release_weights(program.model)
        del program
        give_back_memory(cycles=True)
        clock.lap("write")
        report = _with_graph(report, written, batch_norms)
        give_back_memory()
        clock.lap("check graph")
        if check:
            for provider in on:
                if rounded:
                    sizes = batched or bool(free)
                    parity = rounded_parity(model, written, args, kwargs, sizes, provider)
                else:
                    parity = backend_parity(
                        model,
                        written,
                        args,
                        kwargs,
                        inputs=inputs,
                        dynamic=batched,
                        provider=provider,
                        free=free,
                        limits=limits,
                    )
                report = report.extended(
                    checks=parity.checks, facts=parity.facts, notes=parity.notes
                )
            clock.lap("check numbers")
        report = report.extended(facts={"seconds": clock.laps})
        runs_on = providers or (None,)
        with certified(
            report, written, model, args, kwargs, providers=runs_on, golden=golden, origin=origin
        ) as report:
            final = publish(written, path, accepted=report.passed)
    if not report.passed:
        raise CheckFailed(report.extended(facts={"rejected": final.name}))
    return report


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def _providers(profile: Profile, asked: Sequence[str] | None) -> tuple[tuple[str | None, ...], str]:
    """Return the providers to check on, and a note where it is not the runtime's own."""
    onnxruntime_module()
    problems = {name: provider_problem(name) for name in asked or ()}
    if any(problems.values()):
        way_out = "use provider cpu, or see `normconv doctor`"
        raise Refused([Problem(f"provider {n}", p, way_out) for n, p in problems.items() if p])
    if asked:
        return tuple(asked), ""
    own = profile.provider
    if own is None or not (problem := provider_problem(own)):
        return (own,), ""
    return (None,), f"written for {profile.name}, and not checked on {own}: {problem}"


def _refuse_projections(model: nn.Module) -> None:
    """Torch writes a node for them that no runtime takes."""
    problems = [
        Problem(
            name or type(module).__name__,
            f"is an LSTM with proj_size={module.proj_size}, and ONNX's LSTM has no projection",
            "export a model without it, or run it in PyTorch",
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.LSTM) and module.proj_size
    ]
    if problems:
        raise Refused(problems)


def _program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_batch: bool,
    free: Axes,
    opset: int,
    clock: _Clock,
    traceable: bool,
) -> Program:
    folded = fold(model, share_tensors=True).model.eval()
    clock.lap("fold")
    program = to_onnx_or_traced(
        folded,
        args,
        kwargs,
        dynamic_batch=dynamic_batch,
        opset=opset,
        traceable=traceable,
        free=free,
    )
    clock.lap("export")
    return program


def _release_weights(graph: ir.Model) -> None:
    """Let go of a graph's weights: it is a cycle, and the rewriter's rules keep the last one they saw."""
    for value in graph.graph.initializers.values():
        value.const_value = None


def _rename(
    program: Program, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> None:
    graph = program.model.graph
    problems = []
    for option, names, values in (
        ("input_names", input_names, graph.inputs),
        ("output_names", output_names, graph.outputs),
    ):
        if names is None:
            continue
        if len(names) != len(values) or len(set(names)) != len(names):
            own = ", ".join(str(value.name) for value in values)
            problems.append(
                Problem(
                    option, f"{list(names)} does not name {len(values)} different values ({own})"
                )
            )
            continue
        for value, name in zip(values, names, strict=True):
            value.name = name
    if problems:
        raise UsageError(problems)


def _described(
    model: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], program: Program
) -> Report:
    shapes = {name: list(value.shape) for name, value in named_inputs(model, args, kwargs).items()}
    notes = [program.note] if program.note else []
    for name, (lower, upper) in program.limits.items():
        if lower > 2 or upper is not None:
            to = "" if upper is None else f" to {upper}"
            notes.append(f"{name}: torch.export captured what the model does from {lower}{to}")
    if program.dynamic and batch_size(args, kwargs) == 1:
        notes.append("the example has one sample: it was repeated to capture a free batch axis")
    return Report(
        "export",
        subject=type(model).__name__,
        facts={"file": path.name, "example_shapes": shapes},
        notes=tuple(notes),
    )


def _with_graph(report: Report, path: Path, batch_norms: int) -> Report:
    """Read what was written and check its graph."""
    proto = onnx.load(path, load_external_data=False)
    graph = onnx_graph.as_ir(proto)
    counts = onnx_graph.node_counts(graph)
    norms = onnx_graph.norm_nodes(graph)
    arithmetic = onnx_graph.weight_arithmetic(graph)
    unstored = onnx_graph.non_initializer_weights(graph)
    leaks = onnx_graph.leaked_paths(proto)
    found = counts.get("BatchNormalization", 0)
    computed = [use for use in unstored if not use.from_input]
    checks = (
        Check.at_most(
            "BatchNormalization nodes", found, batch_norms, f"the model has {batch_norms}"
        ),
        _none("weight arithmetic", arithmetic, "nodes compute weights"),
        _none("weights are initializers", computed, "weights are not stored"),
        _none("paths and stack traces", leaks, "strings name this machine's files"),
    )
    from_input = [str(use) for use in unstored if use.from_input]
    notes = (f"weights that depend on the input: {_listed(from_input)}",) if from_input else ()
    size = path.stat().st_size
    if data_path(path).exists():
        size += data_path(path).stat().st_size
    facts = {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "nodes": sum(counts.values()),
        "node_counts": counts,
        "norm_nodes": len(norms),
        "norm_kinds": dict(Counter(norm.kind for norm in norms)),
        "bytes": size,
        "external_data": data_path(path).exists(),
        "dynamic_axes": onnx_graph.dynamic_axes(graph),
    }
    # The checker reads the file itself: what was read here goes first.
    _release_weights(graph)
    del proto, graph
    give_back_memory()
    return report.extended(checks=(*checks, _checker(path)), facts=facts, notes=notes)


def _none(name: str, found: Sequence[object], what: str) -> Check:
    detail = f"{len(found)} {what}: {_listed(found)}" if found else "none"
    return Check(name, not found, float(len(found)), 0.0, detail)


def _listed(found: Sequence[object], most: int = 3) -> str:
    shown = ", ".join(str(item) for item in found[:most])
    return f"{shown} and {len(found) - most} more" if len(found) > most else shown


def _checker(path: Path) -> Check:
    try:
        # By path: the checker reads external data itself and makes no second copy here.
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check("onnx.checker", False, detail=str(error).strip().splitlines()[0])
    return Check("onnx.checker", True, detail="full check with shape inference")
