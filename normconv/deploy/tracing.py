"""The older exporter, which traces one run of a module, for what the newer refuses."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normconv.deploy.axes import Axes, axis_names, other_sizes_of
from normconv.deploy.branches import values_read
from normconv.deploy.clean import SCOPES_KEY
from normconv.deploy.compare import onnx_name
from normconv.deploy.inputs import at_size, batch_size, named_inputs, size_of
from normconv.deploy.program import Program, flat_forward, to_onnx
from normconv.errors import CaptureError, Problem
from normconv.graph.quiet import quiet

__all__ = ["to_onnx_or_traced"]

_TRACED = (
    "torch.export failed, so the older exporter (dynamo=False) traced one run, in which nothing that "
    "depends on the values of the inputs was read outside of torch"
)


def to_onnx_or_traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dynamic_batch: bool,
    opset: int,
    traceable: bool,
    free: Axes | None = None,
) -> Program:
    """Capture a module by torch.export, and where that fails by tracing one run of it.

    Args:
        model: in eval mode; give a copy.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_batch: leave the batch axis free.
        opset: the operator set.
        traceable: allow the tracer. What it writes holds for one path through the module: none that
            reads values computed from the inputs is traced, and only a file whose numbers are checked
            may come from it.
        free: axes to leave free besides, by input.

    Raises:
        CaptureError: no graph could be made.
        Refused: the model fixes the size of an axis of `free`.
    """
    try:
        return to_onnx(model, args, kwargs, dynamic_batch=dynamic_batch, opset=opset, free=free)
    except CaptureError as refusal:
        if not traceable:
            raise
        _refuse_branches(model, args, kwargs, refusal)
        try:
            return _traced(model, args, kwargs, dynamic_batch, opset, free or {})
        except Exception as error:  # a tracer runs the user's code
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            also = Problem(type(model).__name__, f"tracing it failed too: {line}")
            raise CaptureError([*refusal.problems, also]) from error


def _refuse_branches(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], refusal: CaptureError
) -> None:
    """Raise where a trace would fix what depends on the values of the inputs."""
    try:
        with quiet():
            read = values_read(model, args, kwargs)
    except Exception:  # what the module raises here it raises in the trace too, where it is told
        return
    if read:
        what = (
            f"tracing it would fix what its forward reads of its inputs' values ({', '.join(read)})"
        )
        way_out = "compute the choice in torch (torch.where, torch.cond), or export a part: at="
        raise CaptureError(
            [*refusal.problems, Problem(type(model).__name__, what, way_out)]
        ) from refusal


def _traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_batch: bool,
    opset: int,
    asked: Axes,
) -> Program:
    named = named_inputs(model, args, kwargs)
    batch = batch_size(args, kwargs) if dynamic_batch else None
    norms = sum(isinstance(module, _NormBase) for module in model.modules())
    with flat_forward(model), quiet(), torch.no_grad():
        outputs = model(*args, **kwargs)
        names = [onnx_name(name) for name in outputs]
        free = {**named, **dict(zip(names, outputs.values(), strict=True))}
        axes = {n: {0: "batch"} for n, v in free.items() if v.ndim and v.shape[0] == batch}
        followed = _followed(model, args, kwargs, asked, outputs)
        for name, its in (*asked.items(), *((onnx_name(n), its) for n, its in followed.items())):
            axes[name] = {**axes.get(name, {}), **its}
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            path = Path(folder) / "traced.onnx"
            torch.onnx.export(
                model,
                args,
                path,
                kwargs=dict(kwargs),
                dynamo=False,
                opset_version=opset,
                input_names=list(named),
                output_names=names,
                dynamic_axes=axes,
            )
            graph = ir.from_proto(onnx.load(path))
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        # The exporter guesses free axes of the outputs, and gives them the batch's name.
        free_axes = axes.get(str(value.name), {})
        sizes = free[str(value.name)].shape
        value.shape = ir.Shape([free_axes.get(i, int(size)) for i, size in enumerate(sizes)])
    for node in ir.traversal.RecursiveGraphIterator(graph.graph):
        if module := _module_of(str(node.name or "")):
            # As the newer exporter says it; cleaning reads that.
            node.metadata_props[SCOPES_KEY] = repr(["", module, node.name])
    return Program(graph, tuple(named), norms, batch is not None, _TRACED, "torchscript", asked)


def _followed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    asked: Axes,
    outputs: Mapping[str, Tensor],
) -> dict[str, dict[int, str]]:
    """Find the axes of the outputs that change with the asked ones: by running another size."""
    found: dict[str, dict[int, str]] = {}
    for name in axis_names(asked):
        own = size_of(model, args, kwargs, asked, name)
        for size in other_sizes_of(own):
            given, named = at_size(model, args, kwargs, asked, name, size)
            try:
                others = model(*given, **named)
            except Exception:  # a size that the model itself does not take
                continue
            for key, value in outputs.items():
                for axis, (old, new) in enumerate(
                    zip(value.shape, others[key].shape, strict=False)
                ):
                    if old != new:
                        label = name if (old, new) == (own, size) else f"{onnx_name(key)}_{axis}"
                        found.setdefault(key, {})[axis] = label
            break
    return found


_LAST = re.compile(r"/[^/]*$")


def _module_of(node: str) -> str:
    """Read the module's name out of a traced node's.

    >>> _module_of("/layers/layers.0/conv/Conv_1")
    'layers.0.conv'
    """
    parts: list[str] = []
    for part in _LAST.sub("", node).strip("/").split("/"):
        # A container stands twice: by its own name, and before its child's number.
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        elif part:
            parts.append(part)
    return ".".join(parts)
