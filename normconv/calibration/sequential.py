"""Calibration, site after site, each on what the part before it, already calibrated, puts out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from normconv.calibration.batches import Batches, DataUse, Source, check_use, notes_of
from normconv.calibration.drift import Drift, Progress, measure_drift, summary
from normconv.calibration.matching import Match, candidates, match_
from normconv.calibration.order import independent_groups
from normconv.calibration.passes import Partial
from normconv.calibration.patches import can_refit
from normconv.calibration.ranks import of_all_ranks
from normconv.calibration.refit import Fitted, Refit, refit_
from normconv.calibration.replay import Cache, Replay, replayed
from normconv.errors import CheckFailed, Problem, UsageError
from normconv.graph import Names, NormState, norm_state
from normconv.graph.rewrite import normalizer_name
from normconv.layers import WeightStandardized
from normconv.numerics import evaluating
from normconv.plan import Plan, Step, record
from normconv.report import Check, Report
from normconv.surgery import Result

__all__ = ["calibrate"]


@dataclass
class _Run:
    """One calibration: what it works on, and by site what it found.

    Args:
        model: changed in place.
        reference: the original.
        passes: over both, in this order.
        data: inputs.
        batches: how many there are, over all processes.
        refit: whether layers are fitted to what the original puts out.
        groups: numbers of groups.
        errors: measured for each number of groups that was tried.
        fits: what the refits of the layers before them say.
        notes: warnings.
        left: the steps that are still to be carried out.
    """

    model: nn.Module
    reference: nn.Module
    passes: tuple[Replay, Replay]
    data: Batches
    batches: int
    refit: bool
    groups: dict[str, int] = field(default_factory=dict)
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    fits: dict[str, Fitted] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: dict[str, Step] = field(default_factory=dict)

    def carry_out(self, steps: Sequence[Step], progress: Progress | None) -> None:
        """Calibrate, one group of sites that do not feed each other after the other."""
        step_of = self.left = {step.site: step for step in steps}
        args, kwargs = next(iter(self.data))
        order = independent_groups(self.reference, list(step_of), args, kwargs)
        for done, sites in enumerate(order):
            here = [step_of[site] for site in sites]
            for site, layer in self._refits(here).items():
                self.fits[site] = refit_(layer)
                if poor := self.fits[site].poor:
                    self.notes.append(f"{site}: {poor}")
            for site, match in self._matches(here).items():
                if match.wanted is not None:
                    self.groups[site], self.errors[site] = match_(match)
            self.left = {site: step for site, step in self.left.items() if site not in sites}
            if progress is not None:
                progress(done + 1, len(order), "")

    def _refits(self, steps: Sequence[Step]) -> dict[str, Refit]:
        """Run both models as far as these sites, and gather what their layers see and should give."""
        found: dict[str, Refit] = {}
        layers: dict[str, str] = {}
        for step in steps:
            layer = (
                self.model.get_submodule(step.producers[0]) if len(step.producers) == 1 else None
            )
            state = norm_state(self.reference.get_submodule(step.site))
            if layer is None or step.spans or not can_refit(layer) or isinstance(state, str):
                if step.action == "standardize":
                    what = "its weights lost their mean, and nothing could make up for it"
                    self.notes.append(f"{step.site}: {what}")
            elif self.refit or isinstance(layer, WeightStandardized):
                found[step.site] = Refit(layer, state, self.batches, self.refit)
                layers[step.producers[0]] = step.site
        if not found:
            return {}
        converted, original = self._partial(layers, {site: site for site in found})
        for batch, (args, kwargs) in enumerate(self.data):
            before = original.inputs(batch, args, kwargs) if self.refit else {}
            inputs = converted.inputs(batch, args, kwargs)
            for site, each in found.items():
                for place, x in enumerate(inputs[site]):
                    each.add(x, before[site][place] if self.refit else None)
        for each in found.values():
            each.put_together()
        return found

    def _partial(
        self, places: Mapping[str, str], sites: Mapping[str, str]
    ) -> tuple[Partial, Partial]:
        """Passes over both models; what is still to be calibrated moves."""
        moving = [
            {root.get_submodule(name) for step in self.left.values() for name in names_of(step)}
            for root, names_of in ((self.model, self._touched), (self.reference, _site_of))
        ]
        converted, original = self.passes
        return Partial(converted, places, moving[0]), Partial(original, sites, moving[1])

    def _touched(self, step: Step) -> list[str]:
        return [*step.producers, step.site, normalizer_name(self.model, step.site)]

    def _matches(self, steps: Sequence[Step]) -> dict[str, Match]:
        """Run both models as far as these sites, over all the data."""
        matches: dict[str, Match] = {}
        for step in steps:
            norm = self.model.get_submodule(normalizer_name(self.model, step.site))
            state = norm_state(self.reference.get_submodule(step.site))
            if isinstance(norm, nn.GroupNorm) and isinstance(state, NormState):
                tried = candidates(norm, bool(step.options.get("search")))
                matches[step.site] = Match(norm, state, tried)
        places = {normalizer_name(self.model, site): site for site in matches}
        converted, original = self._partial(places, {site: site for site in matches})
        for batch, (args, kwargs) in enumerate(self.data):
            before = original.inputs(batch, args, kwargs)
            after = converted.inputs(batch, args, kwargs)
            for site, match in matches.items():
                for one, other in zip(before[site], after[site], strict=True):
                    match.add(one, other)
        for match in matches.values():
            match.put_together()
        return matches


def calibrate(
    model: nn.Module,
    plan: Plan,
    data: Source,
    *,
    reference: nn.Module,
    held_out: Source | None = None,
    min_agreement: float | None = None,
    refit: bool = True,
    cache: Cache = "memory",
    data_use: DataUse = "public",
    progress: Progress | None = None,
) -> Result:
    """Return a copy of a converted model whose norms match the original's moments on unlabelled data.

    Site after site, with everything before it calibrated already, the layer before the norm is fitted
    to its new inputs, then γ and β are set so that mean and deviation of each channel of the norm's
    output are those of the original's on the same data; where the plan left the number of groups open,
    the one with the least error is taken. Nothing is trained and the result is the same every time.

    Args:
        model: what `apply_plan` made of the reference; not changed.
        plan: that it was made by.
        data: batches of inputs that can be gone through again and again: a DataLoader, a list, or a
            function that makes an iterator. Of a tuple only the model's inputs are taken, no labels.
        reference: the original; not changed.
        held_out: other batches to measure on; without them it is measured on the data itself, and the
            report says so.
        min_agreement: the least share of held-out samples with the same top-1 as the original.
        refit: also fit the weights before the norms, by ridge regression toward what they were, to what
            the original puts out there; without it only γ and β are set (and standardized weights get
            the filter nearest to theirs that has no mean).
        cache: where outputs of modules that will not change any more are kept, so that no pass runs them
            again: ``memory`` (up to 2 GiB), ``disk`` (a temporary folder, without a limit) or ``none``.
        data_use: ``private`` says so in the report, with what it means; ``none`` refuses.
        progress: called with the number of groups of sites done and in all, and an empty text.

    Under `torch.distributed` each process goes through its own data, and all get the result of all.

    Raises:
        UsageError: the data is empty, constant, holds NaN, can be gone through only once, or does not
            fit the model; or plan and models do not belong together.
        CheckFailed: the agreement is below `min_agreement`; carries the report and the model.

    >>> import torch, normconv as nc
    >>> net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(16, 3, 8, 8)
    >>> _ = net(images)
    >>> plan = nc.make_plan(net, "gn", example_inputs=(images,))
    >>> converted = nc.apply_plan(net, plan).model
    >>> model, report = nc.calibrate(converted, plan, [images], reference=net)
    >>> report.facts["data"]["samples"]
    16
    """
    check_use(data_use, "calibrate")
    steps = _sampled(model, plan)
    _check_pair(model, reference, plan, steps)
    batches = Batches.of(data, reference)
    used = batches.checked()
    measured = batches
    if held_out is not None:
        measured = Batches.of(held_out, reference)
        measured.checked()
    _check_runs(reference, model, measured)
    before = measure_drift(reference, model, plan.steps, measured)
    count = sum(of_all_ranks(used["batches"]))

    def work(twin: nn.Module, replays: tuple[Replay, Replay]) -> _Run:
        run = _Run(twin, reference, replays, batches, count, refit)
        run.carry_out(steps, progress)
        return run

    found = replayed(model, reference, batches, cache, work)
    twin = found.model
    after = measure_drift(reference, twin, plan.steps, measured)
    done = replace(plan, steps=tuple(_measured(step, found) for step in plan.steps))
    used = {**used, "purpose": "calibrate", "use": data_use, "refit": refit}
    record(twin, {"calibrate": {"groups": found.groups, "data": used}})
    report = _report(done, before, after, used, held_out is not None, min_agreement)
    lost = {
        site: {"variance": fit.lost, "snr_db": fit.snr_db}
        for site, fit in found.fits.items()
        if fit.lost
    }
    errors = {
        site: {str(groups): error for groups, error in tried.items()}
        for site, tried in found.errors.items()
    }
    predicted: dict[str, Any] = {"predicted error by number of groups": errors}
    if lost:
        predicted["predicted loss by standardization"] = lost
    report = report.extended(facts=predicted, notes=(*found.notes, *notes_of(data_use)))
    if not report.passed:
        raise CheckFailed(report, twin)
    return Result(twin, report)


def _sampled(model: nn.Module, plan: Plan) -> list[Step]:
    """The steps that put a GroupNorm in place."""
    found = []
    names = Names(model)
    for step in plan.converted:
        if step.action != "insert" and names.known(step.site) and step.phase == "eval":
            norm = model.get_submodule(normalizer_name(model, step.site))
            if isinstance(norm, nn.GroupNorm):
                found.append(step)
    return found


def _site_of(step: Step) -> list[str]:
    return [step.site]


def _check_pair(model: nn.Module, reference: nn.Module, plan: Plan, steps: Sequence[Step]) -> None:
    if not steps:
        what = f"a plan for {plan.target or 'nothing'} leaves no norm to calibrate in this model"
        raise UsageError(Problem("plan", what, "calibrate what a gn target made"))
    problems = []
    for step in plan.converted:
        try:
            kind = type(reference.get_submodule(step.site)).__name__
        except AttributeError:
            kind = "nothing"
        if kind != step.norm:
            what = f"the plan says {step.norm}, the reference has {kind} there"
            problems.append(Problem(step.site, what, "give the model that the plan was made for"))
    if problems:
        raise UsageError(problems[:5])


def _check_runs(original: nn.Module, candidate: nn.Module, data: Batches) -> None:
    """Run both on the first batch: what they do not take is told as that."""
    args, kwargs = next(iter(data))
    try:
        for model in (original, candidate):
            with evaluating(model):
                model(*args, **kwargs)
    except Exception as reason:  # the forward is the user's, and so is the data
        what = f"the model does not run on it ({type(reason).__name__}: {reason})"
        raise UsageError(Problem("data", what, "give batches of the model's own inputs")) from None


def _measured(step: Step, found: _Run) -> Step:
    """The step as it was carried out, with the errors as the reason where groups were searched."""
    if step.site not in found.groups:
        return step
    chosen, errors = found.groups[step.site], found.errors[step.site]
    options = {k: v for k, v in step.options.items() if k != "search"}
    options["groups"] = chosen
    reason = _why(chosen, errors) if step.options.get("search") else step.reason
    return replace(step, options=options, fidelity="calibrated", reason=reason)


def _why(chosen: int, errors: Mapping[int, float]) -> str:
    """Name the errors of the numbers of groups.

    >>> _why(4, {4: 0.012, 1: 0.034, 2: 0.02})
    '4 groups: measured error 0.012 (1: 0.034, 2: 0.02)'
    """
    others = ", ".join(f"{n}: {errors[n]:.2g}" for n in sorted(errors) if n != chosen)
    told = f"{chosen} group{'s'[: chosen != 1]}: measured error {errors[chosen]:.2g}"
    return f"{told} ({others})" if others else told


def _report(
    plan: Plan,
    before: Drift,
    after: Drift,
    used: Mapping[str, Any],
    held_out: bool,
    min_agreement: float | None,
) -> Report:
    facts = {
        "data": used,
        "measured on": "held-out data" if held_out else "the calibration data itself",
        **summary(before, after),
        "before": before.document(),
        "after": after.document(),
    }
    checks = [Check("outputs are finite", math.isfinite(after.output))]
    checks += after.agreed(min_agreement, "calibrate on more images, or recover")
    return plan.report("calibrate").extended(checks=tuple(checks), facts=facts)
