"""From a torch module to an ONNX graph: batch axis, names, capture. Nothing is written here."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.deploy.compare import onnx_name
from normconv.errors import CaptureError, Problem
from normconv.graph.quiet import quiet
from normconv.proof.outputs import flat_outputs

__all__ = ["Program", "batch_size", "flat_forward", "named_inputs", "resized", "to_onnx"]

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
    """

    model: ir.Model
    inputs: tuple[str, ...]
    batch_norms: int
    dynamic: bool
    note: str = ""
    exporter: str = "torch.export"


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the first axis of the first tensor that has one; None when there is none.

    >>> batch_size((torch.tensor(3.0), torch.zeros(4, 2)), {})
    4
    """
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return None


def resized(value: Any, batch: int, size: int) -> Any:
    """Return nested inputs with `size` samples: the first ones, then repeats.

    A repeated sample of floats is shrunk by eighths, so that no two samples are the same and a
    graph that mixes them up is seen.

    Args:
        value: nested inputs.
        batch: the first axis of the tensors that are resized; others stay.
        size: how many samples are wanted.
    """
    if size == batch:
        return value

    def resize(leaf: Any) -> Any:
        if not _has_batch(leaf, batch):
            return leaf
        index = torch.arange(size, device=leaf.device)
        taken = leaf[index % batch]
        if not taken.is_floating_point():
            return taken
        # 1, 7/8, 6/8 ... 1/8, 1: exact in every dtype.
        scale = 1.0 - (index // batch % 8).to(taken.dtype) / 8.0
        return taken * scale.reshape(-1, *([1] * (taken.ndim - 1)))

    return pytree.tree_map(resize, value)


def named_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return every input tensor by the name it has in an exported graph.

    >>> list(named_inputs(nn.Linear(2, 1), (torch.zeros(1, 2),), {}))
    ['input']
    """
    signature = inspect.signature(model.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    tensors = flat_outputs(arguments)
    return {
        name.removeprefix("output.").replace(".", "_"): value for name, value in tensors.items()
    }


def to_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dynamic_batch: bool,
    opset: int,
) -> Program:
    """Capture a module and translate it to ONNX.

    Args:
        model: in eval mode; its ``forward`` is wrapped while it is captured, so give a copy.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_batch: leave the batch axis free where that is possible.
        opset: the operator set.

    Raises:
        CaptureError: no graph could be made, with a free batch or without.
    """
    with flat_forward(model):
        return _capture(model, args, kwargs, dynamic_batch, opset)


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_batch: bool,
    opset: int,
) -> Program:
    batch = batch_size(args, kwargs) if dynamic_batch else None
    note = ""
    if batch is not None:
        # torch.export takes a size of 0 or 1 for a constant.
        wide = max(batch, 2)
        wide_args, wide_kwargs = resized((args, dict(kwargs)), batch, wide)
        shapes = _dynamic_shapes(model, wide_args, wide_kwargs, wide)
        try:
            return _translate(model, wide_args, wide_kwargs, shapes, opset, note)
        except Exception as error:
            note = f"the batch axis is fixed at {batch}: a free one failed ({_summary(error)})"
    elif dynamic_batch:
        note = "the batch axis is fixed: no input has one"
    try:
        return _translate(model, args, dict(kwargs), None, opset, note)
    except Exception as error:
        raise CaptureError(
            Problem(
                type(model).__name__,
                f"torch.export made no ONNX graph: {_summary(error)}",
                "rewrite what depends on the data, or export a part of the model",
            )
        ) from error


def _translate(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: dict[str, Any] | None,
    opset: int,
    note: str,
) -> Program:
    with quiet(), torch.no_grad():
        captured = torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=shapes,
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
    _name_batch(graph, shapes)
    names = tuple(str(value.name) for value in graph.graph.inputs)
    return Program(graph, names, norms, shapes is not None, note)


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


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int
) -> dict[str, Any]:
    dim = torch.export.Dim(_BATCH, min=1)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(
        lambda leaf: {0: dim} if _has_batch(leaf, batch) else None, dict(bound)
    )
    assert isinstance(shapes, dict)
    return shapes


def _name_batch(model: ir.Model, shapes: dict[str, Any] | None) -> None:
    """Call the free axis "batch": the exporter names it after the tracer's symbol (s17)."""
    if shapes is None:
        return
    symbols = {
        str(value.shape[0])
        for value in model.graph.inputs
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int)
    }
    if len(symbols) != 1:
        return
    symbol = symbols.pop()
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if str(size) == symbol:
                value.shape[axis] = ir.SymbolicDim(_BATCH)


def _summary(error: BaseException) -> str:
    """Return the first telling line of an exception, and of what caused it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
