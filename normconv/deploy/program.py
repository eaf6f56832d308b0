"""From a torch module to an ONNX graph: free axes, names, capture. Nothing is written here."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.deploy.axes import Axes, Limits, axis_names, name_axes
from normconv.deploy.compare import onnx_name
from normconv.deploy.inputs import at_size, batch_size, has_batch, named_inputs, resized, size_of
from normconv.errors import CaptureError, Problem, Refused
from normconv.graph.quiet import quiet
from normconv.proof.outputs import flat_outputs

__all__ = ["Program", "flat_forward", "to_onnx"]

_BATCH = "batch"
# Both become BatchNormalization nodes: an instance norm with running statistics does too.
_BATCH_NORMS = ("batch_norm", "instance_norm")


@dataclass(frozen=True)
class Program:
    """An ONNX graph, not cleaned and not written.

    Args:
        model: the graph; its weights share memory with the module's.
        inputs: the names of the inputs, in order.
        batch_norms: how many batch norms the torch graph has.
        dynamic: True when the batch axis is free.
        note: why it is not, when a free one was asked for.
        exporter: what captured the module: ``"torch.export"`` or ``"torchscript"``.
        free: the other axes that are free, by input.
        limits: the sizes for which the capture holds, by axis name.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    batch_norms: int
    dynamic: bool
    note: str = ""
    exporter: str = "torch.export"
    free: Axes = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)


def to_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dynamic_batch: bool,
    opset: int,
    free: Axes | None = None,
) -> Program:
    """Capture a module and translate it to ONNX.

    Args:
        model: in eval mode; its ``forward`` is wrapped while it is captured, so give a copy.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_batch: leave the batch axis free where that is possible.
        opset: the operator set.
        free: axes to leave free besides, by input.

    Raises:
        CaptureError: no graph could be made, with a free batch or without.
        Refused: the model fixes the size of an axis of `free`; a CaptureError where a recurrent layer
            may be the cause.
    """
    with flat_forward(model):
        return _capture(model, args, kwargs, dynamic_batch, opset, free or {})


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_batch: bool,
    opset: int,
    free: Axes,
) -> Program:
    batch = batch_size(args, kwargs) if dynamic_batch else None
    note = ""
    if batch is not None:
        # torch.export takes a size of 0 or 1 for a constant.
        wide = max(batch, 2)
        wide_args, wide_kwargs = resized((args, dict(kwargs)), batch, wide)
        try:
            return _freed(model, wide_args, wide_kwargs, opset, free, wide)
        except Refused:
            raise
        except Exception as error:
            note = f"the batch axis is fixed at {batch}: a free one failed ({_summary(error)})"
    elif dynamic_batch:
        note = "the batch axis is fixed: no input has one"
    try:
        return replace(_freed(model, args, dict(kwargs), opset, free, None), note=note)
    except Refused:
        raise
    except Exception as error:
        raise CaptureError(
            Problem(
                type(model).__name__,
                f"torch.export made no ONNX graph: {_summary(error)}",
                "rewrite what depends on the data, or export a part of the model",
            )
        ) from error


def _freed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opset: int,
    free: Axes,
    batch: int | None,
) -> Program:
    """Capture with the batch axis free, where there is one, and the axes of `free`."""
    for name in axis_names(free):
        # As with the batch: a size of 1 would be taken for a constant.
        if size_of(model, args, kwargs, free, name) == 1:
            args, kwargs = at_size(model, args, kwargs, free, name, 2)
    named = named_inputs(model, args, kwargs)
    axes = {key: dict(free.get(key, {})) for key in named}
    for key, tensor in named.items():
        if batch is not None and has_batch(tensor, batch):
            axes[key][0] = _BATCH
    names = axis_names(axes)
    dims: dict[str, Any] = {name: torch.export.Dim(name, min=1) for name in names}
    try:
        program = _translate(model, args, kwargs, axes, dims, opset)
    except Exception as error:
        if not free:
            raise
        # A Dim holds for every size. A hint lets torch say for which sizes its graph holds.
        hints = dict.fromkeys(dims, torch.export.Dim.AUTO)
        try:
            program = _translate(model, args, kwargs, axes, hints, opset)
        except Exception:
            raise error from None
        _refuse_fixed(model, program.limits, axis_names(free), error)
        if program.limits.get(_BATCH, (0, None)) == (batch, batch):
            raise
    return replace(program, dynamic=batch is not None, free=free)


def _refuse_fixed(model: nn.Module, limits: Limits, names: list[str], error: Exception) -> None:
    """Refuse the axes that the model takes at the example's size alone."""
    guards = [line.strip("- \t") for line in str(error).splitlines() if "guard" in line]
    problems = [
        Problem(
            f"axis {name!r}",
            f"the model fixes its size at {limits[name][0]}: "
            + next((line for line in guards if f" {name} =" in line), _summary(error)),
            "leave it out, or compute what depends on the size from the input's shape, without int()",
        )
        for name in names
        if name in limits and limits[name][0] == limits[name][1]
    ]
    if not problems:
        return
    # torch.export unrolls a recurrent layer over its time axis; the tracer writes it as one node.
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        raise CaptureError(problems)
    raise Refused(problems)


def _translate(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: Axes,
    dims: Mapping[str, Any],
    opset: int,
) -> Program:
    with quiet(), torch.no_grad():
        captured = torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=_dynamic_shapes(model, args, kwargs, axes, dims) if dims else None,
            strict=False,
            # A guard on the batch becomes a run-time assertion; the checks at other batches decide.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        norms = sum(
            any(word in str(node.target) for word in _BATCH_NORMS)
            for node in captured.graph.nodes
            if node.op == "call_function"
        )
        outputs = [onnx_name(name) for name in _output_names(captured)]
        program = torch.onnx.export(
            captured,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            output_names=outputs,
            external_data=False,
        )
    assert program is not None
    graph: ir.Model = program.model
    limits = _limits(graph, captured, axes)
    name_axes(graph, axes)
    names = tuple(str(value.name) for value in graph.graph.inputs)
    return Program(graph, names, norms, dynamic=False, limits=limits)


def _limits(
    graph: ir.Model, captured: torch.export.ExportedProgram, axes: Axes
) -> dict[str, tuple[int, int | None]]:
    """Return for which sizes of each axis the capture holds."""
    ranges = {str(symbol): span for symbol, span in captured.range_constraints.items()}
    limits: dict[str, tuple[int, int | None]] = {}
    for value, its in zip(graph.graph.inputs, axes.values(), strict=False):
        for axis, name in its.items():
            size = (value.shape or ())[axis]
            if isinstance(size, int):
                limits[name] = (size, size)
            elif (span := ranges.get(str(size))) is not None:
                upper: Any = span.upper
                limits[name] = (int(span.lower), int(upper) if upper.is_Integer else None)
    return limits


@contextlib.contextmanager
def flat_forward(model: nn.Module) -> Iterator[None]:
    """Let the model return {name: tensor}: integers and None in an output break the exporter."""
    forward = model.forward
    own = model.__dict__.get("forward")

    @functools.wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return flat_outputs(forward(*args, **kwargs))

    model.__dict__["forward"] = flat
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _output_names(captured: torch.export.ExportedProgram) -> list[str]:
    """Name the outputs in the order in which they were flattened."""
    spec = captured.call_spec.out_spec
    assert spec is not None
    structure = pytree.tree_unflatten([torch.tensor(i) for i in range(spec.num_leaves)], spec)
    # torch.export reads the graph of a GraphModule and never calls its forward: not flattened.
    named = structure if _is_flat(structure) else flat_outputs(structure)
    return sorted(named, key=lambda name: int(named[name]))


def _is_flat(structure: Any) -> bool:
    return isinstance(structure, dict) and all(
        str(name).split(".")[0] == "output" for name in structure
    )


def _dynamic_shapes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: Axes,
    dims: Mapping[str, Any],
) -> dict[str, Any]:
    named = named_inputs(model, args, kwargs)
    of = {id(named[key]): {axis: dims[n] for axis, n in its.items()} for key, its in axes.items()}
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    # A dict without axes would be taken for a structure.
    shapes = pytree.tree_map(lambda leaf: of.get(id(leaf)) or None, dict(bound))
    assert isinstance(shapes, dict)
    return shapes


def _summary(error: BaseException) -> str:
    """Return the first telling line of an exception, and of what caused it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
