"""SGD's momentum of a parameter becomes that of the parameters that a conversion made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normconv.graph import is_norm, norm_state
from normconv.layers import ChannelAffine, Reparametrised, row_layouts
from normconv.numerics import RowLayout, scale_rows

__all__ = ["Momentum"]


class Momentum:
    """The momentum of an optimizer through the chain rule of a conversion.

    A momentum is a sum of gradients, so it goes where a gradient goes. With W' = s · W row by row,
    m(W') = m(W) / s, and g and v of W' get the pullback of that. With b' = b + s · … + β a bias has the
    gradient of β. In the slot of a norm, scale = γ/σ and shift = β − scale · μ, so that
    m(shift) = m(β) and m(scale) = σ · m(γ) + μ · m(β).

    Args:
        optimizer: of the original.
        original: the model before.
        model: the converted model.
        took: the layers that took a norm behind them, each with the norm's name.
        after: the layers that took a norm before them, through which nothing is carried.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        original: nn.Module,
        model: nn.Module,
        took: Mapping[str, str],
        after: Collection[str],
    ) -> None:
        self._optimizer, self._original, self._model = optimizer, original, model
        self._took, self._after = took, after
        self._old = dict(original.named_parameters(remove_duplicate=False))
        self._new = dict(model.named_parameters(remove_duplicate=False))

    def of(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        """Return the momentum of a new parameter; None where there is none to carry."""
        owner, _, last = name.rpartition(".")
        if owner in self._after:
            return None
        layer = self._model.get_submodule(owner)
        if isinstance(layer, ChannelAffine):
            carried = self._in_slot(owner, last)
        elif last == "bias":
            carried = self._of_bias(owner)
        else:
            carried = self._of_weight(layer, owner, last)
        if carried is None or carried.shape != parameter.shape:
            return None
        return carried.to(parameter.dtype)

    def _held(self, name: str) -> Tensor | None:
        """What SGD holds for an old parameter; None where there is more state than its momentum."""
        parameter = self._old.get(name.lstrip("."))
        held = {} if parameter is None else self._optimizer.state.get(parameter, {})
        momentum: Tensor | None = held.get("momentum_buffer")
        return momentum if set(held) == {"momentum_buffer"} else None

    def _of_bias(self, owner: str) -> Tensor | None:
        site = self._took.get(owner, "")
        if not site or any(name.startswith(f"{site}.") for name in self._new):
            return None  # a norm that still stands there has its own β
        momentum = self._held(f"{site}.bias")
        return None if momentum is None else momentum.clone()

    def _in_slot(self, owner: str, last: str) -> Tensor | None:
        site = owner.removesuffix(".affine")
        there = {name for name in self._new if name.startswith(f"{site}.")}
        norm = dict(self._original.named_modules()).get(site)
        m_gamma, m_beta = self._held(f"{site}.weight"), self._held(f"{site}.bias")
        if there != {f"{owner}.scale", f"{owner}.shift"} or m_beta is None or norm is None:
            return None
        state = norm_state(norm) if is_norm(norm) else ""
        if isinstance(state, str):
            return None
        if last == "shift":
            return m_beta.clone()
        if m_gamma is None:
            return None
        root = (state.var.double() + state.eps).sqrt()
        return root * m_gamma + state.mean.double() * m_beta

    def _of_weight(self, layer: nn.Module, owner: str, last: str) -> Tensor | None:
        parts = {last: last}
        if isinstance(layer, Reparametrised):
            parts = {part: weight for weight in layer.weights for part in layer.parts(weight)}
        weight = parts.get(last, "")
        momentum, layout = self._held(f"{owner}.{weight}"), row_layouts(layer).get(weight)
        if momentum is None or layout is None:
            return None
        before = self._old[f"{owner}.{weight}".lstrip(".")]
        if not isinstance(layer, Reparametrised):
            value: Tensor = getattr(layer, weight)
            return _by_rows(momentum, before, value, layout)
        value, _ = layer.true_weight(weight)
        rows = _by_rows(momentum, before, value, layout).double().unsqueeze(0)
        gain, _ = layer.gain_and_v(weight)
        by_gain, by_v = layer.pullback(weight).both_(rows)
        return by_gain[0].reshape(gain.shape) if last == layer.parts(weight)[0] else by_v[0]


@torch.no_grad()
def _by_rows(momentum: Tensor, before: Tensor, after: Tensor, layout: RowLayout) -> Tensor:
    """Return m / s row by row, where the weight that was W is s · W; 0 where s is."""
    wide, new = before.detach().double(), after.detach().double()
    sums = [_row_sums(wide * other, layout) for other in (new, wide)]
    scale = sums[0] / torch.where(sums[1] == 0, torch.ones_like(sums[1]), sums[1])
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return scale_rows(momentum.double(), inverse, layout).to(momentum.dtype)


def _row_sums(values: Tensor, layout: RowLayout) -> Tensor:
    if not layout.transposed:
        return values.flatten(1).sum(1)
    split = layout.split(values)
    return split.sum([1, *range(3, split.dim())]).flatten()
