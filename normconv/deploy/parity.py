"""Holding an exported file in ONNX Runtime against the torch model it was made from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconv.deploy.axes import Axes, Limits, axis_names, other_sizes_of
from normconv.deploy.compare import Comparison, Reference, compare, onnx_name
from normconv.deploy.inputs import at_size, batch_size, named_inputs, resized, size_of
from normconv.deploy.program import to_onnx
from normconv.deploy.runners import session_outputs
from normconv.deploy.session import Session
from normconv.deploy.sizes import OTHER_BATCHES
from normconv.deploy.verification import verify
from normconv.deploy.write import save
from normconv.errors import NormconvError, Refused
from normconv.layers import copy_model
from normconv.numerics import give_back_memory
from normconv.proof.outputs import evaluate
from normconv.report import Check

__all__ = ["Parity", "backend_errors", "backend_parity", "rounded_parity"]

_RAN = ("outputs", "nodes_by_provider", "first to leave the bound")
_FIXED = "export with dynamic_batch=False"
_NOT_FREE = "leave the axis out of `dynamic`, or give an example of another size"
_SIZES = 3  # of an axis that is said to be free, the example's own among them


@dataclass(frozen=True)
class Parity:
    """What running a file showed.

    Args:
        checks: a check per batch and output.
        facts: providers by node count, errors.
        notes: what could not be checked.
    """

    checks: tuple[Check, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def backend_parity(
    model: nn.Module,
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    inputs: Sequence[str],
    dynamic: bool,
    provider: str | None,
    free: Axes | None = None,
    limits: Limits | None = None,
) -> Parity:
    """Run a file in ONNX Runtime and compare it with the model in float64.

    The reference is `model` as it was given, before folding: the fold is proved with the file.

    Args:
        model: the original.
        path: the file.
        args: example inputs.
        kwargs: example keyword inputs.
        inputs: the file's inputs, in order.
        dynamic: also run one sample and three.
        provider: as `Session` takes it.
        free: axes, by input, along which other sizes are run too.
        limits: for which sizes of them the capture holds: those just outside are run too.
    """
    example = (args, kwargs)
    batch = batch_size(args, kwargs)
    others: tuple[int, ...] = ()
    if dynamic and batch is not None:
        others = tuple(size for size in OTHER_BATCHES if size != batch)
    batch = batch or 0
    # One run of the reference at the largest batch serves the smaller ones: in eval mode samples
    # are independent, and where they are not, the reference is run again below.
    largest = max(batch, *others) if others else batch
    args, kwargs = resized((args, kwargs), batch, largest)
    reference = _reference(model, args, kwargs)
    give_back_memory()  # the session comes after the reference: their peaks do not add up
    try:
        # The file is what is proved, not how a runtime rearranges its weights: that takes as much
        # memory again. `verify` runs a file as it is deployed.
        session = Session(path, provider, frugal=True)
    except Refused as refusal:
        return _not_run(model, refusal, provider)
    checks: list[Check] = []
    facts: dict[str, Any] = {}
    for size in dict.fromkeys((batch, *others)):
        give_back_memory()
        label = f"{session.provider} batch {size} " if others else f"{session.provider} "
        given = resized((args, kwargs), largest, size)
        try:
            outputs = session_outputs(
                session, dict(zip(inputs, _tensors(model, *given), strict=True))
            )
        except Refused as refusal:
            checks.append(Check(label + "run", False, detail=str(refusal), way_out=_FIXED))
            continue
        outcome = _compare(outputs, reference.first(size, largest), label, model, given, session)
        checks.extend(outcome.checks)
        facts.update({label + name: row for name, row in outcome.facts.items()})
    notes = _precision_notes(reference, session.provider)
    del reference
    if free:
        along = _along_axes(model, session, *example, inputs, free, limits or {})
        checks.extend(along.checks)
        facts.update(along.facts)
        notes += along.notes
    ran = {"nodes_by_provider": session.nodes_per_provider(), "outputs": facts}
    return Parity(tuple(checks), {f"{session.provider} run": ran}, notes)


def rounded_parity(
    model: nn.Module,
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    other_sizes: bool,
    provider: str | None,
) -> Parity:
    """Judge a file of half precision as `normconv.verify` does, against the model as it was given.

    Where a device computes in its dtype, the file is run there. On the CPU its structure is checked and
    its weights, as they are stored, are run in float64.

    Args:
        model: the original, in float32.
        path: the file.
        args: example inputs.
        kwargs: example keyword inputs.
        other_sizes: also run other sizes of free axes.
        provider: as `Session` takes it.
    """
    report = verify(model, path, (args, kwargs), provider=provider, other_sizes=other_sizes)
    ran_on = report.facts.get("provider", provider or "cpu")
    facts = {name: report.facts[name] for name in _RAN if name in report.facts}
    return Parity(
        tuple(replace(check, name=f"{ran_on} {check.name}") for check in report.checks),
        {f"{ran_on} run": facts},
        report.notes,
    )


def _along_axes(
    model: nn.Module,
    session: Session,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Sequence[str],
    free: Axes,
    limits: Limits,
) -> Parity:
    """Run other sizes of every free axis; a size that the model itself does not take is noted."""
    checks: list[Check] = []
    facts: dict[str, Any] = {}
    notes: list[str] = []
    for name in axis_names(free):
        own = size_of(model, args, kwargs, free, name)
        taken = [own]
        edges = _edges(own, limits.get(name))
        for size in dict.fromkeys((*edges, *other_sizes_of(own))):
            near = [size for size in taken if size not in edges]
            if size not in edges and len(near) >= _SIZES and min(near) < own:
                break
            given = at_size(model, args, kwargs, free, name, size)
            try:
                reference = _reference(model, *given)
            except Exception as error:  # a model may refuse a size in any way
                line = (str(error).strip().splitlines() or [""])[0]
                what = f"the model itself does not take that size ({type(error).__name__}: {line})"
                notes.append(f"{name} {size}: {what}")
                continue
            taken.append(size)
            label = f"{session.provider} {name} {size} "
            found = _at_one_size(model, session, given, inputs, reference, label)
            checks.extend(found.checks)
            facts.update(found.facts)
        sizes = ", ".join(str(size) for size in sorted(taken))
        checks.append(
            Check(
                f"{session.provider} {name}: sizes run",
                len(taken) >= _SIZES,
                detail=f"the model takes {sizes} of those that were tried",
                way_out=_NOT_FREE,
            )
        )
    return Parity(tuple(checks), facts, tuple(notes))


def _edges(own: int, limits: tuple[int, int | None] | None) -> list[int]:
    """Return the sizes just outside a capture; of a trace, which knows none, far ones both ways."""
    lower, upper = limits or (own // 4 + 1, 4 * own - 1)
    return [lower - 1] * (lower > 1) + ([] if upper is None else [upper + 1])


def _at_one_size(
    model: nn.Module,
    session: Session,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    inputs: Sequence[str],
    reference: Reference,
    label: str,
) -> Parity:
    try:
        named = dict(zip(inputs, _tensors(model, *given), strict=True))
        outputs = session_outputs(session, named)
    except Refused as refusal:
        return Parity((Check(label + "run", False, detail=str(refusal), way_out=_NOT_FREE),))
    outcome = _compare(outputs, reference, label, model, given, session)
    checks = tuple(c if c.passed else replace(c, way_out=_NOT_FREE) for c in outcome.checks)
    return Parity(checks, {label + name: row for name, row in outcome.facts.items()})


def backend_errors(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    exact: Mapping[str, Tensor],
    native: Mapping[str, Tensor],
    provider: str,
) -> dict[str, float]:
    """Measure the error that the original itself has on a backend, output by output.

    The original is exported unfolded and run there. This is asked for only when a file has missed
    the bound that torch's own error gives, and forgives at most ten times as much.

    Returns:
        The rel-L2 error by output; empty when the original does not run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "original.onnx"
        try:
            duplicate = copy_model(model).eval()
            program = to_onnx(duplicate, args, kwargs, dynamic_batch=False, opset=20)
            save(program.model, path)
            session = Session(path, provider, frugal=True)
            outputs = session_outputs(
                session,
                dict(zip(program.inputs, named_inputs(model, args, kwargs).values(), strict=True)),
            )
        except (NormconvError, RuntimeError, ValueError):
            return {}
    reference = Reference(exact, native)
    found = {}
    for name, value in exact.items():
        own = outputs.get(onnx_name(name))
        if own is None or own.shape != value.shape or not native[name].is_floating_point():
            continue
        eps = torch.finfo(native[name].dtype).eps
        found[name] = reference.backend_error(name, own, eps)
    return found


def _reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reference:
    native = evaluate(model, args, kwargs)
    return Reference(evaluate(model, args, kwargs, dtype=torch.float64), native)


def _compare(
    outputs: Mapping[str, Tensor],
    reference: Reference,
    label: str,
    model: nn.Module,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    session: Session,
) -> Comparison:
    outcome = compare(outputs, reference, label=label)
    if all(check.passed for check in outcome.checks):
        return outcome
    # Now at its own price: the reference on this very batch, and the backend's own error.
    reference = _reference(model, *given)
    outcome = compare(outputs, reference, label=label)
    if not outcome.missed:
        return outcome
    forgiven = backend_errors(model, *given, reference.exact, reference.native, session.provider)
    return compare(outputs, reference, label=label, backend_errors=forgiven)


def _tensors(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return list(named_inputs(model, args, kwargs).values())


def _not_run(model: nn.Module, refusal: Refused, provider: str | None) -> Parity:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    unsupported = type(refusal.__cause__).__name__ == "NotImplemented"
    if unsupported and dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        reason = f"ONNX Runtime has no {name} kernels for it; only the graph was checked"
        return Parity(notes=(f"{reason} ({refusal})",))
    return Parity((Check(f"{provider or 'ONNX Runtime'} session", False, detail=str(refusal)),))


def _precision_notes(reference: Reference, provider: str) -> tuple[str, ...]:
    halves = {str(v.dtype).removeprefix("torch.") for v in reference.native.values()}
    halves &= {"float16", "bfloat16"}
    if not halves or provider != "cpu":
        return ()
    kinds = " and ".join(sorted(halves))
    return (f"ONNX Runtime computes {kinds} in float32 on CPU: an overflow is not seen there",)
