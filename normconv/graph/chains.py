"""Through which calls can an affine map per channel be pulled, and where does each channel go?

Between a norm and a layer there may be calls that only move or average numbers: flatten, reshape,
permute, concatenate, average pooling. A channel map commutes with those. Nothing here knows how each of
them orders its elements: labels are sent through the very calls of the trace, one a channel, and what
comes out says where they went; random numbers then confirm that the map commutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normconv.graph.calls import Call, CallGraph
from normconv.layers import layout_of
from normconv.numerics import Affine, apply_affine
from normconv.plan import Span

__all__ = ["Chain", "Chains", "describe", "has_hooks"]

# Functions and modules that move or average numbers, in training mode as in eval mode. The probe finds
# out what each does with its arguments; it could not find out that a clamp at 1e4 is no identity.
_MOVING_FUNCTIONS = frozenset(
    [
        "_unsafe_view",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "broadcast_to",
        "cat",
        "chunk",
        "clone",
        "concat",
        "concatenate",
        "contiguous",
        "expand",
        "flatten",
        "flip",
        "getitem",
        "interpolate",
        "mean",
        "moveaxis",
        "movedim",
        "narrow",
        "permute",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reshape",
        "roll",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "stack",
        "swapaxes",
        "swapdims",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "upsample_bilinear2d",
        "upsample_linear1d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "view",
    ]
) | {"dropout of nothing"}
_MOVING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Upsample,
)
_MOST_CALLS = 64
_MOST_ELEMENTS = 2**25
_BOUND = 1e-9
_SEED = 0


@dataclass(frozen=True)
class Chain:
    """What lies between a norm and the layers at the other end.

    Args:
        ends: the layers' calls.
        spans: for each end, which channel of the norm each of its features is; empty when `direct`.
        direct: nothing but identities lies between: feature j is channel j, if anything is.
    """

    ends: tuple[Call, ...]
    spans: tuple[Span, ...] = ()
    direct: bool = False


class Chains:
    """Finds the chains before and after the norms of one graph.

    Args:
        model: the module the graph was captured from.
        graph: its calls.
    """

    def __init__(self, model: nn.Module, graph: CallGraph) -> None:
        self._model = model
        self._graph = graph

    def before(self, norm: Call, channels: int) -> Chain | str:
        """Find the layers whose outputs become the norm's input and nothing else.

        Returns:
            The chain, or in one sentence why there is none.
        """
        ends: dict[int, Call] = {}
        between: dict[int, Call] = {}
        waiting = list(norm.inputs[:1])
        while waiting:
            call = self._graph.calls[waiting.pop()]
            if self._is_layer(call):
                ends[call.index] = call
            elif self._moves(call) and len(between) < _MOST_CALLS:
                between[call.index] = call
                waiting += [i for i in self._tensors_into(call) if i not in between]
            else:
                return f"follows {self._named(call)}"
        inside = {norm.index, *between}
        for call in (*ends.values(), *between.values()):
            if others := [i for i in self._readers(call) if i not in inside]:
                used_by = describe(self._graph.calls[others[0]])
                return f"the output of {call.target} is also used by {used_by}"
        if self._only_identities(between.values()):
            return Chain(tuple(ends.values()), direct=True)
        return self._probe_before(norm, channels, _in_order(ends), between)

    def after(self, norm: Call, channels: int) -> Chain | str:
        """Find the layers that take the norm's output, and nothing else does.

        Returns:
            The chain, or in one sentence why there is none.
        """
        ends: dict[int, Call] = {}
        between: dict[int, Call] = {}
        waiting = [norm.index]
        while waiting:
            readers = self._readers(self._graph.calls[waiting.pop()])
            if not readers:
                return "some of its output is not used"
            for call in (self._graph.calls[index] for index in readers):
                if self._is_layer(call):
                    ends[call.index] = call
                elif self._moves(call) and len(between) < _MOST_CALLS:
                    waiting += [call.index] if call.index not in between else []
                    between[call.index] = call
                else:
                    return f"is followed by {self._named(call)}"
        inside = {norm.index, *between}
        for call in (*ends.values(), *between.values()):
            if others := [i for i in self._tensors_into(call) if i not in inside]:
                return f"{describe(self._graph.calls[others[0]])} joins its output"
        return self._probe_after(norm, channels, _in_order(ends), between)

    def _is_layer(self, call: Call) -> bool:
        return call.kind == "module" and layout_of(self._module(call)) is not None

    def _module(self, call: Call) -> nn.Module:
        return self._model.get_submodule(call.target)

    def _named(self, call: Call) -> str:
        if call.kind != "module":
            return describe(call)
        return f"{call.target} ({type(self._module(call)).__name__})"

    def _moves(self, call: Call) -> bool:
        if call.compute is None and not (call.kind == "module" and self._is_identity(call)):
            return False
        if call.kind == "function":
            return call.target in _MOVING_FUNCTIONS
        if call.kind != "module" or has_hooks(self._module(call)):
            return False
        module = self._module(call)
        never_drops = isinstance(module, nn.Dropout) and module.p == 0
        return type(module) in _MOVING_MODULES or never_drops

    def _is_identity(self, call: Call) -> bool:
        return type(self._module(call)) is nn.Identity

    def _only_identities(self, calls: Iterable[Call]) -> bool:
        return all(call.kind == "module" and self._is_identity(call) for call in calls)

    def _readers(self, call: Call) -> list[int]:
        """The calls that take its values, and not only its shape."""
        users = self._graph.users.get(call.index, ())
        return [user for user in users if not self._graph.calls[user].reads_shape]

    def _tensors_into(self, call: Call) -> list[int]:
        sources = [self._graph.calls[index] for index in call.inputs]
        return [s.index for s in sources if s.constant is None and not s.reads_shape]

    def _run(self, given: dict[int, Any], between: Mapping[int, Call]) -> dict[int, Any]:
        """Compute the calls between from the given values."""
        values = dict(given)
        for index in sorted(between):
            call = between[index]
            for source in call.inputs:
                if source not in values:
                    values[source] = self._graph.calls[source].constant
            only = values[call.inputs[0]]
            values[index] = only if call.compute is None else call.compute(values)
        return values

    def _probe_before(
        self, norm: Call, channels: int, ends: list[Call], between: Mapping[int, Call]
    ) -> Chain | str:
        shapes = [end.shape for end in ends]
        if any(shape is None or not _fits(shape) for shape in shapes):
            return _unknown(ends)
        axes = [self._feature_axis(end) for end in ends]
        sizes = [end.shape[axis] for end, axis in zip(ends, axes, strict=True) if end.shape]
        try:
            labels, first = {}, 1
            for end, axis, size in zip(ends, axes, sizes, strict=True):
                numbers = torch.arange(first, first + size, dtype=torch.float64)
                labels[end.index] = _along(numbers, axis, end.shape)
                first += size
            arrived = self._run(labels, between)[norm.inputs[0]]
            channel_of = _channel_of_label(arrived, channels, first)
            if isinstance(channel_of, str):
                return channel_of
            parts = channel_of.split(sizes)
            rng = torch.Generator().manual_seed(_SEED)
            affine = Affine(_normal((channels,), rng), _normal((channels,), rng))
            x = {end.index: _normal(end.shape or (), rng) for end in ends}
            moved = {
                end.index: apply_affine(x[end.index], affine.at(part), axis)
                for end, axis, part in zip(ends, axes, parts, strict=True)
            }
            expected = apply_affine(self._run(x, between)[norm.inputs[0]], affine)
            got = self._run(moved, between)[norm.inputs[0]]
        except Exception as reason:  # the calls are the user's: whatever they raise is the answer
            return f"what lies between could not be probed ({type(reason).__name__}: {reason})"
        return _chain_of(ends, [tuple(part.tolist()) for part in parts], got, expected)

    def _probe_after(
        self, norm: Call, channels: int, ends: list[Call], between: Mapping[int, Call]
    ) -> Chain | str:
        shape = self._graph.calls[norm.inputs[0]].shape if norm.inputs else None
        if shape is None or len(shape) < 2 or not _fits(shape):
            return _unknown([norm])
        try:
            numbers = torch.arange(1, channels + 1, dtype=torch.float64)
            labels = self._run({norm.index: _along(numbers, 1, shape)}, between)
            rng = torch.Generator().manual_seed(_SEED)
            affine = Affine(_normal((channels,), rng), _normal((channels,), rng))
            x = _normal(shape, rng)
            before = self._run({norm.index: x}, between)
            after = self._run({norm.index: apply_affine(x, affine)}, between)
            maps: list[tuple[int, ...]] = []
            got, expected = [], []
            for end in ends:
                source, axis = end.inputs[0], self._feature_axis(end)
                channel = _label_of_feature(labels[source], axis)
                if isinstance(channel, str):
                    return f"{end.target}: {channel}"
                maps.append(tuple(channel.tolist()))
                expected.append(apply_affine(before[source], affine.at(channel), axis).flatten())
                got.append(after[source].flatten())
        except Exception as reason:
            return f"what lies between could not be probed ({type(reason).__name__}: {reason})"
        return _chain_of(ends, maps, torch.cat(got), torch.cat(expected))

    def _feature_axis(self, end: Call) -> int:
        return -1 if isinstance(self._module(end), nn.Linear) else 1


def _in_order(calls: Mapping[int, Call]) -> list[Call]:
    return [calls[index] for index in sorted(calls)]


def _chain_of(
    ends: list[Call], maps: list[tuple[int, ...]], got: Tensor, expected: Tensor
) -> Chain | str:
    if not float((got - expected).abs().max()) <= _BOUND * float(expected.abs().max()):
        return "what lies between does not commute with a map per channel"
    spans = [Span.of(channels) for channels in maps]
    if any(span is None for span in spans):
        return "the order of its channels there is no plain range"
    return Chain(tuple(ends), tuple(span for span in spans if span is not None))


def _channel_of_label(arrived: Tensor, channels: int, labels: int) -> Tensor | str:
    """For each label, which started at 1, the only channel (axis 1) it arrived in."""
    if arrived.dim() < 2 or arrived.shape[1] != channels:
        return "what lies between could not be followed"
    whole = arrived.round()
    if bool((arrived - whole).abs().max() > 1e-3) or bool((whole < 1).any()):
        return "what lies between mixes channels or adds values of its own"
    label = whole.long().transpose(0, 1).reshape(channels, -1)
    channel = torch.arange(channels).view(-1, 1).expand_as(label)
    first = torch.full((labels,), channels).scatter_reduce(
        0, label.flatten(), channel.flatten(), "amin"
    )
    last = torch.full((labels,), -1).scatter_reduce(0, label.flatten(), channel.flatten(), "amax")
    if bool((last[1:] < 0).any()):
        return "some of its features do not arrive at the norm"
    if bool((first[1:] != last[1:]).any()):
        return "each of its features is several channels of the norm"
    return first[1:]


def _label_of_feature(arrived: Tensor, axis: int) -> Tensor | str:
    """For each feature along the axis, the only channel whose label, which started at 1, is in it."""
    rows = arrived.movedim(axis, 0).flatten(1)
    whole = rows.round()
    if bool((rows - whole).abs().max() > 1e-3) or bool((whole < 1).any()):
        return "what lies between mixes channels or adds values of its own"
    if bool((whole != whole[:, :1]).any()):
        return "each of its input features is several channels of the norm"
    return whole[:, 0].long() - 1


def _along(values: Tensor, axis: int, shape: tuple[int, ...] | None) -> Tensor:
    """Spread one number a feature over a shape."""
    assert shape is not None
    view = [1] * len(shape)
    view[axis] = -1
    return values.view(view).expand(shape)


def _fits(shape: tuple[int, ...]) -> bool:
    return 0 < torch.Size(shape).numel() <= _MOST_ELEMENTS


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _unknown(calls: list[Call]) -> str:
    return f"the shape of {calls[0].target} is not known, or too large to probe"


def has_hooks(module: nn.Module) -> bool:
    """Say whether hooks see what goes through the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def describe(call: Call) -> str:
    """Name a call in a sentence."""
    if call.kind == "input":
        return f"the model's input {call.target}"
    if call.kind == "output":
        return "the model's output"
    if call.kind == "attribute":
        return f"the attribute {call.target}"
    return call.target
