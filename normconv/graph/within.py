"""One submodule of a model, met where it is used: its real inputs, and who else sees what is in it.

The whole model need not be traceable. One forward pass of it is watched; the submodule is then captured
on the inputs it got there. What a layer inside may absorb is decided by both: by the capture of the
submodule, and by each of its calls in the watched pass, where the rest of the model stands around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from normconv.errors import CaptureError, Problem, UsageError
from normconv.graph.branches import training_branches
from normconv.graph.calls import Call, CallGraph
from normconv.graph.capturing import capture
from normconv.graph.hook_capture import Visit, run_watched
from normconv.graph.names import Names
from normconv.graph.running import Innermost, first_line
from normconv.graph.sites import Phase, Site, Survey, judge, norm_names, survey_graphs
from normconv.graph.tracing import Trace, shapes_of
from normconv.numerics import evaluating

__all__ = ["Reached", "reach", "relative_names", "submodule", "survey_within"]


@dataclass(frozen=True)
class Reached:
    """What one forward pass of the whole model did to a submodule.

    Args:
        at: the name the submodule was asked for by.
        args: the positional arguments of its first call.
        kwargs: the keyword arguments of its first call.
        visits: all its calls.
        graph: the calls of the whole model.
        extents: for each call of the graph the number of the visit it belongs to; 0 for none.
        training: only training mode reaches it.
        notes: what a reader should know.
    """

    at: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    visits: tuple[Visit, ...]
    graph: CallGraph
    extents: tuple[int, ...]
    training: bool
    notes: tuple[str, ...]


def submodule(model: nn.Module, at: str) -> nn.Module:
    """Return the submodule of that name.

    Raises:
        UsageError: there is none; names the nearest.

    >>> submodule(nn.Sequential(nn.ReLU()), "1")
    Traceback (most recent call last):
    normconv.errors.UsageError: at='1': the Sequential has no such submodule; nearest: '0'
    """
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if at in known:
        return model.get_submodule(at)
    near = get_close_matches(at, known, n=1, cutoff=0.0)
    way_out = f"nearest: '{near[0]}'" if near else ""
    what = f"the {type(model).__name__} has no such submodule"
    raise UsageError(Problem(f"at={at!r}", what, way_out))


def reach(
    model: nn.Module, at: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Reached:
    """Run the whole model, in eval mode, else in training mode, until a submodule is called.

    The seed is fixed, and nothing of the model or its inputs is changed.

    Raises:
        UsageError: there is no such submodule.
        CaptureError: the model does not run, or neither mode calls the submodule.
    """
    found = [_reached(model, at, args, kwargs or {}, training=False)]
    if not isinstance(found[0], Reached):
        found.append(_reached(model, at, args, kwargs or {}, training=True))
    if isinstance(reached := found[-1], Reached):
        return reached
    problems = [each for each in found if isinstance(each, Problem)]
    raised = [problem for problem in problems if problem.where != at]
    raise CaptureError(raised or problems[-1])


def _reached(
    model: nn.Module, at: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool
) -> Reached | Problem:
    """Run the model in one mode; say what it raised, or that it does not call the submodule."""
    module = submodule(model, at)
    visits: list[Visit] = []
    trace = Trace(model, Names(model))
    with evaluating(model), Innermost(model) as innermost:
        model.train(training)
        try:
            run_watched(model, args, kwargs, trace, module, visits)
        except Exception as reason:  # the forward is the user's
            where = innermost.describe() or type(model).__name__
            what = f"{first_line(reason)} (in {'training' if training else 'eval'} mode)"
            way_out = f"check that the example inputs ({shapes_of((args, kwargs))}) fit the model"
            return Problem(where, what, way_out)
    if not visits:
        return _never_called(model, at, trace)
    first, notes = visits[0], _notes(at, visits, training)
    graph, extents = trace.graph(), tuple(trace.extents)
    return Reached(at, first.args, first.kwargs, tuple(visits), graph, extents, training, notes)


def _notes(at: str, visits: list[Visit], training: bool) -> tuple[str, ...]:
    notes = [f"inputs of {at}: those of its call in one forward pass of the whole model"]
    shapes = list(dict.fromkeys(visit.shapes for visit in visits))
    if len(visits) > 1:
        notes[0] = f"{at} is called {len(visits)} times; its inputs are those of the first call"
    if len(shapes) > 1:
        notes.append(f"inputs of {at} differ from call to call: {'; '.join(shapes[:4])}")
    if training:
        notes.append(f"only training mode calls {at}: its inputs are those of training mode")
    return tuple(notes)


def _never_called(model: nn.Module, at: str, trace: Trace) -> Problem:
    names = Names(model)
    inside = set(relative_names(model, at))
    called = [
        call.target for call in trace.calls if call.kind == "module" and call.target in inside
    ]
    if not called:
        what = "the model calls it neither in eval nor in training mode"
        return Problem(at, what, "give example inputs that reach it, or name another submodule")
    parents = dict.fromkeys(name.rpartition(".")[0] for name in called)
    near = [name for name in parents if name != names.canonical(at)] or list(called)
    what = f"the model never calls it as a module, though it calls {called[0]} inside"
    return Problem(at, what, f"name a submodule that is called, such as {near[0]}")


def relative_names(model: nn.Module, at: str) -> dict[str, str]:
    """Return, by their first names in the model, the names inside the submodule of what is in it."""
    names = Names(model)
    inner = model.get_submodule(at)
    return {names.canonical(_joined(at, name)): name for name, _ in inner.named_modules()}


def _joined(at: str, name: str) -> str:
    return f"{at}.{name}" if name else at


def survey_within(
    model: nn.Module, at: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> tuple[Survey, Reached]:
    """Find and judge every norm of a submodule, by its names in the whole model.

    Args:
        model: the whole model, which runs on the inputs.
        at: the submodule's name.
        args: positional inputs of the whole model.
        kwargs: keyword inputs of the whole model.

    Raises:
        UsageError: there is no such submodule.
        CaptureError: the model does not run, does not call the submodule, or no capture takes that.
    """
    reached = reach(model, at, args, kwargs)
    inner = model.get_submodule(at)
    outer_name = {name: outer for outer, name in relative_names(model, at).items()}

    def look(training: bool) -> CallGraph:
        with training_branches(inner) if training else evaluating(inner):
            graph = capture(inner, reached.args, reached.kwargs)
        return _renamed(graph, outer_name, reached.graph.outside_reads)

    norms = [outer_name[name] for name in norm_names(inner)]
    found = survey_graphs(model, look, norms)
    in_training: Reached | Problem = reached
    if any(site.phase == "train" for site in found.sites) and not reached.training:
        in_training = _reached(model, at, args, kwargs or {}, training=True)
    return replace(found, sites=_checked(model, found.sites, reached, in_training)), reached


def _checked(
    model: nn.Module, sites: tuple[Site, ...], reached: Reached, in_training: Reached | Problem
) -> tuple[Site, ...]:
    """Hold each site against the pass of the whole model in the mode that calls it."""
    witness = other = _Witness(model, reached)
    if in_training is not reached and isinstance(in_training, Reached):
        other = _Witness(model, in_training)
    return tuple((other if s.phase == "train" else witness).checked(s) for s in sites)


def _renamed(
    graph: CallGraph, outer_name: Mapping[str, str], outside_reads: frozenset[str]
) -> CallGraph:
    calls = tuple(
        replace(call, target=outer_name[call.target]) if call.kind == "module" else call
        for call in graph.calls
    )
    reads = {outer_name.get(name, name) for name in graph.outside_reads}
    return replace(graph, calls=calls, outside_reads=outside_reads | reads)


class _Witness:
    """What the watched pass says of sites inside a submodule."""

    def __init__(self, model: nn.Module, reached: Reached) -> None:
        self._at = reached.at
        self._names = Names(model)
        self._inside = {self._names.canonical(reached.at)}
        self._inside.update(self._names.aliases(reached.at))
        calls = zip(reached.graph.calls, reached.extents, strict=True)
        self._outside = {c.target for c, extent in calls if c.kind == "module" and not extent}
        phase: Phase = "train" if reached.training else "eval"
        self._visits: list[tuple[dict[str, Site], frozenset[str]]] = []
        for graph in _graphs_of_visits(reached):
            sites = {site.name: site for site in judge(model, graph, phase)}
            self._visits.append((sites, frozenset(graph.calls_of)))

    def checked(self, site: Site) -> Site:
        """Take from a site what the rest of the model does not let it have."""
        layers = site.producers or site.consumers
        if not layers or not (obstacle := self._obstacle(site, layers)):
            return site
        return site.unabsorbed(obstacle)

    def _obstacle(self, site: Site, layers: tuple[str, ...]) -> str:
        for name in (site.name, *layers):
            elsewhere = [a for a in (name, *self._names.aliases(name)) if not self._is_inside(a)]
            if elsewhere:
                return f"{name} is also {elsewhere[0]}, outside of {self._at}"
            if name in self._outside:
                return f"{name} is also called outside of {self._at}"
        met = False
        for sites, called in self._visits:
            if (seen := sites.get(site.name)) is None:
                if not called.isdisjoint(layers):
                    return f"another call of {self._at} uses {layers[0]} without the norm"
                continue
            met = True
            told = (set(seen.producers), set(seen.consumers))
            if told != (set(site.producers), set(site.consumers)):
                return (
                    seen.refusal
                    or seen.obstacle
                    or f"another call of {self._at} feeds it otherwise"
                )
        if not met:
            return (
                f"no call of {self._at} in the whole model showed that nobody else uses {layers[0]}"
            )
        return ""

    def _is_inside(self, path: str) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in self._inside)


def _graphs_of_visits(reached: Reached) -> list[CallGraph]:
    """The graph once for each visit, in which all that is not of that visit is nothing but a user."""
    found: dict[tuple[Any, ...], CallGraph] = {}
    for visit in range(1, len(reached.visits) + 1):
        calls = []
        for call, extent in zip(reached.graph.calls, reached.extents, strict=True):
            if extent == visit:
                calls.append(call)
                continue
            used = tuple(i for i in call.inputs if reached.extents[i] == visit)
            what = f"what stands outside of {reached.at} ({call.target})"
            calls.append(Call(call.index, "function", what, used, call.shape))
        own = [c for c, extent in zip(calls, reached.extents, strict=True) if extent == visit]
        first = own[0].index if own else 0
        like = tuple((c.kind, c.target, tuple(i - first for i in c.inputs)) for c in own)
        found.setdefault((like, _leaving(calls, reached.extents, visit)), _graph(reached, calls))
    return list(found.values())


def _leaving(calls: list[Call], extents: tuple[int, ...], visit: int) -> tuple[int, ...]:
    """Which calls of a visit, counted within it, somebody outside uses."""
    place = {c.index: n for n, c in enumerate(c for c in calls if extents[c.index] == visit)}
    return tuple(sorted({place[i] for c in calls if extents[c.index] != visit for i in c.inputs}))


def _graph(reached: Reached, calls: list[Call]) -> CallGraph:
    return replace(reached.graph, calls=tuple(calls))
