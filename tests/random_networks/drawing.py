"""Drawing one program: values whose shapes are known, and the layers that make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.random_networks.program import FUNCTIONS, VIEWS, Layer, Op

__all__ = ["Drawing"]

T = TypeVar("T")

_MOST = 400  # numbers that a sample of any value holds
_HOMES = ("", "", "", "row.", "table.", "deep.inner.")
_SPOILT = ("",) * 17 + ("statless", "odd", "functional")
_INSIDE = ("relu", "tanh", "silu", "gelu", "hardswish", "leaky")  # activations inside a norm
_PASSES = frozenset({"identity", "dropout", "flatten"})
_TIES = frozenset({"bn1d", "bn2d", "bn3d", "sync", "norm act"})


class Drawing:
    """A program while it is drawn; every value is computed on zeros, so that its shape is known.

    Args:
        draw: of hypothesis.
        inputs: shapes of the inputs.
    """

    def __init__(self, draw: st.DrawFn, inputs: Sequence[tuple[int, ...]]) -> None:
        self.draw = draw
        self.layers: dict[str, Layer] = {}
        self.modules: dict[str, nn.Module] = {}
        self.ops: list[Op] = []
        self.values: list[Tensor] = [torch.zeros(shape) for shape in inputs]
        self.of_input = [True] * len(inputs)  # may share memory with an input
        self.spoilt = self.one_of(_SPOILT)

    def one_of(self, options: Sequence[T]) -> T:
        """Draw one of some options; shrinks to the first."""
        return self.draw(st.sampled_from(options))

    def chance(self, one_in: int) -> bool:
        """Draw True once in so many times; shrinks to False."""
        return self.draw(st.integers(1, one_in)) == one_in

    def pick(self, fits: Callable[[Tensor], bool] = lambda value: True) -> int | None:
        """Pick a value, mostly a late one; None where none fits."""
        fitting = [i for i in range(len(self.values)) if fits(self.values[i])][::-1]
        if not fitting:
            return None
        return fitting[self.one_of((0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 5)) % len(fitting)]

    # --- values -----------------------------------------------------------------------------------

    def compute(self, op: Op) -> int | None:
        """Append an operation, unless what it makes is empty or too large; return its value."""
        inputs = [self.values[index] for index in op.inputs]
        with torch.no_grad():
            if op.kind == "call":
                result = self.modules[op.path](*inputs)
            elif op.kind == "reads":
                result = inputs[0]
            else:
                result = FUNCTIONS[op.kind](*inputs, *op.how)
        if not 0 < result[0].numel() <= _MOST:
            return None
        self.ops.append(op)
        self.values.append(torch.zeros_like(result))
        passes = op.kind == "call" and self.at(op.path).kind in _PASSES
        shares = (passes or op.kind in VIEWS) and any(self.of_input[i] for i in op.inputs)
        self.of_input.append(shares)
        return len(self.values) - 1

    def apply(self, kind: str, *inputs: int, how: tuple[Any, ...] = ()) -> int | None:
        """Append a function."""
        return self.compute(Op(kind, inputs, how=how))

    # --- layers -----------------------------------------------------------------------------------

    def at(self, path: str) -> Layer:
        """Return the layer at a path or alias."""
        return next(v for v in self.layers.values() if path in (v.path, *v.aliases))

    def call(self, layer: Layer, *inputs: int) -> int | None:
        """Register a layer under a path of its own and call it."""
        home = self.one_of(_HOMES)
        taken = sum(path.startswith(home) for path in self.layers) if home else len(self.layers)
        path = f"{home or 'm'}{taken}"
        self.layers[path] = dataclasses.replace(layer, path=path)
        self.modules[path] = layer.make().eval()
        value = self.compute(Op("call", inputs, path))
        if value is None:
            del self.layers[path], self.modules[path]
        return value

    def call_again(self, path: str, *inputs: int) -> int | None:
        """Call a layer that is there already, now and then by another name."""
        return self.compute(Op("call", inputs, self.alias(path) if self.chance(3) else path))

    def alias(self, path: str) -> str:
        """Give a layer one more name."""
        layer = self.layers[path]
        name = f"also_{path.replace('.', '_')}_{len(layer.aliases)}"
        self.layers[path] = dataclasses.replace(layer, aliases=(*layer.aliases, name))
        self.modules[name] = self.modules[path]
        return name

    def known(
        self, kinds: Iterable[str], fits: Callable[[Layer], bool] = lambda layer: True
    ) -> list[str]:
        """Paths of the layers of some kinds."""
        return [p for p, layer in self.layers.items() if layer.kind in kinds and fits(layer)]

    def flags(self) -> dict[str, Any]:
        """What is not trained, what is in the other mode, what has a hook."""
        flags: dict[str, Any] = {}
        if self.chance(8):
            flags["frozen"] = self.one_of(("all", "weight", "bias"))
        if self.chance(8):
            flags["mode"] = self.one_of(("eval", "train"))
        if self.chance(30):
            flags["hook"] = True
        return flags

    # --- linear operators -------------------------------------------------------------------------

    def operator(self, source: int | None = None) -> int | None:
        """A linear layer: a new one, or one that is there already."""
        source = self.pick() if source is None else source
        assert source is not None
        shape = self.values[source].shape
        rank = len(shape) - 2
        kind = "linear"
        if 0 < rank <= 3:
            family = self.one_of(("conv", "conv", "conv", "conv_transpose", "conv_transpose", ""))
            kind = f"{family}{rank}d" if family else kind
        width = shape[-1] if kind == "linear" else shape[1]
        alike = self.known({kind}, lambda layer: layer.args[0] == width and _fits(layer, shape))
        if alike and self.chance(4):
            return self.call_again(self.one_of(alike), source)
        layer = self.linear(width) if kind == "linear" else self.conv(kind, shape)
        return self.call(self.marked(layer, alike), source)

    def linear(self, width: int) -> Layer:
        """A Linear."""
        out = self.one_of((4, 3, 6, width))
        return Layer("", "linear", (width, out), {"bias": False} if self.chance(2) else {})

    def conv(self, kind: str, shape: Sequence[int]) -> Layer:
        """A convolution that fits a shape."""
        channels = shape[1]
        groups = self.one_of([g for g in (1, 1, 1, 2, 3, channels) if channels % g == 0])
        out = groups * self.one_of((1, 2, 3)) if groups > 1 else self.one_of((4, 2, 6, channels))
        kernel = self.one_of((3, 1, 2))
        options: dict[str, Any] = {"groups": groups} if groups > 1 else {}
        if self.chance(2):
            options["bias"] = False
        plain = Layer("", kind, (channels, out, 1), dict(options))
        if kernel > 1 and self.chance(2):
            options["padding"] = 1
        if self.chance(4):
            options["stride"] = 2
        if kernel > 1 and self.chance(5):
            options["dilation"] = 2
        if "transpose" in kind:
            if "stride" in options and self.chance(2):
                options["output_padding"] = 1
        elif "padding" in options and self.chance(2):
            options["padding_mode"] = self.one_of(("reflect", "replicate", "circular"))
        layer = Layer("", kind, (channels, out, kernel), options)
        return layer if _fits(layer, shape) else plain

    def marked(self, layer: Layer, alike: Sequence[str] = ()) -> Layer:
        """Give an operator a shared weight, odd values, flags or a hook, now and then."""
        marks: dict[str, Any] = {}
        described = (layer.args, layer.options)
        same = [p for p in alike if (self.layers[p].args, self.layers[p].options) == described]
        if same and self.chance(3):
            marks["tie"] = self.one_of(same)
        elif self.chance(10):
            marks["touch"] = self.one_of(("zero rows", "zero rows", "zero"))
        return dataclasses.replace(layer, **marks, **self.flags())

    # --- norms ------------------------------------------------------------------------------------

    def norm(self, source: int | None = None) -> int | None:
        """A norm, wherever the value stands: a new one, or one that is there already."""
        source = self.pick() if source is None else source
        assert source is not None
        rank, channels = self.values[source].dim(), self.values[source].shape[1]
        kinds = self._norm_kinds(rank)
        alike = self.known(kinds, lambda layer: layer.args[0] == channels)
        if alike and self.chance(6):
            return self.call_again(self.one_of(alike), source)
        layer = self._norm(self.one_of(kinds), channels)
        same = [p for p in alike if _can_tie(self.layers[p])] if _can_tie(layer) else []
        if same and self.chance(5):
            layer = dataclasses.replace(layer, tie=self.one_of(same), touch="")
        value = self.call(dataclasses.replace(layer, **self.flags()), source)
        if value is not None and self.chance(14):
            self.ops[-1] = dataclasses.replace(self.ops[-1], path=self.alias(self.ops[-1].path))
        return value

    def _norm_kinds(self, rank: int) -> list[str]:
        if self.spoilt in ("odd", "functional") and self.chance(2):
            return [self.spoilt]
        native = {2: "bn1d", 3: "bn1d", 4: "bn2d", 5: "bn3d"}[rank]
        kinds = [native] * 6 + ["sync", "norm act", "norm act", "own forward", "frozen"]
        kinds += [f"in{rank - 2}d"] * 2 if rank > 2 else []
        return kinds + (["torchvision frozen", "timm act"] if rank == 4 else [])

    def _norm(self, kind: str, channels: int) -> Layer:
        options: dict[str, Any] = {}
        if kind.startswith(("bn", "sync")):
            if self.chance(5):
                options["affine"] = False
            if self.chance(8):
                options["momentum"] = None
            if self.spoilt == "statless" and self.chance(2):
                options["track_running_stats"] = False
        elif kind.startswith("in"):
            options = {"track_running_stats": True}
            if not self.chance(3):
                options["affine"] = True
        elif kind == "norm act":
            options = {"act": self.one_of(_INSIDE)}
            if self.chance(3):
                options["p"] = 0.3
        elif kind == "timm act" and self.chance(3):
            options = {"act_layer": "silu"}
        if kind.startswith(("bn", "in", "timm", "frozen", "torchvision")) and self.chance(4):
            options["eps"] = 1e-3
        touches = []
        if kind not in ("functional", "odd"):
            touches += ["zero gamma"] if options.get("affine", kind[:2] != "in") else []
            touches += ["dead"] if options.get("track_running_stats", True) else []
        touch = self.one_of(touches) if touches and self.chance(8) else ""
        return Layer("", kind, (channels,), options, touch=touch)


def _fits(layer: Layer, shape: Sequence[int]) -> bool:
    """Whether an operator that is there already takes a value of the shape."""
    if layer.kind == "linear" or "transpose" in layer.kind:
        return True
    smallest, pad = min(shape[2:]), layer.options.get("padding", 0)
    if "padding_mode" in layer.options and pad >= smallest:
        return False
    return bool(smallest + 2 * pad > layer.options.get("dilation", 1) * (layer.args[2] - 1))


def _can_tie(layer: Layer) -> bool:
    return layer.kind in _TIES and bool(layer.options.get("affine", True))
