"""One step of many weights: lift them to v, step (gain, v) by the rule, lower them again.

There are three ways, and all of them do the same arithmetic. `loop` goes through blocks of rows that stay
in the processor's cache, with a scratch as large as a block. `foreach` hands all weights to torch's
multi-tensor functions, which launch few kernels, with a scratch as large as the weights. `compile` fuses
lift, rule and lower of a weight: it is read and written once or twice where the others do it ten times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normconv.numerics import RowLayout
from normconv.numerics.rows import beside, row_axes, row_blocks
from normconv.training.optimizers.forms import Form, Rows, lift_, lower_
from normconv.training.optimizers.rules import Rule

__all__ = ["Weight", "rows_leading", "step_compiled_", "step_each_", "step_together_"]

_VARIANTS = 64
# Elements of a block: smaller ones are nearer to the processor, but each costs fifty small operations.
_BLOCK = 2**20


@dataclass(frozen=True)
class Weight:
    """A weight that is stepped, and all that is known of it.

    Args:
        weight: rows leading, see `rows_leading`; written.
        grad: its gradient, laid out alike; read only.
        layout: where its rows are.
        numbers: by name one number a row, (O,): `gain`, `length` and perhaps `mean`.
        buffers: by name what the rule remembers of v, laid out as the weight.
        gain_buffers: by name what it remembers of the gain, (O,).
    """

    weight: Tensor
    grad: Tensor
    layout: RowLayout
    numbers: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    gain_buffers: Mapping[str, Tensor]

    @property
    def axes(self) -> list[int]:
        """The axes inside a row."""
        return row_axes(self.whole, self.layout)

    @property
    def whole(self) -> Tensor:
        """The weight as one block."""
        return _whole(self.weight, self.layout)

    def rows(self, block: Tensor, rows: slice = slice(None)) -> Rows:
        """The row numbers of a block."""
        found = {k: beside(v[rows], block, self.layout) for k, v in self.numbers.items()}
        return Rows(found["gain"], found["length"], found.get("mean"))

    def pieces(self) -> Iterator[Weight]:
        """The weight in blocks of rows."""
        if not self.layout.transposed:
            for block, rows in row_blocks(self.weight, self.layout, _BLOCK):
                yield Weight(
                    block,
                    self.grad[rows],
                    self.layout,
                    {name: value[rows] for name, value in self.numbers.items()},
                    {name: value[rows] for name, value in self.buffers.items()},
                    {name: value[rows] for name, value in self.gain_buffers.items()},
                )
        else:
            yield self


def _whole(tensor: Tensor, layout: RowLayout) -> Tensor:
    return layout.split(tensor) if layout.transposed else tensor


def rows_leading(tensor: Tensor, layout: RowLayout) -> Tensor:
    """View a weight as (O, n) where its memory allows it, whatever the order of n; else as it is.

    >>> weight = torch.empty(8, 3, 5, 5).to(memory_format=torch.channels_last)
    >>> rows_leading(weight, RowLayout()).shape
    torch.Size([8, 75])
    """
    if layout.transposed:
        return tensor
    if tensor.is_contiguous():
        return tensor.flatten(1)
    inner = tensor.movedim(1, -1)
    return inner.flatten(1) if inner.is_contiguous() else tensor


def step_each_(
    weights: list[Weight], form: Form, rule: Rule, group: Mapping[str, Any], count: int
) -> None:
    """Step weights one after the other, block by block."""
    for weight in weights:
        for piece in weight.pieces():
            _step(rule, group, count, [piece], form, foreach=False)


def step_together_(
    weights: list[Weight], form: Form, rule: Rule, group: Mapping[str, Any], count: int
) -> None:
    """Step weights all at once."""
    _step(rule, group, count, weights, form, foreach=True)


def _step(
    rule: Rule,
    group: Mapping[str, Any],
    count: int,
    weights: list[Weight],
    form: Form,
    foreach: bool,
) -> None:
    vs, grads, gain_grads, rows = [], [], [], []
    for weight in weights:
        block = weight.whole
        rows.append(weight.rows(block))
        grad = _whole(weight.grad, weight.layout)
        gain_grad, grad_v = lift_(block, grad, rows[-1], form, weight.axes)
        vs.append(block)
        grads.append(grad_v)
        gain_grads.append(gain_grad.flatten())
    names = rule.buffers(group)
    of_v = {n: [_whole(w.buffers[n], w.layout) for w in weights] for n in names}
    gains = [w.numbers["gain"] for w in weights]
    of_gain = {n: [w.gain_buffers[n] for w in weights] for n in names}
    decay, gain_decay = _decays(group)
    if decay == gain_decay:
        both = {n: of_v[n] + of_gain[n] for n in names}
        rule.step_(group, decay, count, vs + gains, grads + gain_grads, both, foreach)
    else:
        rule.step_(group, decay, count, vs, grads, of_v, foreach)
        rule.step_(group, gain_decay, count, gains, gain_grads, of_gain, foreach)
    for weight, block, numbers in zip(weights, vs, rows, strict=True):
        lower_(block, numbers, form, weight.axes)


def _decays(group: Mapping[str, Any]) -> tuple[float, float]:
    """Weight decay of v, and of the gain."""
    decay, of_gain = float(group["weight_decay"]), group["gain_weight_decay"]
    return decay, decay if of_gain is None else float(of_gain)


def step_compiled_(
    weights: list[Weight], form: Form, rule: Rule, group: Mapping[str, Any], count: int
) -> str:
    """Step each weight by compiled code, and take it off the list; the first calls compile.

    Returns:
        What the compiler said where there is none that works, else nothing. The weights that are left
        are as they were.
    """
    values = [*_decays(group), *rule.numbers(group, count)]
    # By device and dtype; nearly always there is one.
    numbers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    names = rule.buffers(group)
    while weights:
        weight, block = weights[0], weights[0].whole
        key = (block.device, block.dtype)
        if key not in numbers:
            numbers[key] = torch.tensor(values, dtype=block.dtype, device=block.device)
        step = _compiled(form, rule, rule.flags(group), tuple(weight.axes))
        rows = weight.rows(block)
        try:
            step(
                block,
                _whole(weight.grad, weight.layout),
                *rows,
                [_whole(weight.buffers[n], weight.layout) for n in names],
                [beside(weight.gain_buffers[n], block, weight.layout) for n in names],
                numbers[key],
            )
        except Exception as reason:  # whatever a compiler, or its absence, brings: nothing has run
            return str(reason) or type(reason).__name__
        weights.pop(0)
    return ""


@functools.cache
def _compiled(
    form: Form, rule: Rule, flags: tuple[bool, ...], axes: tuple[int, ...]
) -> Callable[..., None]:
    def step(
        w: Tensor,
        grad: Tensor,
        gain: Tensor,
        length: Tensor,
        mean: Tensor | None,
        buffers: list[Tensor],
        gain_buffers: list[Tensor],
        numbers: Tensor,
    ) -> None:
        decay, gain_decay, *others = numbers.unbind()
        rows = Rows(gain, length, mean)
        gain_grad, grad_v = lift_(w, grad, rows, form, list(axes))
        rule.arithmetic_(flags, others, decay, w, grad_v, buffers)
        rule.arithmetic_(flags, others, gain_decay, gain, gain_grad, gain_buffers)
        lower_(w, rows, form, list(axes))

    # Any number of rows of any length: compiled once for all weights of a kind. The kinds share the code
    # of `step`, and so the number of times that it may be compiled.
    compiled = torch.compile(step, dynamic=True)
    allowed: Callable[..., None] = torch._dynamo.config.patch(recompile_limit=_VARIANTS)(compiled)
    return allowed
