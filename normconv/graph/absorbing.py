"""Which layers can take a norm's map exactly: those before it, else those after it.

Before: s · (W x + b) + t has rows s · W and bias s · b + t. After: W (s ∘ x + t) + b has columns W · s
and bias b + W t, unless zeros are padded in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from normconv.graph.calls import Call, CallGraph
from normconv.graph.chains import Chain, Chains, has_hooks
from normconv.graph.families import NormState, trailing_of
from normconv.graph.hidden import held_by_functions
from normconv.graph.names import Names
from normconv.graph.probe import absorbs_affine, absorbs_input_affine
from normconv.layers import Reparametrised, layout_of
from normconv.plan import Span

__all__ = ["Absorbers", "Judgement"]

Probe = Callable[[nn.Module, tuple[int, ...]], str]


@dataclass(frozen=True)
class Judgement:
    """Where a norm's map can go.

    Args:
        producers: layers before it that can take it; empty where they cannot.
        consumers: layers after it that can take it, where those before it cannot.
        spans: for each of the layers, which channel each of its features is; empty for one to one.
        obstacle: why the layers before it cannot.
    """

    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    spans: tuple[str, ...] = ()
    obstacle: str = ""


class Absorbers:
    """Judges the norms of one graph.

    Args:
        model: the module the graph was captured from.
        graph: its calls.
        names: of the model.
        other: the graph of the other mode; a layer called there too must not absorb anything.
    """

    def __init__(
        self, model: nn.Module, graph: CallGraph, names: Names, other: CallGraph | None
    ) -> None:
        self._model = model
        self._graph = graph
        self._names = names
        self._other = other
        self._chains = Chains(model, graph)
        self._bound = held_by_functions(model)

    def judge(self, norm: nn.Module, calls: tuple[Call, ...], state: NormState) -> Judgement:
        """Say which layers can take the map of a norm over all its calls."""
        before = self._agreed([self._before(call, norm, state) for call in calls], state)
        if not isinstance(before, str):
            layers, spans = before
            return Judgement(layers, spans=spans)
        after = self._agreed([self._after(call, norm, state) for call in calls], state)
        if isinstance(after, str):
            return Judgement(obstacle=before)
        layers, spans = after
        return Judgement((), layers, spans, obstacle=before)

    def _agreed(
        self, chains: list[Chain | str], state: NormState
    ) -> tuple[tuple[str, ...], tuple[str, ...]] | str:
        """Join what the norm's calls say: a layer called often must end a chain each time."""
        spans: dict[str, Span] = {}
        seen: dict[str, set[int]] = {}
        for chain in chains:
            if isinstance(chain, str):
                return chain
            whole = (Span(0, state.channels),)
            for end, span in zip(chain.ends, chain.spans or whole, strict=True):
                if spans.setdefault(end.target, span) != span:
                    return f"the features of {end.target} are other channels in another call"
                seen.setdefault(end.target, set()).add(end.index)
        for name, ends in seen.items():
            times = len(self._graph.calls_of[name])
            if times != len(ends):
                return f"{name} is called {times} times"
        direct = all(chain.direct for chain in chains if isinstance(chain, Chain))
        return tuple(spans), () if direct else tuple(str(span) for span in spans.values())

    def _before(self, call: Call, norm: nn.Module, state: NormState) -> Chain | str:
        chain = self._chains.before(call, state.channels)
        if isinstance(chain, str):
            return chain
        for place, end in enumerate(chain.ends):
            layer = self._model.get_submodule(end.target)
            obstacle = self._shared(end) or self._unable(end.target, layer, norm)
            if not obstacle and chain.direct:
                obstacle = self._misfit(end, layer, state)
            elif not obstacle and chain.spans[place].features != _features(layer):
                obstacle = f"the output of {end.target} is no batch of its features"
            obstacle = obstacle or self._unlike_torch(end, layer, absorbs_affine)
            if obstacle:
                return obstacle
        return chain

    def _after(self, call: Call, norm: nn.Module, state: NormState) -> Chain | str:
        if trailing_of(norm):
            return "it does more than normalize"
        chain = self._chains.after(call, state.channels)
        if isinstance(chain, str):
            return chain
        for end, span in zip(chain.ends, chain.spans, strict=True):
            layer = self._model.get_submodule(end.target)
            obstacle = (
                self._shared(end)
                or self._unable(end.target, layer, norm)
                or _misfit_after(end, layer, span.features, self._graph)
                or self._unlike_torch(end, layer, absorbs_input_affine)
            )
            if obstacle:
                return obstacle
        return chain

    def _shared(self, end: Call) -> str:
        """Who else would see an edit of the layer."""
        name = end.target
        if self._other is not None and name in self._other.calls_of:
            return f"{name} is also called in the other mode"
        if name in self._graph.outside_reads:
            return f"the tensors of {name} are read outside its own forward"
        return ""

    def _unable(self, name: str, layer: nn.Module, norm: nn.Module) -> str:
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if (
            isinstance(layer, Reparametrised)
            or weight is None
            or "parametrizations" in layer._modules
        ):
            return f"the weight of {name} is computed from other parameters (fold it first)"
        if function := self._bound.get(id(layer)):
            return f"{function} is a function that holds {name}: a copy would call the original"
        if has_hooks(layer) or has_hooks(norm):
            return f"{name} or the norm has forward hooks, which would see other values"
        tied = [t for t in (weight, bias) if t is not None and len(self._names.owners(t)) > 1]
        if tied:
            others = [owner for owner in self._names.owners(tied[0]) if owner != name]
            return f"{name} shares parameters with {', '.join(others) or 'itself'}"
        return ""

    def _misfit(self, end: Call, layer: nn.Module, state: NormState) -> str:
        """Whether the norm's channels, axis 1, are the features of a layer right before it."""
        name, weight = end.target, layer._parameters["weight"]
        assert weight is not None
        if _features(layer) != state.channels:
            return f"{name} has {_features(layer)} output channels, the norm {state.channels}"
        rank = None if end.shape is None else len(end.shape)
        # A Linear takes any rank and a convolution one sample without a batch axis: the channels of
        # the norm, axis 1, are then not the rows of the weight.
        if rank != weight.dim() and (rank is not None or isinstance(layer, nn.Linear)):
            seen = "unknown" if rank is None else f"{rank}-D"
            return f"the output of {name} is {seen}: the norm's channels are not its features"
        return ""

    def _unlike_torch(self, end: Call, layer: nn.Module, probe: Probe) -> str:
        if not _overrides_forward(layer):
            return ""
        name = f"{end.target} ({type(layer).__name__})"
        shape = self._graph.calls[end.inputs[0]].shape if end.inputs else None
        if shape is None:
            return f"{name} has its own forward and no traced shape"
        difference = probe(layer, shape)
        return f"{name}: {difference}" if difference else ""


def _features(layer: nn.Module) -> int:
    layout, weight = layout_of(layer), layer._parameters["weight"]
    assert layout is not None
    assert weight is not None
    return layout.channels(weight)


def _misfit_after(end: Call, layer: nn.Module, features: int, graph: CallGraph) -> str:
    """Whether a shift of the input is a shift of the output everywhere, borders included."""
    name, weight = end.target, layer._parameters["weight"]
    assert weight is not None
    if isinstance(layer, nn.Linear):
        return "" if features == layer.in_features else f"{name} takes other features"
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"the border of {name} sees fewer taps of its input"
    shape = graph.calls[end.inputs[0]].shape
    if shape is None or len(shape) != weight.dim() or features != layer.in_channels:
        return f"{name} takes no batch of its channels"
    if layer.padding == "same":
        pads = any(size > 1 for size in layer.kernel_size)
    else:
        pads = layer.padding != "valid" and any(layer.padding)
    if layer.padding_mode == "zeros" and pads:
        return f"{name} pads with zeros, which the norm's shift would have to reach"
    return ""


def _overrides_forward(layer: nn.Module) -> bool:
    """Whether the layer computes with a forward that torch did not define."""
    families = [
        kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn.modules")
    ]
    known = families[0]
    names = ("forward", "_conv_forward", "_output_padding")
    if any(name in vars(layer) for name in names):  # patched on this one layer
        return True
    return any(getattr(type(layer), n, None) is not getattr(known, n, None) for n in names)
