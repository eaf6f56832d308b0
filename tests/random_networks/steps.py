"""The hypothesis strategy: steps that make every norm, every dataflow and every operator meet."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from normconv.numerics import relative_l2
from normconv.proof import cast_inputs, evaluate, record_outputs
from tests.random_networks.drawing import Drawing
from tests.random_networks.layers import NORMS, OPERATORS
from tests.random_networks.program import IN_PLACE, Layer, Op, Program

__all__ = ["programs"]

_ACTS = ("relu", "relu", "tanh", "silu", "gelu", "hardswish", "leaky", "identity", "dropout")
_SPACES = ((), (6,), (7,), (5, 4), (6, 6), (3, 4, 3), (2, 4, 4))
_COARSE = 0.03  # a third of the error beyond which nothing is proved in half precision
_DTYPES = ("float32",) * 5 + ("float64",) * 2 + ("bfloat16", "float16")


class _Steps(Drawing):
    """What one step may be."""

    in_aux = False

    def block(self) -> int | None:
        """An operator, its norm, and perhaps an activation."""
        value = self.operator()
        value = None if value is None else self.norm(value)
        return value if value is None or self.chance(2) else self.act(value)

    def linear_run(self) -> int | None:
        """A norm before a linear operator, with nothing or something linear between."""
        value = self.norm()
        if value is not None and self.chance(2):
            value = self.linear_between(value)
        return None if value is None else self.operator(value)

    def linear_between(self, source: int) -> int | None:
        choice = self.one_of(("identity", "dropout", "average", "pad", "reshape", "shuffle"))
        if choice == "identity":
            return self.call(Layer("", "identity"), source)
        if choice == "dropout":
            return self.call(Layer("", "dropout", (0.3,)), source)
        steps = {"average": self.pool, "pad": self.pad, "reshape": self.reshape}
        return steps.get(choice, self.shuffle)(source)

    def act(self, source: int | None = None) -> int | None:
        """An activation: a module, a function, or in place."""
        source = self.pick() if source is None else source
        assert source is not None
        how = self.one_of(("module", "module", "function", "in place"))
        if how == "module":
            kind = self.one_of(_ACTS)
            if kind == "dropout":
                return self.call(Layer("", kind, (0.3,)), source)
            in_place = kind == "relu" and not self.of_input[source] and self.may_write
            options = {"inplace": True} if in_place and self.chance(3) else {}
            return self.call(Layer("", kind, (), options), source)
        if how == "in place" and not self.of_input[source] and self.may_write:
            return self.apply(self.one_of(sorted(IN_PLACE)), source)
        if self.chance(6):
            return self.apply("branch", source, how=(4,))
        return self.apply(self.one_of(("relu", "tanh", "scale")), source)

    @property
    def may_write(self) -> bool:
        """A branch that only training runs must leave alone what the outputs share."""
        return not self.in_aux

    def join(self) -> int | None:
        """Add, gate or concatenate two values; the same one twice where no other fits."""
        first = self.pick()
        assert first is not None
        shape = self.values[first].shape
        kind = self.one_of(("add", "add", "gate", "cat"))
        if kind == "cat":
            second = self.pick(lambda v: (v.shape[0], v.shape[2:]) == (shape[0], shape[2:]))
        else:
            second = self.pick(lambda v: v.shape == shape)
        assert second is not None
        return self.apply(kind, first, second)

    def reshape(self, source: int | None = None) -> int | None:
        """Other axes, or another meaning of axis 1."""
        source = self.pick(lambda v: v.dim() > 2) if source is None else source
        if source is None or self.values[source].dim() < 3:
            return None
        _, channels, *rest = self.values[source].shape
        kind = self.one_of(("flatten", "module", "transpose", "pixels", "split", "mean"))
        if kind == "module":
            return self.call(Layer("", "flatten", (self.one_of((1, 2)),)), source)
        if kind == "flatten":
            return self.apply("flatten", source, how=(self.one_of((1, 2)),))
        if kind == "transpose":
            return self.apply("transpose", source, how=(1, self.one_of((-1, 2))))
        if kind == "mean":
            return self.apply("mean", source, how=tuple(range(2, 2 + len(rest))))
        if kind == "pixels":  # channels become pixels or the other way round
            factor = self.one_of([f for f in (2, 3, rest[0]) if rest[0] % f == 0] or [1])
            return self.apply(
                "reshape", source, how=(channels * factor, rest[0] // factor, *rest[1:])
            )
        factor = self.one_of([f for f in (2, 3, channels) if channels % f == 0])
        return self.apply("reshape", source, how=(channels // factor, factor * rest[0], *rest[1:]))

    def shuffle(self, source: int | None = None) -> int | None:
        """Parts of the channels, or another order of them."""
        source = self.pick() if source is None else source
        assert source is not None
        channels = self.values[source].shape[1]
        if channels < 2:
            return None
        kind = self.one_of(("chunk", "split", "shuffle"))
        if kind == "split":
            cut = self.one_of(tuple(range(1, channels)))
            return self.apply("split", source, how=(cut, channels - cut, self.one_of((0, 1))))
        if channels % 2:
            return None
        how = (2, self.one_of((0, 1))) if kind == "chunk" else (2,)
        return self.apply(kind, source, how=how)

    def pool(self, source: int | None = None) -> int | None:
        """Max or average pooling, or upsampling."""
        source = self.pick(lambda v: 3 <= v.dim() <= 5) if source is None else source
        if source is None or not 3 <= self.values[source].dim() <= 5:
            return None
        rank, smallest = self.values[source].dim() - 2, min(self.values[source].shape[2:])
        kind = self.one_of(("avg", "max", "upsample"))
        if kind == "upsample":
            if self.chance(2):
                return self.apply("upsample", source)
            return self.call(Layer("", "upsample", (), {"scale_factor": 2.0}), source)
        options = {"stride": self.one_of((2, 1)), "padding": self.one_of((0, 1))}
        if smallest < 2:
            return None
        if kind == "avg" and self.chance(2):
            options["count_include_pad"] = False
        return self.call(Layer("", f"{kind}{rank}d", (2,), options), source)

    def pad(self, source: int | None = None) -> int | None:
        """Padding by itself."""
        source = self.pick(lambda v: 3 <= v.dim() <= 5) if source is None else source
        if source is None or not 3 <= self.values[source].dim() <= 5:
            return None
        shape = self.values[source].shape
        modes = ("constant", "replicate") + (("reflect",) if min(shape[2:]) > 1 else ())
        return self.apply("pad", source, how=(self.one_of(modes), *(1, 1) * (len(shape) - 2)))

    def merged(self) -> int | None:
        """LeViT: linear on tokens, batch and tokens merged for the norm, apart again."""
        source = self.pick(lambda v: v.dim() == 3)
        if source is None:
            return None
        if self.chance(2):
            layer = self.linear(self.values[source].shape[-1])
            source = self.call(self.marked(layer), source)
        merged = None if source is None else self.apply("merge", source)
        normed = None if merged is None else self.norm(merged)
        if normed is None or source is None:
            return None
        return self.apply("reshape as", normed, source)

    def other(self) -> int | None:
        """Rare things: a weight read elsewhere, a norm of another kind."""
        source = self.pick()
        assert source is not None
        operators = self.known(OPERATORS)
        if operators and self.chance(2):
            return self.compute(Op("reads", (source,), self.one_of(operators)))
        channels = self.values[source].shape[1]
        if self.values[source].dim() == 2 and channels == 1:
            return None
        return self.call(Layer("", "group norm", (1, channels)), source)

    def step(self) -> None:
        """Draw one step."""
        steps = (
            *(self.block,) * 5,
            *(self.norm,) * 3,
            *(self.operator,) * 2,
            *(self.act,) * 2,
            *(self.linear_run,) * 3,
            *(self.join,) * 3,
            *(self.reshape,) * 2,
            self.shuffle,
            self.pool,
            self.pad,
            self.merged,
            self.other,
        )
        self.one_of(steps)()

    def branch_of_training(self, most: int) -> int:
        """Draw what only training mode runs; return how many operations of all are outside of it."""
        kept = len(self.ops)
        self.in_aux = True
        for _ in range(most):
            self.step()
        return kept


@st.composite
def programs(draw: st.DrawFn, *, dtypes: tuple[str, ...] = _DTYPES) -> Program:
    """Draw a program that runs; at least one norm is in it."""
    batch = draw(st.sampled_from((4, 2, 5)))
    channels = draw(st.sampled_from((4, 2, 3, 6)))
    space = draw(st.sampled_from(_SPACES))
    shape = (batch, channels, *space)
    inputs = (shape, shape) if draw(st.integers(1, 6)) == 6 else (shape,)
    steps = _Steps(draw, inputs)
    for _ in range(draw(st.integers(1, 8))):
        steps.step()
    if not any(steps.at(op.path).kind in NORMS for op in steps.ops if op.kind == "call"):
        steps.norm(len(steps.values) - 1)
    outputs = _outputs(steps)
    kept = steps.branch_of_training(draw(st.integers(1, 2))) if steps.chance(8) else len(steps.ops)
    program = Program(
        inputs,
        tuple(steps.layers.values()),
        tuple(steps.ops[:kept]),
        outputs,
        form=draw(st.sampled_from(("tuple", "tuple", "dict", "nested"))),
        aux=tuple(steps.ops[kept:]),
        dtype=draw(st.sampled_from(dtypes)),
        training=draw(st.booleans()),
        keyword=len(inputs) > 1 and draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
    if program.dtype.endswith("16"):
        return _in_half(program, draw(st.booleans()))
    return program


def _outputs(steps: _Steps) -> tuple[int, ...]:
    """What nobody else takes is returned; inputs that nobody takes are taken."""
    first = len(steps.values) - len(steps.ops)
    used = {index for op in steps.ops for index in op.inputs}
    for index in range(first):
        if index not in used:
            steps.apply("scale", index)
    used = {index for op in steps.ops for index in op.inputs}
    last = len(steps.values) - 1
    # The result of a function that works in place is one more name of its input.
    loose = [
        first + i
        for i, op in enumerate(steps.ops)
        if first + i not in used and (op.kind not in IN_PLACE or first + i == last)
    ]
    if steps.chance(6):
        loose.append(steps.draw(st.integers(first, last)))
    return tuple(dict.fromkeys(loose))


def _in_half(program: Program, float_norms: bool) -> Program:
    """The program in half precision, as far as this torch's CPU kernels and the numbers go."""
    calm = tuple(
        dataclasses.replace(layer, touch="" if layer.touch == "dead" else layer.touch)
        for layer in program.layers
    )
    program = dataclasses.replace(program, layers=calm, float_norms=float_norms)
    changes: tuple[dict[str, Any], ...] = ({}, {"float_norms": False}, {"dtype": "bfloat16"})
    for change in changes:
        program = dataclasses.replace(program, **change)
        try:
            if _runs_well(program):
                return program
        except RuntimeError:  # no kernel in that dtype, or operands of two dtypes
            continue
    return dataclasses.replace(program, dtype="float32")


def _runs_well(program: Program) -> bool:
    """Whether it keeps its dtype, and is near enough to float64 to be judged by its own error.

    A look-alike of a norm in float32 makes float32 of a half input; BatchNorm does not, nor do we.
    """
    half = program.torch_dtype in (torch.float16, torch.bfloat16)
    if half and any(layer.kind == "avg3d" for layer in program.layers):
        return False  # it has no such kernel on the CPU, and only training may call it
    model, inputs = program.model(), (program.args(), program.kwargs())
    norms = [layer.path for layer in program.layers if layer.kind in NORMS]
    runs = []
    for net, (args, kwargs) in (
        (model, inputs),
        (copy.deepcopy(model).double(), cast_inputs(inputs, torch.float64)),
    ):
        with record_outputs(net, norms) as seen:
            outputs = list(evaluate(net, args, kwargs).values())
        runs.append([*outputs, *(value for path in norms for value in seen[path])])
        if net is model and any(value.dtype != program.torch_dtype for value in outputs):
            return False
    return all(relative_l2(own, exact) <= _COARSE for own, exact in zip(*runs, strict=True))
