"""Data-dependent initialisation: every pre-activation starts with mean 0 and deviation 1."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normconv.calibration.batches import Batches, DataUse, Source, check_use, notes_of
from normconv.calibration.drift import Progress
from normconv.calibration.init_report import init_report
from normconv.calibration.init_sites import InitSite, LayerSite, divide_tied, init_sites
from normconv.calibration.noise import noise_on
from normconv.calibration.observing import observe
from normconv.calibration.order import independent_groups
from normconv.calibration.ranks import of_all_ranks
from normconv.errors import CheckFailed, NormconvError, Problem, UsageError
from normconv.graph import couples_in_training, is_norm, norm_names, norm_state
from normconv.graph.running import first_line
from normconv.layers import WeightNormed, copy_model
from normconv.numerics import Moments
from normconv.plan import history_of, record
from normconv.surgery import Result
from normconv.surgery.lazy import lazy_problems
from normconv.surgery.wrappers import refuse_wrapped

__all__ = ["initialise", "initialise_"]

_REFINED = 3  # a small g beside a large b costs digits of t, which the next sweep has again
_SWEEPS = 20  # for each call of the layer that a forward calls most; some 6 mostly do


def initialise(
    model: nn.Module,
    data: Source,
    *,
    fresh: bool = False,
    v_std: float | None = None,
    dropout: bool = False,
    seed: int = 0,
    data_use: DataUse = "public",
    progress: Progress | None = None,
) -> Result:
    """Return a copy of a weight-normed model whose pre-activations are standard on unlabelled data.

    With t = v · x / ‖v‖ a layer gets g = 1 / σ[t] and b = −μ[t] / σ[t], so that each channel of g · t + b
    has mean 0 and deviation 1 over all the data; the sign of a gain stays. Layer after layer, each on
    what those before it, set already, put out. A GroupNorm gets γ and β to the same end; a BatchNorm,
    mean-only or not, gets the mean and variance of what reaches it as running statistics, so that eval
    mode computes what training mode does on all of the data.

    The model runs in eval mode: no dropout, nothing random, unless ``dropout`` leaves it on. A layer that
    a forward calls several times has its calls pooled; where they feed each other this is repeated until
    it holds. A gain of 0 stays 0, and a channel that does not vary keeps what it has; the report names
    both.

    Args:
        model: with weight-normed Linear, Conv1d-3d or ConvTranspose1d-3d layers, as `convert` and `wrap`
            make them; not changed.
        data: batches of inputs that can be gone through again and again; no labels are used. All of it
            counts as one batch.
        fresh: take a model that looks trained; what it learnt of sizes is lost.
        v_std: first draw every v of those layers from N(0, v_std²); 0.05 in the paper. None keeps v.
        dropout: leave dropout, and what else is random in training, on: what is standard then is what
            the first step of training computes, up to its own draw. Each batch has one draw.
        seed: of these draws.
        data_use: ``private`` says so in the report, with what it means; ``none`` refuses.
        progress: called with the number of groups of sites done and in all.

    Under `torch.distributed` each process goes through its own data, and all get the result of all.

    Raises:
        UsageError: the model has no such layers or looks trained; the data is empty, constant, holds
            NaN, can be gone through only once, or does not fit the model.
        CheckFailed: some channel is off afterwards, as where the calls of one layer cannot be standard
            together; carries the report and the model.

    Source: Salimans & Kingma 2016, section 3, equations 5 and 6.

    >>> from normconv.layers import weight_norm_
    >>> net = nn.Sequential(weight_norm_(nn.Linear(4, 8)), nn.ReLU(), weight_norm_(nn.Linear(8, 2)))
    >>> x = torch.randn(64, 4) * 5 + 3
    >>> y = initialise(net, [x]).model(x)
    >>> torch.allclose(y.mean(0), torch.zeros(2), atol=1e-5), torch.allclose(
    ...     y.std(0, correction=0), torch.ones(2), atol=1e-5
    ... )
    (True, True)
    """
    check_use(data_use, "initialise")
    _check_options(v_std, seed)
    _check_model(model, fresh)
    twin = copy_model(model)
    batches = Batches.of(data, model)
    used = {**batches.checked(), "purpose": "init", "use": data_use}
    run = _Run(twin, batches, progress, seed if dropout else None)
    run.look_around()
    if v_std is not None:
        _draw(list(run.sites.values()), v_std, seed)
    run.carry_out()
    facts: dict[str, Any] = {
        "data": used,
        "v": "kept" if v_std is None else {"std": v_std, "seed": seed},
        "dropout": {"seed": seed} if dropout else "off",
    }
    record(twin, {"init": facts})
    facts |= {"groups of sites": len(run.groups), "sweeps": run.sweeps}
    report = init_report(twin, run.sites, run.found, run.left, run.strange)
    report = report.extended(facts=facts, notes=notes_of(data_use))
    if not report.passed:
        raise CheckFailed(report, twin)
    return Result(twin, report)


def initialise_(
    model: nn.Module,
    data: Source,
    *,
    fresh: bool = False,
    v_std: float | None = None,
    dropout: bool = False,
    seed: int = 0,
    data_use: DataUse = "public",
    progress: Progress | None = None,
) -> Result:
    """Do to the model itself what `initialise` does to a copy: an optimizer made before goes on with it.

    The work is done on a copy, whose numbers the model then gets: all of them, or an error and none.

    Raises:
        UsageError: as `initialise`; the model is as it was.
        CheckFailed: as `initialise`; the model is as it was.

    >>> from normconv.layers import weight_norm_
    >>> layer = weight_norm_(nn.Linear(4, 8)); g = layer.weight_g
    >>> initialise_(layer, [torch.randn(64, 4)]).model is layer, layer.weight_g is g
    (True, True)
    """
    made, report = initialise(
        model,
        data,
        fresh=fresh,
        v_std=v_std,
        dropout=dropout,
        seed=seed,
        data_use=data_use,
        progress=progress,
    )
    ours = [*model.parameters(), *model.buffers()]
    theirs = [*made.parameters(), *made.buffers()]
    with torch.no_grad():
        for tensor, value in zip(ours, theirs, strict=True):
            if not torch.equal(tensor, value):
                tensor.copy_(value)
                tensor.grad = None  # it was the gradient at another place
    record(model, history_of(made)[-1])
    return Result(model, report)


def _check_options(v_std: float | None, seed: int) -> None:
    problems = []
    if v_std is not None and not (isinstance(v_std, (int, float)) and 0 < v_std < math.inf):
        problems.append(Problem("v_std", f"{v_std!r} is no positive number", "0.05 is the paper's"))
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        problems.append(Problem("seed", f"{seed!r} is no whole number of 64 bits"))
    if problems:
        raise UsageError(problems)


def _check_model(model: nn.Module, fresh: bool) -> None:
    refuse_wrapped(model)
    if problems := lazy_problems(model):
        raise UsageError(problems)
    name = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError(Problem(name, "on the meta device it has no values", "give it weights"))
    if not any(isinstance(site, LayerSite) for site in init_sites(model).values()):
        if any(isinstance(module, WeightNormed) for module in model.modules()):
            what = "recurrent, attention and embedding layers have no data-dependent start"
            way_out = "leave theirs as it is; Linear and convolutions have one"
            raise UsageError(Problem(name, what, way_out))
        way_out = "nc.convert(model, 'wn') or nc.wrap(layer) makes some"
        raise UsageError(Problem(name, "it has no weight-normed Linear or convolution", way_out))
    if not fresh and (problems := _traces_of_training(model)):
        raise UsageError(problems)


_UNTRAINED = re.compile(r"(\d+) of (\d+) norms still have initial statistics")
_LISTED = 5


def _traces_of_training(model: nn.Module) -> list[Problem]:
    """Say by what a model looks trained: statistics of its norms, or its history."""
    way_out = "initialise with fresh=True starts it anew: what it learnt of sizes is lost"
    problems = []
    for name in norm_names(model, lambda norm: is_norm(norm) or couples_in_training(norm)):
        state = norm_state(model.get_submodule(name))
        if not isinstance(state, str) and not state.untrained:
            problems.append(Problem(name, "its running statistics are trained", way_out))
    if len(problems) > _LISTED:
        more = Problem("", f"{len(problems) - _LISTED} more of the kind")
        problems = [*problems[:_LISTED], more]
    for entry in history_of(model):
        if "apply" in entry and _had_trained_norms(entry["apply"]):
            what = "it was converted from a model with trained statistics"
        elif done := next((verb for verb in ("calibrate", "recover") if verb in entry), None):
            what = f"its history has a {done}, which was made of a trained model"
        else:
            continue
        return [*problems, Problem(type(model).__name__, what, way_out)]
    return problems


def _had_trained_norms(plan: dict[str, Any]) -> bool:
    """Whether a plan took statistics over from norms of which some were trained."""
    took = [step for step in plan["steps"] if step["action"] not in ("keep", "wrap", "insert")]
    notes = [found for note in plan.get("notes", ()) if (found := _UNTRAINED.match(note))]
    return bool(took) and not any(found[1] == found[2] for found in notes)


@torch.no_grad()
def _draw(sites: Sequence[InitSite], std: float, seed: int) -> None:
    """Draw every v that is a site's own to set from N(0, std²): the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    for site in sites:
        if isinstance(site, LayerSite) and site.sets_gain:
            v = site.module.weight_v
            v.copy_(torch.randn(v.shape, generator=rng, dtype=torch.float64) * std)
            v.grad = None


@dataclass
class _Run:
    """One initialisation: what it works on, in place, and what it found.

    Args:
        model: changed.
        data: inputs.
        progress: see `initialise`.
        noise: seed of dropout; None for none.
        sites: what is set, in the order in which the model calls it.
        groups: names of sites that do not feed each other.
        left: what some sites leave to others.
        strange: layers whose own forward does not give g · t + b.
        sweeps: how often all groups were gone through.
        found: moments at the end.
    """

    model: nn.Module
    data: Batches
    progress: Progress | None
    noise: int | None = None
    sites: dict[str, InitSite] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    sweeps: int = 0
    found: dict[str, Moments] = field(default_factory=dict)

    def look_around(self) -> None:
        """Find which sites the first batch reaches, in which order, and which feed which."""
        every = init_sites(self.model)
        args, kwargs = next(iter(self.data))
        to_try: dict[str, tuple[LayerSite, Tensor]] = {}

        def look(name: str, x: Tensor, y: Tensor) -> None:
            site = every[name]
            if isinstance(site, LayerSite) and not site.has_known_forward:
                to_try[name] = site, x.clone()

        with _telling(0), self._noise(0):
            looks = {name: partial(look, name) for name in every}
            called = observe(self.model, args, kwargs, looks)
            strange = [name for name, (site, x) in to_try.items() if not site.obeys(x)]
        called = [name for name in called if name not in strange]
        order = list(dict.fromkeys(reversed(called)))[::-1]  # by last call
        groups = independent_groups(self.model, order, args, kwargs)
        # Data of another process may take another way: all follow the first.
        called, order, self.groups, self.strange = of_all_ranks((called, order, groups, strange))[0]
        self.sites = {name: every[name] for name in order}
        for name, calls in Counter(called).items():
            self.sites[name].calls = calls
        self.left = divide_tied(self.model, list(self.sites.values()))
        if not any(isinstance(site, LayerSite) for site in self.sites.values()):
            what = "the first batch calls no weight-normed layer that gives g · t + b"
            raise UsageError(
                Problem(type(self.model).__name__, what, "give the model's own inputs")
            )

    def carry_out(self) -> None:
        """Set one group after the other; again from the first that is off."""
        most = max(site.calls for site in self.sites.values())
        sweeps = _SWEEPS * most if most > 1 else _REFINED
        first = 0
        while first < len(self.groups) and self.sweeps < sweeps:
            for place in range(first, len(self.groups)):
                for name, moments in self._moments(self.groups[place]).items():
                    site = self.sites[name]
                    # Where k calls feed each other, s answers to g by a power between 1 and k, and
                    # this is the step for which the slowest of those is fastest (Richardson).
                    site.standardise_(moments, 2 / (1 + site.calls) if self.sweeps else 1.0)
                if self.progress is not None and not self.sweeps:
                    self.progress(place + 1, len(self.groups), "")
            self.sweeps += 1
            self.found = self._moments(list(self.sites))
            first = self._first_off()

    def _noise(self, batch: int) -> AbstractContextManager[None]:
        """Let the model draw in runs on a batch what it draws in each of them."""
        return nullcontext() if self.noise is None else noise_on(self.model, self.noise + batch)

    def _first_off(self) -> int:
        """The first group with a site that is not standard; their number where all are."""
        for place, group in enumerate(self.groups):
            for name in group:
                site = self.sites[name]
                if not site.error(self.found[name]) <= site.bound:
                    return place
        return len(self.groups)

    def _moments(self, names: Sequence[str]) -> dict[str, Moments]:
        """Run the model as far as these sites over all the data, of all processes."""
        own: dict[str, Moments] = {}

        def add(name: str, x: Tensor, y: Tensor) -> None:
            one = self.sites[name].moments(x, y)
            own[name] = own[name] + one if name in own else one

        looks = {name: partial(add, name) for name in names}
        calls = sum(self.sites[name].calls for name in names)
        for batch, (args, kwargs) in enumerate(self.data):
            with _telling(batch), self._noise(batch):
                observe(self.model, args, kwargs, looks, calls)
        found: dict[str, Moments] = {}
        for part in of_all_ranks(own):
            for name, moments in part.items():
                found[name] = found[name] + moments if name in found else moments
        return found


@contextmanager
def _telling(batch: int) -> Iterator[None]:
    """Tell what the model does not take as that."""
    try:
        yield
    except NormconvError:
        raise
    except Exception as reason:  # the forward is the user's, and so is the data
        what = f"the model does not run on it ({first_line(reason)})"
        way_out = "give batches of the model's own inputs"
        raise UsageError(Problem(f"data, batch {batch}", what, way_out)) from None
