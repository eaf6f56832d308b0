"""`convert_state_dict`: a state dict in memory from one convention to another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from normconv.bridges.bridging import Bridge, bridged
from normconv.bridges.conventions import AUTO, computed_otherwise
from normconv.bridges.jobs import Findings
from normconv.bridges.opening import shapes_of
from normconv.bridges.request import Request
from normconv.bridges.tensors import InMemory, Tensors
from normconv.errors import Problem, UsageError
from normconv.plan import Plan
from normconv.report import Report

__all__ = ["Converted", "carried_out", "convert_state_dict", "report_of", "request_of"]

_LISTED = 5

Like = str | os.PathLike[str] | Mapping[str, Any]


class Converted(NamedTuple):
    """A state dict in another convention.

    Args:
        state_dict: by the new names; what passes through shares its memory with what was given.
        report: a row a weight, and what passed through.
    """

    state_dict: dict[str, Any]
    report: Report


def convert_state_dict(
    state_dict: Mapping[str, Any],
    to: str = "plain",
    *,
    from_: str = AUTO,
    like: Like | None = None,
    plan: Plan | None = None,
    layers: str | Sequence[str] | Mapping[str, int] = (),
    dim: int = 0,
    scale: str = "linear",
    c: float | None = None,
    eps: float | Mapping[str, float] | None = None,
    gamma: float | None = None,
) -> Converted:
    """Take a state dict from one convention of names to another, without the model.

    ``plain`` has ``weight``; ``legacy-wn`` is `torch.nn.utils.weight_norm`, ``torch-wn``
    `torch.nn.utils.parametrizations.weight_norm`, ``normconv-wn`` normconv's own layers; ``ws-timm``,
    ``ws-qiao``, ``ws-bit`` and ``ws-nf`` are weights that are standardized in every forward, which only
    become plain. Values are computed in float64 and rounded once to their own dtype; of a g or v that is
    only renamed no bit changes.

    Args:
        state_dict: read only; nested dicts and files are for `convert_file`.
        to: the convention of the result.
        from_: that of the state dict; ``auto`` tells it by the keys.
        like: a state dict, or a file of one, with the keys that the result is to have.
        plan: of the model that the state dict is for: its norms are folded, and their keys dropped.
        layers: globs of layers or weights that get a gain (or are standardized); a mapping gives the
            dim of each.
        dim: the axis along which those gains lie, as torch's weight norm has it.
        scale: ``exp`` gives ``normconv-wn`` the gain e^(c·s).
        c: of such gains.
        eps: of the norms of the plan, which neither plan nor state dict hold; of standardized weights
            where it is not the dialect's own. A mapping gives it by globs.
        gamma: the constant γ of ``ws-nf``.

    Raises:
        UsageError: the call is wrong, or the keys do not tell something that has to be said.
        LoadError: names every key that does not fit: conventions mixed, a g without its v, shapes that
            disagree.

    Source: Salimans & Kingma 2016, equation 2; Qiao et al. 2019, equation 6.

    >>> import torch
    >>> given = {"0.weight_g": torch.tensor([[10.0]]), "0.weight_v": torch.tensor([[3.0, 4.0]])}
    >>> convert_state_dict(given).state_dict
    {'0.weight': tensor([[6., 8.]])}
    """
    request = request_of(
        to,
        from_=from_,
        like=like,
        plan=plan,
        layers=layers,
        dim=dim,
        scale=scale,
        c=c,
        eps=eps,
        gamma=gamma,
    )
    tensors, findings = InMemory(state_dict, "the state dict"), Findings()
    bridge = bridged(tensors, request)
    made = {**carried_out(bridge, tensors, findings), **tensors.others}
    return Converted(made, report_of(bridge, tensors, request, findings))


def request_of(
    to: str,
    *,
    from_: str = AUTO,
    like: Like | None = None,
    plan: Plan | None = None,
    layers: str | Sequence[str] | Mapping[str, int] = (),
    dim: int = 0,
    scale: str = "linear",
    c: float | None = None,
    eps: float | Mapping[str, float] | None = None,
    gamma: float | None = None,
) -> Request:
    """Put what was asked for in one form, and check it.

    Raises:
        UsageError: it makes no sense.
    """
    if scale not in ("linear", "exp"):
        raise UsageError(Problem("scale", f"it is 'linear' or 'exp', not {scale!r}"))
    if isinstance(layers, str):
        layers = (layers,)
    dims = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, dim)
    numbers = {} if eps is None else dict(eps) if isinstance(eps, Mapping) else {"*": float(eps)}
    request = Request(
        from_=from_,
        to=to,
        like=None if like is None else shapes_of(like),
        plan=plan,
        layers=dims,
        eps=numbers,
        log=scale == "exp",
        c=c,
        gamma=gamma,
    )
    request.check()
    return request


def carried_out(bridge: Bridge, tensors: Tensors, findings: Findings) -> dict[str, Tensor]:
    """Make everything; jobs that would make the same tensors are done once."""
    made: dict[str, Tensor] = {}
    done: dict[object, list[Tensor]] = {}
    for job in bridge.jobs:
        found = done.get(job.same) if job.same is not None else None
        if found is None:
            new = job.make(tensors.read, findings)
            found = [new[name] for name in job.outputs]
            done[job.same] = found
        made |= dict(zip(job.outputs, found, strict=True))
    return made


def report_of(bridge: Bridge, tensors: Tensors, request: Request, findings: Findings) -> Report:
    """Say what became of every key."""
    rows = [job.row for job in bridge.jobs if job.row is not None]
    through = set(bridge.passed)
    passed = {
        name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for name, spec in tensors.specs.items()
        if name in through
    }
    notes = [f"{weight}: {said}" for weight, said in findings.said.items()]
    if passed:
        notes.append(f"{len(passed)} keys passed through as they are: {_few(list(passed))}")
    if other := computed_otherwise(bridge.passed):
        said = "computed by another parametrization, and left so; normconv fold takes the model"
        notes.append(f"{_few(other)}: {said}")
    if bridge.dropped:
        notes.append(f"{len(bridge.dropped)} keys of norms are gone: {_few(list(bridge.dropped))}")
    return Report(
        verb="state-dict convert",
        subject=tensors.where,
        target=request.to,
        sites=tuple(rows),
        facts={
            "from": bridge.from_,
            "weights converted": len(rows),
            "keys": sum(len(job.outputs) for job in bridge.jobs),
            **request.options(),
            "passed through": passed,
            "dropped": {
                name: {"shape": list(tensors.specs[name].shape)} for name in bridge.dropped
            },
        },
        notes=tuple(notes),
    )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
