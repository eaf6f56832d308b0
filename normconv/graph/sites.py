"""The sites of a model: every norm, what feeds it, and whether that can absorb it.

Judging is pure: it reads the call graph and the modules and says, for each site, either which layers
can absorb the norm exactly or in one sentence why none can. What to do with that is a target's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normconv.errors import CaptureError
from normconv.graph.calls import Call, CallGraph
from normconv.graph.capturing import capture
from normconv.graph.families import (
    NormState,
    has_known_forward,
    is_norm,
    norm_state,
    trailing_of,
)
from normconv.graph.hidden import hidden_references
from normconv.graph.names import Names
from normconv.graph.probe import absorbs_affine, is_affine_then_children
from normconv.layers import Reparametrised, kind_of, layout_of
from normconv.numerics import evaluating, in_training_mode

__all__ = ["Site", "Survey", "judge", "norm_names", "survey"]

Phase = Literal["eval", "train", "none"]


@dataclass(frozen=True)
class Site:
    """One norm and its surroundings.

    Args:
        name: the norm's first name.
        norm: its class name.
        channels: C; 0 where its tensors could not be read.
        aliases: its other names.
        producers: layers that can absorb it exactly, one per call; empty where they cannot.
        op: the producers' kind, ``none`` without.
        obstacle: why it cannot be absorbed; empty where it can.
        refusal: why it cannot be converted at all; empty where it can.
        shape: traced shape of its input.
        phase: the mode in which it is called.
        untrained: its statistics are still initial.
    """

    name: str
    norm: str
    channels: int = 0
    aliases: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    op: str = "none"
    obstacle: str = ""
    refusal: str = ""
    shape: tuple[int, ...] | None = None
    phase: Phase = "eval"
    untrained: bool = False


@dataclass(frozen=True)
class Survey:
    """All sites of a model.

    Args:
        sites: in call order; those only training calls next, those never called last.
        method: the capture that told the dataflow.
        failures: why captures tried before failed, by capture.
        functional_norms: calls of `F.batch_norm`, which no module holds.
    """

    sites: tuple[Site, ...]
    method: str
    failures: Mapping[str, str] = field(default_factory=dict)
    functional_norms: tuple[str, ...] = ()


def survey(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    methods: tuple[str, ...] | None = None,
) -> Survey:
    """Find and judge every norm of a model.

    Norms that eval mode never calls (auxiliary heads) are looked for in a capture in
    training mode.

    Raises:
        CaptureError: the model could not be captured in eval mode.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> survey(net, (torch.zeros(2, 3, 8, 8),)).sites[0].producers
    ('0',)
    """
    with evaluating(model):
        graph = capture(model, args, kwargs, methods=methods)
    found = judge(model, graph, "eval")
    missing = [name for name in norm_names(model) if name not in {site.name for site in found}]
    if missing:
        found += _training_sites(model, args, kwargs, graph, missing, methods)
    return Survey(tuple(found), graph.method, graph.failures, graph.functional_norms)


def _training_sites(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    eval_graph: CallGraph,
    missing: list[str],
    methods: tuple[str, ...] | None,
) -> list[Site]:
    try:
        with in_training_mode(model):
            graph = capture(model, args, kwargs, methods=methods)
    except CaptureError:
        graph = CallGraph((), "none")
    found = [
        site for site in judge(model, graph, "train", other=eval_graph) if site.name in missing
    ]
    names = Names(model)
    seen = {site.name for site in found}
    for name in missing:
        if name not in seen:
            module = model.get_submodule(name)
            state = norm_state(module)
            channels = state.channels if isinstance(state, NormState) else 0
            found.append(
                Site(name, type(module).__name__, channels, names.aliases(name), phase="none")
            )
    return found


def norm_names(model: nn.Module, wanted: Callable[[nn.Module], bool] = is_norm) -> list[str]:
    """First names of the outermost norms: what is inside a norm belongs to it."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") if outer else name for outer in found)
        if wanted(module) and not inside:
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
        self._other = other
        self._names = Names(model)
        self._hidden = hidden_references(model)

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
            return Site(**common, refusal=state)
        common |= {"channels": state.channels, "untrained": state.untrained}
        if refusal := self._refusal(name, norm, shape):
            return Site(**common, refusal=refusal)
        producers: list[str] = []
        for call in calls:
            source, obstacle = self._absorber(call, norm, state)
            if obstacle:
                return Site(**common, obstacle=obstacle)
            producers.append(source.target)
        op = kind_of(self._model.get_submodule(producers[0]))
        return Site(**common, producers=tuple(producers), op=op)

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

    def _absorber(self, call: Call, norm: nn.Module, state: NormState) -> tuple[Call, str]:
        """Return the call that feeds the norm, and why its layer cannot absorb it (empty: it can)."""
        source = self._graph.calls[call.inputs[0]]
        hops = [call.index]
        while source.kind == "module" and self._is_identity(source) and source.inputs:
            hops.append(source.index)
            source = self._graph.calls[source.inputs[0]]
        if source.kind != "module":
            return source, f"follows {_describe(source)}"
        layer = self._model.get_submodule(source.target)
        if layout_of(layer) is None:
            return source, f"follows {source.target} ({type(layer).__name__})"
        obstacle = self._dataflow_obstacle(source, hops) or self._layer_obstacle(
            source, layer, norm, state
        )
        return source, obstacle

    def _is_identity(self, call: Call) -> bool:
        module = self._model.get_submodule(call.target)
        return type(module) is nn.Identity and not _has_hooks(module)

    def _dataflow_obstacle(self, source: Call, hops: list[int]) -> str:
        name = source.target
        times = len(self._graph.calls_of[name])
        if times > 1:
            return f"{name} is called {times} times"
        if self._other is not None and name in self._other.calls_of:
            return f"{name} is also called in the other mode"
        chain = [source.index, *hops[:0:-1]]
        for index in chain:
            users = self._graph.users.get(index, ())
            users = tuple(user for user in users if not self._graph.calls[user].reads_shape)
            if len(users) > 1:
                others = [self._graph.calls[user] for user in users if user not in hops]
                return f"the output of {name} is also used by {_describe(others[0])}"
        if name in self._graph.outside_reads:
            return f"the tensors of {name} are read outside its own forward"
        return ""

    def _layer_obstacle(
        self, source: Call, layer: nn.Module, norm: nn.Module, state: NormState
    ) -> str:
        name, layout = source.target, layout_of(layer)
        assert layout is not None
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if (
            isinstance(layer, Reparametrised)
            or weight is None
            or "parametrizations" in layer._modules
        ):
            return f"the weight of {name} is computed from other parameters (fold it first)"
        if _has_hooks(layer) or _has_hooks(norm):
            return f"{name} or the norm has forward hooks, which would see other values"
        tied = [t for t in (weight, bias) if t is not None and len(self._names.owners(t)) > 1]
        if tied:
            others = [owner for owner in self._names.owners(tied[0]) if owner != name]
            return f"{name} shares parameters with {', '.join(others) or 'itself'}"
        if layout.channels(weight) != state.channels:
            return (
                f"{name} has {layout.channels(weight)} output channels, the norm {state.channels}"
            )
        rank = None if source.shape is None else len(source.shape)
        # A Linear takes any rank and a convolution one sample without a batch axis: the channels of
        # the norm, axis 1, are then not the rows of the weight.
        if rank != weight.dim() and (rank is not None or isinstance(layer, nn.Linear)):
            seen = "unknown" if rank is None else f"{rank}-D"
            return f"the output of {name} is {seen}: the norm's channels are not its features"
        own_forward = _overrides_forward(layer)
        if own_forward:
            shape = self._graph.calls[source.inputs[0]].shape if source.inputs else None
            if shape is None:
                return f"{name} ({type(layer).__name__}) has its own forward and no traced shape"
            if difference := absorbs_affine(layer, shape):
                return f"{name} ({type(layer).__name__}): {difference}"
        return ""


def _overrides_forward(layer: nn.Module) -> bool:
    """Whether the layer computes with a forward that torch did not define."""
    families = [
        kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn.modules")
    ]
    known = families[0]
    names = ("forward", "_conv_forward", "_output_padding")
    return any(getattr(type(layer), n, None) is not getattr(known, n, None) for n in names)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _describe(call: Call) -> str:
    if call.kind == "input":
        return f"the model's input {call.target}"
    if call.kind == "output":
        return "the model's output"
    if call.kind == "attribute":
        return f"the attribute {call.target}"
    return call.target
