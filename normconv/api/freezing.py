"""`freeze_norms`: a network trained with per-sample norms becomes one that has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from normconv.api.converting import convert
from normconv.calibration import (
    Batches,
    Drift,
    Frozen,
    Lesson,
    Progress,
    freeze,
    measure_drift,
    set_alone_,
)
from normconv.calibration import recover as teach
from normconv.calibration.batches import DataUse, Source, check_use, notes_of
from normconv.calibration.drift import summary
from normconv.calibration.replay import Cache
from normconv.errors import CheckFailed, Problem, UsageError
from normconv.folding import fold, put_constant_norms_, sampled_norms
from normconv.graph import is_norm
from normconv.graph.rewrite import normalizer_name
from normconv.layers import ChannelAffine, copy_model
from normconv.plan import history_of, record
from normconv.report import Check, Report
from normconv.surgery import Result, make_plan

__all__ = ["freeze_norms"]

_NO_DATA = (
    "GroupNorm and InstanceNorm take mean and deviation from each sample: which constants come nearest "
    "to them stands in no weight, only in data"
)
_WORSE = "recover (more steps), calibrate on more data, or keep the norms: fold without freezing"


def freeze_norms(
    model: nn.Module,
    data: Source | None = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    held_out: Source | None = None,
    min_agreement: float | None = None,
    recover: int | Lesson = 0,
    recover_data: Source | None = None,
    refit: bool = True,
    data_use: DataUse = "public",
    cache: Cache = "memory",
    progress: Callable[[str], Progress] | None = None,
) -> Result:
    """Return a copy whose GroupNorms and InstanceNorms are constants, folded into the weights.

    Weights that are computed (weight standardization, weight norm) are folded first, which is exact.
    Then each norm, from the input on, becomes y = a x + b for each channel, with what comes before it
    frozen already: the layer before it is fitted by ridge regression to what the model itself puts out
    there, and a and b are set so that each channel has the mean and deviation that it has in the model.
    The maps are folded into the layers before the norms, else into those after, else stand as a
    `ChannelAffine` in the slot. BatchNorms are folded too, exactly.

    A norm that looks at each sample is no constant: the result is **not** the same function. It is near
    the model on inputs like the data, and the report says how near: drift at each site, agreement of the
    top-1 with its interval. Networks that live off the statistics of each sample go wrong.

    Args:
        model: trained with GroupNorm or InstanceNorm, with or without standardized weights; not changed.
        data: unlabelled batches, see `calibrate`; without them nothing can be done.
        example_inputs: positional inputs to capture and prove with; None takes the first batch.
        example_kwargs: keyword inputs.
        held_out: other batches to measure on; without them it is measured on the data itself, and the
            report says so.
        min_agreement: the least share of samples with the model's own top-1.
        recover: steps that the frozen network is then taught by the model, or a whole `Lesson`.
        recover_data: batches for that; None for `data`, which should then be more than a few.
        refit: fit layers too; without it only the constants are set.
        data_use: ``private`` says so in the report, with what it means; ``none`` refuses.
        cache: see `calibrate`.
        progress: makes of ``freeze`` or ``recover`` a function as they take it.

    Raises:
        UsageError: there is no data, or the model has no such norm.
        PlanError: the class of some norm computes something else than GroupNorm or InstanceNorm.
        CaptureError: no dataflow graph could be made of the model.
        CheckFailed: the agreement is too low, or outputs are not finite; carries report and model.

    Source: moments as in Jordan et al. 2023 (REPAIR), section 3; the lesson as in `recover`.

    >>> import torch, normconv as nc
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    >>> model, report = nc.freeze_norms(net, [torch.randn(32, 3, 8, 8)])
    >>> type(model[1]).__name__, report.sites[0].fidelity
    ('Identity', 'calibrated')
    """
    if data is None:
        raise UsageError(Problem("data", _NO_DATA, "give data= (--calib): a few hundred inputs"))
    check_use(data_use, "freezing")
    lesson = Lesson(steps=recover) if isinstance(recover, int) else recover
    slots = sampled_norms(model)
    if not slots:
        what = "it has no GroupNorm, and no InstanceNorm without running statistics"
        raise UsageError(Problem(type(model).__name__, what, "fold alone takes out the others"))
    batches = Batches.of(data, model)
    used = {**batches.checked(), "purpose": "freeze", "use": data_use, "refit": refit}
    measured = batches
    if held_out is not None:
        measured = Batches.of(held_out, model)
        held = measured.checked()
    args, kwargs = next(iter(batches))
    if example_inputs is not None or example_kwargs is not None:
        args, kwargs = tuple(example_inputs or ()), dict(example_kwargs or {})
    constant = _with_constants(model, slots)
    set_alone_(constant, model, slots, batches)
    plan = make_plan(constant, "plain", example_inputs=args, example_kwargs=kwargs)
    sites = {slot: normalizer_name(constant, slot) for slot in slots}
    frozen = freeze(
        constant,
        plan,
        sites,
        batches,
        teacher=model,
        measured=measured,
        refit=refit,
        cache=cache,
        progress=progress and progress("freeze"),
    )
    record(frozen.model, {"calibrate": {"groups": {}, "data": used}})
    facts: dict[str, Any] = {"data": used, **_measured(frozen, held if held_out else None)}
    student, last = frozen.model, frozen.after
    notes = [*frozen.notes, *notes_of(data_use), *_kept(model)]
    if lesson.steps:
        student, report = teach(
            student,
            model,
            data if recover_data is None else recover_data,
            lesson=lesson,
            data_use=data_use,
            progress=progress and progress("recover"),
        )
        named = {norm: slot for slot, norm in sites.items()}
        steps = [replace(s, site=named[s.site]) for s in plan.steps if s.site in named]
        last = measure_drift(model, student, steps, measured)
        facts["recover"] = {**report.facts, "after, on the same data": last.document()}
        facts |= summary(frozen.before, last)
    result = convert(student, plan, example_inputs=args, example_kwargs=kwargs)
    report = _report(model, result, sites, {**facts, **_left(result.model)}, notes, last)
    report = report.extended(checks=tuple(last.agreed(min_agreement, _WORSE)))
    if not report.passed:
        raise CheckFailed(report, result.model)
    return Result(result.model, report)


def _with_constants(model: nn.Module, slots: list[str]) -> nn.Module:
    """A copy with plain weights and a `ConstantNorm` in each slot, and a history that says so."""
    twin, report = fold(model)
    if twin is model:
        twin = copy_model(model)
    if report.sites and not history_of(model):  # else `fold` has recorded it
        record(twin, {"fold": {"absorbed": []}})
    put_constant_norms_(twin, slots)
    record(twin, {"freeze": {"sites": slots}})
    return twin


def _measured(frozen: Frozen, held_out: Mapping[str, Any] | None) -> dict[str, Any]:
    where: dict[str, Any] = {"measured on": "the calibration data itself"}
    if held_out is not None:
        where = {"measured on": "held-out data", "held-out data": dict(held_out)}
    found = {"before": frozen.before.document(), "after": frozen.after.document()}
    return {**where, **summary(frozen.before, frozen.after), **found}


def _kept(model: nn.Module) -> list[str]:
    what = "it normalizes each position over its features, which no constant of a channel is: kept"
    names = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    return [f"{name}: {type(model.get_submodule(name)).__name__}: {what}" for name in names]


def _left(model: nn.Module) -> dict[str, int]:
    """Count what is left at inference."""
    modules = list(model.modules())
    norms = [
        m for m in modules if is_norm(m) or isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))
    ]
    affines = [m for m in modules if isinstance(m, ChannelAffine)]
    return {"norms left": len(norms), "channel affines left": len(affines)}


def _report(
    model: nn.Module,
    result: Result,
    sites: Mapping[str, str],
    facts: Mapping[str, Any],
    notes: list[str],
    last: Drift,
) -> Report:
    """The report of the last, exact step, with what came before it: the whole is calibrated."""
    named = {norm: slot for slot, norm in sites.items()}
    rows = tuple(
        replace(
            row,
            site=named[row.site],
            norm=type(model.get_submodule(named[row.site])).__name__,
            fidelity="calibrated",
        )
        if row.site in named
        else row
        for row in result.report.sites
    )
    checks = tuple(
        replace(check, name=f"constants folded: {check.name}") for check in result.report.checks
    )
    finite = Check("outputs are finite", math.isfinite(last.output))
    return replace(
        result.report,
        verb="fold",
        subject=type(model).__name__,
        target="frozen norms",
        sites=rows,
        checks=(*checks, finite),
        facts={"fidelity": "calibrated", **result.report.facts, **facts},
        notes=(*result.report.notes, *notes),
    )
