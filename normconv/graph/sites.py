"""The sites of a model: every norm, what feeds it, and whether that can absorb it.

Judging is pure: it reads the call graph and the modules and says, for each site, either which layers
can absorb the norm exactly or in one sentence why none can. What to do with that is a target's choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normconv.errors import CaptureError
from normconv.graph.absorbing import Absorbers
from normconv.graph.branches import training_branches
from normconv.graph.calls import Call, CallGraph
from normconv.graph.capturing import capture
from normconv.graph.coupling import batch_norm_calls
from normconv.graph.families import (
    NormState,
    has_known_forward,
    is_leaf,
    is_norm,
    norm_state,
    trailing_of,
)
from normconv.graph.hidden import hidden_references
from normconv.graph.names import Names
from normconv.graph.probe import is_affine_then_children
from normconv.graph.standardizable import why_not_standardized
from normconv.layers import kind_of
from normconv.numerics import evaluating

__all__ = ["Phase", "Site", "Survey", "judge", "norm_names", "survey", "survey_graphs"]

Phase = Literal["eval", "train", "none"]


@dataclass(frozen=True)
class Site:
    """One norm and its surroundings.

    Args:
        name: the norm's first name.
        norm: its class name.
        channels: C; 0 where its tensors could not be read.
        aliases: its other names.
        producers: layers before it that can absorb it exactly; empty where they cannot.
        consumers: layers after it that can, where those before it cannot.
        spans: for each of those layers, which channel each of its features is (see
            `normconv.plan.Span`); empty for one to one.
        op: the producers' kind, ``none`` without.
        obstacle: why the layers before it cannot absorb it; empty where they can.
        refusal: why it cannot be converted at all; empty where it can.
        shape: traced shape of its input.
        phase: the mode in which it is called.
        eps: of the norm; None where it is refused for what it holds.
        untrained: its statistics are still initial.
        plain_filters: why weight standardization should leave the producers as they are.
    """

    name: str
    norm: str
    channels: int = 0
    aliases: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    spans: tuple[str, ...] = ()
    op: str = "none"
    obstacle: str = ""
    refusal: str = ""
    shape: tuple[int, ...] | None = None
    phase: Phase = "eval"
    eps: float | None = None
    untrained: bool = False
    plain_filters: str = ""

    def unabsorbed(self, obstacle: str) -> Site:
        """Return the site as one that no layer can absorb."""
        return replace(self, producers=(), consumers=(), spans=(), op="none", obstacle=obstacle)


@dataclass(frozen=True)
class Survey:
    """All sites of a model.

    Args:
        sites: in call order; those only training calls next, those never called last.
        method: the capture that told the dataflow.
        failures: why captures tried before failed, by capture.
        functional_norms: calls of `F.batch_norm`, which no module holds.
        batch_calls: how many calls of `F.batch_norm` normalize activations with their own batch.
    """

    sites: tuple[Site, ...]
    method: str
    failures: Mapping[str, str] = field(default_factory=dict)
    functional_norms: tuple[str, ...] = ()
    batch_calls: int = 0


def survey(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    methods: tuple[str, ...] | None = None,
    wanted: Callable[[nn.Module], bool] = is_norm,
) -> Survey:
    """Find and judge every norm of a model, or every module that is wanted.

    Norms that eval mode never calls (auxiliary heads) are looked for in a capture in
    training mode.

    Raises:
        CaptureError: the model could not be captured in eval mode.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> survey(net, (torch.zeros(2, 3, 8, 8),)).sites[0].producers
    ('0',)
    """

    def look(training: bool) -> CallGraph:
        with training_branches(model) if training else evaluating(model):
            return capture(model, args, kwargs, methods=methods)

    return survey_graphs(model, look, norm_names(model, wanted), wanted)


def survey_graphs(
    model: nn.Module,
    look: Callable[[bool], CallGraph],
    norms: Sequence[str],
    wanted: Callable[[nn.Module], bool] = is_norm,
) -> Survey:
    """Judge norms by the graphs that `look` gives of eval mode and, where needed, of training mode.

    Raises:
        CaptureError: there is no graph of eval mode.
    """
    graph = look(False)
    found = [site for site in judge(model, graph, "eval", wanted=wanted) if site.name in norms]
    called = {site.name for site in found}
    missing = [name for name in norms if name not in called]
    training = _training_graph(look) if missing or _reads_the_mode(model) else None
    if training is not None:
        there = {site.name: site for site in judge(model, training, "train", wanted=wanted)}
        found = [_in_both_modes(site, there.get(site.name), training) for site in found]
        if missing:
            only = judge(model, training, "train", other=graph, wanted=wanted)
            found += [site for site in only if site.name in missing]
    found += _never_called(model, [n for n in missing if n not in {site.name for site in found}])
    functional, calls = graph.functional_norms, batch_norm_calls(graph)
    return Survey(tuple(found), graph.method, graph.failures, functional, calls)


def _training_graph(look: Callable[[bool], CallGraph]) -> CallGraph | None:
    try:
        return look(True)
    except CaptureError:
        return None


def _reads_the_mode(model: nn.Module) -> bool:
    """Whether a forward that is not torch's speaks of `training`: its two modes may call other things."""
    kinds = {type(module) for module in model.modules() if not is_leaf(module)}
    return any(_speaks_of_training(kind) for kind in kinds)


def _speaks_of_training(kind: type[nn.Module]) -> bool:
    if kind.__module__.startswith("torch.nn."):
        return False
    try:
        return "training" in inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return True


def _in_both_modes(site: Site, there: Site | None, training: CallGraph) -> Site:
    """Take back a fold that training mode does not allow: its branches would see folded values."""
    layers = site.producers or site.consumers
    why = ""
    if layers and there is None:
        used = [layer for layer in layers if layer in training.calls_of]
        why = f"training mode calls {used[0]} without it" if used else ""
    elif there is not None and layers != (there.producers or there.consumers):
        why = f"in training mode, {there.obstacle or there.refusal or 'other layers are around it'}"
    elif there is not None and site.spans != there.spans:
        why = "in training mode its channels go elsewhere"
    return site.unabsorbed(why) if why else site


def _never_called(model: nn.Module, missing: list[str]) -> list[Site]:
    names = Names(model)
    found = []
    for name in missing:
        module = model.get_submodule(name)
        state = norm_state(module)
        channels = state.channels if isinstance(state, NormState) else 0
        kind = type(module).__name__
        found.append(Site(name, kind, channels, names.aliases(name), phase="none"))
    return found


def norm_names(model: nn.Module, wanted: Callable[[nn.Module], bool] = is_norm) -> list[str]:
    """First names of the outermost norms: what is inside a norm belongs to it."""
    found: list[str] = []
    for name, module in model.named_modules():
        # What is inside a norm comes right after it.
        inside = bool(found) and (not found[-1] or name.startswith(f"{found[-1]}."))
        if not inside and wanted(module):
            found.append(name)
    return found


def judge(
    model: nn.Module,
    graph: CallGraph,
    phase: Phase,
    *,
    other: CallGraph | None = None,
    wanted: Callable[[nn.Module], bool] = is_norm,
) -> list[Site]:
    """Judge the norms that a graph calls, in call order.

    Args:
        model: the module the graph was captured from.
        graph: its calls.
        phase: the mode it was captured in.
        other: the graph of the other mode; a layer called there too must not absorb anything.
        wanted: which modules count as norms.
    """
    norms = set(norm_names(model, wanted))
    judge_ = _Judge(model, graph, other)
    called = dict.fromkeys(
        call.target for call in graph.calls if call.kind == "module" and call.target in norms
    )
    return [judge_.site(name, phase) for name in called]


class _Judge:
    def __init__(self, model: nn.Module, graph: CallGraph, other: CallGraph | None) -> None:
        self._model = model
        self._graph = graph
        self._names = Names(model)
        self._hidden = hidden_references(model)
        self._absorbers = Absorbers(model, graph, self._names, other)

    def site(self, name: str, phase: Phase) -> Site:
        norm = self._model.get_submodule(name)
        calls = self._graph.calls_of[name]
        shape = self._input_shape(calls[0])
        common: dict[str, Any] = {
            "name": name,
            "norm": type(norm).__name__,
            "aliases": self._names.aliases(name),
            "shape": shape,
            "phase": phase,
        }
        state = norm_state(norm)
        if isinstance(state, str):
            return Site(**common, channels=getattr(norm, "num_features", 0), refusal=state)
        common |= {"channels": state.channels, "eps": state.eps, "untrained": state.untrained}
        if refusal := self._refusal(name, norm, shape):
            return Site(**common, refusal=refusal)
        found = self._absorbers.judge(norm, calls, state)
        first = found.producers[:1]
        op = kind_of(self._model.get_submodule(first[0])) if first else "none"
        layers = [self._model.get_submodule(name) for name in found.producers]
        return Site(
            **common,
            producers=found.producers,
            consumers=found.consumers,
            spans=found.spans,
            op=op,
            obstacle=found.obstacle,
            plain_filters=why_not_standardized(layers),
        )

    def _input_shape(self, call: Call) -> tuple[int, ...] | None:
        return self._graph.calls[call.inputs[0]].shape if call.inputs else None

    def _refusal(self, name: str, norm: nn.Module, shape: tuple[int, ...] | None) -> str:
        if name in self._graph.outside_reads:
            return "its tensors are read outside its own forward"
        if holder := self._hidden.get(id(norm)):
            return f"{holder} holds it outside of the registered modules"
        unbatched = isinstance(norm, _InstanceNorm) and norm._get_no_batch_dim()
        if unbatched and shape is not None and len(shape) == unbatched:
            return "its input has no batch axis, its channels are axis 0"
        if not has_known_forward(norm) or trailing_of(norm):
            rank = len(shape) if shape is not None else 4
            return is_affine_then_children(norm, rank)
        return ""
