"""Norms that look at each sample become constants, set on data with the network itself as the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normconv.calibration.batches import Batches
from normconv.calibration.drift import Drift, Progress, measure_drift
from normconv.calibration.order import independent_groups
from normconv.calibration.passes import Partial
from normconv.calibration.patches import can_refit
from normconv.calibration.ranks import of_all_ranks
from normconv.calibration.refit import Refit, refit_
from normconv.calibration.replay import Cache, Replay, replayed, shelf_of
from normconv.folding.constant_norms import normalized
from normconv.graph import NormState
from normconv.graph.rewrite import normalizer_name
from normconv.layers import ConstantNorm
from normconv.numerics import Moments, moments_of
from normconv.plan import Plan, Step

__all__ = ["Frozen", "freeze", "set_alone_"]

_DEAD = 1e-6  # of a channel's deviation against the largest: it does not vary


class Frozen(NamedTuple):
    """A model with constants, and how far it is from its teacher.

    Args:
        model: with a `ConstantNorm` in each slot.
        before: each norm set alone, on what it gets in the teacher.
        after: each set on what it gets once all before it are constants.
        notes: warnings.
    """

    model: nn.Module
    before: Drift
    after: Drift
    notes: tuple[str, ...]


@dataclass
class _Pair:
    """What a site's constants are made of: moments of what goes in, and of what should come out."""

    given: Moments | None = None
    wanted: Moments | None = None

    def add(self, given: Tensor, wanted: Tensor) -> None:
        one, other = moments_of(given), moments_of(wanted)
        self.given = one if self.given is None else self.given + one
        self.wanted = other if self.wanted is None else self.wanted + other

    def put_together(self) -> None:
        parts, self.given, self.wanted = of_all_ranks((self.given, self.wanted)), None, None
        for given, wanted in parts:
            if given is not None and wanted is not None:
                self.given = given if self.given is None else self.given + given
                self.wanted = wanted if self.wanted is None else self.wanted + wanted


@torch.no_grad()
def _match_(norm: ConstantNorm, pair: _Pair) -> None:
    """Set μ, σ², γ and β, in place: each channel puts out the mean and deviation of the teacher's.

    μ and σ are those of the input; β is the wanted mean, |γ| the wanted deviation, and γ keeps its sign.
    A channel that does not vary on either side becomes the wanted mean.

    Source: Jordan et al. 2023 (REPAIR), section 3.
    """
    given, wanted = pair.given, pair.wanted
    assert given is not None
    assert wanted is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    alive = given.std > _DEAD * given.std.max()
    var = torch.where(alive, given.std**2, torch.ones_like(given.std))
    slope = wanted.std * ((var + norm.eps) / var).sqrt() * alive
    norm.running_mean.copy_(given.mean)
    norm.running_var.copy_(var)
    norm.weight.copy_(torch.where(norm.weight < 0, -slope, slope))
    norm.bias.copy_(wanted.mean)


def set_alone_(model: nn.Module, teacher: nn.Module, sites: Sequence[str], data: Batches) -> None:
    """Set the constants of each site, in place, on what the teacher's norm gets and gives there."""
    pairs = {site: _Pair() for site in sites}
    with shelf_of("none") as shelf:
        partial = Partial(Replay(teacher, shelf), {site: site for site in sites}, set())
        for batch, (args, kwargs) in enumerate(data):
            for site, given in partial.inputs(batch, args, kwargs).items():
                for x in given:
                    pairs[site].add(x, normalized(teacher.get_submodule(site), x))
    for site, pair in pairs.items():
        pair.put_together()
        if pair.given is not None:
            _match_(_norm_of(model, site), pair)


def _norm_of(model: nn.Module, site: str) -> ConstantNorm:
    norm = model.get_submodule(normalizer_name(model, site))
    assert isinstance(norm, ConstantNorm)
    return norm


@dataclass
class _Run:
    """One way through the model: both networks, and by site the layers that may be fitted.

    Args:
        model: with constants, changed in place.
        teacher: the original.
        passes: over both, in this order.
        data: inputs.
        batches: how many there are, over all processes.
        layers: by site the layer whose output goes into this norm and nowhere else.
        notes: warnings.
        left: the sites that are still to be set.
    """

    model: nn.Module
    teacher: nn.Module
    passes: tuple[Replay, Replay]
    data: Batches
    batches: int
    layers: Mapping[str, str]
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def carry_out(self, sites: Sequence[str], progress: Progress | None) -> None:
        """Set one group of sites that do not feed each other after the other."""
        args, kwargs = next(iter(self.data))
        self.left = list(sites)
        order = independent_groups(self.teacher, self.left, args, kwargs)
        for done, here in enumerate(order):
            self._fit([site for site in here if site in self.layers])
            self._match(here)
            self.left = [site for site in self.left if site not in here]
            if progress is not None:
                progress(done + 1, len(order), "")

    def _fit(self, sites: Sequence[str]) -> None:
        """Fit the layers before these norms to what the teacher puts out after its own."""
        if not sites:
            return
        refits: dict[str, Refit] = {}
        with _biased(self.model.get_submodule(self.layers[site]) for site in sites):
            for site in sites:
                layer = self.model.get_submodule(self.layers[site])
                state = _unchanged(_norm_of(self.model, site))
                refits[site] = Refit(layer, state, self.batches, wanted=True)
            places = {self.layers[site]: site for site in sites}
            student, teacher = self._partial(places, {site: site for site in sites})
            for batch, (args, kwargs) in enumerate(self.data):
                before = teacher.inputs(batch, args, kwargs)
                for site, given in student.inputs(batch, args, kwargs).items():
                    for x, there in zip(given, before[site], strict=True):
                        refits[site].add(x, self._wanted(site, there))
            for site, refit in refits.items():
                refit.put_together()
                if poor := refit_(refit).poor:
                    self.notes.append(f"{site}: {poor}")

    def _wanted(self, site: str, there: Tensor) -> Tensor:
        """What the constants of the site turn into the teacher's output: (y − β) √(σ² + eps) / γ + μ."""
        norm = _norm_of(self.model, site)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        shape = (1, -1, *(1,) * (there.dim() - 2))
        mean, var, weight, bias = (
            t.detach().double().view(shape)
            for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        y = normalized(self.teacher.get_submodule(site), there)
        alive = weight.abs() > _DEAD * weight.abs().max()
        slope = torch.where(alive, (var + norm.eps).sqrt() / weight, torch.zeros_like(weight))
        return (y - bias) * slope + mean

    def _match(self, sites: Sequence[str]) -> None:
        pairs = {site: _Pair() for site in sites}
        places = {normalizer_name(self.model, site): site for site in sites}
        student, teacher = self._partial(places, {site: site for site in sites})
        for batch, (args, kwargs) in enumerate(self.data):
            before = teacher.inputs(batch, args, kwargs)
            for site, given in student.inputs(batch, args, kwargs).items():
                for x, there in zip(given, before[site], strict=True):
                    pairs[site].add(x, normalized(self.teacher.get_submodule(site), there))
        for site, pair in pairs.items():
            pair.put_together()
            if pair.given is not None:
                _match_(_norm_of(self.model, site), pair)

    def _partial(
        self, places: Mapping[str, str], sites: Mapping[str, str]
    ) -> tuple[Partial, Partial]:
        """Passes over both models; what is still to be set moves."""
        mine: set[nn.Module] = {_norm_of(self.model, site) for site in self.left}
        mine |= {self.model.get_submodule(self.layers[s]) for s in self.left if s in self.layers}
        theirs = {self.teacher.get_submodule(site) for site in self.left}
        student, teacher = self.passes
        return Partial(student, places, mine), Partial(teacher, sites, theirs)


def _unchanged(norm: ConstantNorm) -> NormState:
    """The map that changes nothing: a `Refit` then takes the outputs that it is given as they are."""
    zero = torch.zeros(norm.num_features, dtype=torch.float64, device=norm.weight.device)
    return NormState(zero, torch.ones_like(zero), None, None, 0.0)


@contextmanager
def _biased(layers: Any) -> Any:
    """Give layers without a bias one while the block fits them: the norm's μ takes it after."""
    given: list[Any] = []
    for layer in layers:
        if layer.bias is None:
            features = getattr(layer, "out_channels", None) or layer.out_features
            layer.bias = nn.Parameter(layer.weight.new_zeros(features), requires_grad=False)
            given.append(layer)
    try:
        yield
    finally:
        for layer in given:
            layer.bias = None


def freeze(
    model: nn.Module,
    plan: Plan,
    sites: Mapping[str, str],
    data: Batches,
    *,
    teacher: nn.Module,
    measured: Batches,
    refit: bool = True,
    cache: Cache = "memory",
    progress: Progress | None = None,
) -> Frozen:
    """Return a copy of the model whose constants fit what the part before them puts out.

    Site after site, all before it constants already: the layer before the norm is fitted by ridge
    regression toward the teacher's normalized output, then μ, σ², γ and β are set so that each channel
    puts out the teacher's mean and deviation. Nothing is trained, and the result is the same every time.

    Args:
        model: with a `ConstantNorm` in each slot, set by `set_alone_`; not changed.
        plan: what folding them will do: which layer feeds which norm.
        sites: by name of the slot in the model the name of the norm in the plan.
        data: inputs.
        teacher: with the norms; not changed.
        measured: inputs to measure on.
        refit: fit the layers too.
        cache: where outputs are kept between passes.
        progress: called with groups of sites done and in all.
    """
    named = {norm: slot for slot, norm in sites.items()}
    steps = [replace(s, site=named[s.site]) for s in plan.steps if s.site in named]
    before = measure_drift(teacher, model, steps, measured)
    count = sum(of_all_ranks(sum(1 for _ in data)))
    layers = _layers_of(model, steps) if refit else {}
    order = [step.site for step in steps if step.phase == "eval"]

    def work(twin: nn.Module, replays: tuple[Replay, Replay]) -> _Run:
        run = _Run(twin, teacher, replays, data, count, layers)
        run.carry_out(order, progress)
        return run

    run = replayed(model, teacher, data, cache, work)
    after = measure_drift(teacher, run.model, steps, measured)
    return Frozen(run.model, before, after, tuple(run.notes))


def _layers_of(model: nn.Module, steps: Sequence[Step]) -> dict[str, str]:
    """By site the one layer that feeds it, where its patches are known and no other norm shares it."""
    alone = {s.site: s.producers[0] for s in steps if len(s.producers) == 1 and not s.spans}
    able = {site: name for site, name in alone.items() if can_refit(model.get_submodule(name))}
    return {site: name for site, name in able.items() if list(able.values()).count(name) == 1}
