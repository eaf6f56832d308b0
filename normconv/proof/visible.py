"""Random statistics under which a wrong fold shows.

Naive random statistics drive deep networks to outputs that hardly depend on the input, and then any
fold passes. Here each norm gets the statistics of what it really receives, moved a little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normconv.graph import NormState, is_norm, norm_state, training_branches
from normconv.numerics import evaluating, noise_bound, relative_l2
from normconv.proof.outputs import evaluate
from normconv.proof.recording import coarsest_dtype

__all__ = ["blind_sites", "randomise_norms_"]


def randomise_norms_(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> None:
    """Give every norm statistics and affine parameters that let a comparison see, in place.

    In one forward pass each norm takes the mean μ and variance σ² of its own input; then μ moves by
    0.1 σ · N(0, 1) and σ² by ±30 %, γ gets a magnitude in 0.5-1.5 with 15 % negative and 2 % zero,
    and β ~ N(0, 0.2²). Norms only training calls are reached by a second pass.

    Args:
        model: its norms are changed, nothing else.
        args: positional inputs, random, of a batch of at least 2.
        kwargs: keyword inputs.
        seed: of the random moves.
    """
    generator = torch.Generator().manual_seed(seed)
    done: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def fit(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if norm not in done and inputs and isinstance(inputs[0], Tensor):
            done[norm] = _randomise_(norm, inputs[0], generator)

    norms = [module for module in model.modules() if is_norm(module)]
    handles = [norm.register_forward_pre_hook(fit) for norm in norms]
    try:
        with evaluating(model):
            model(*args, **(kwargs or {}))
        if len(done) < len(norms):
            with training_branches(model):
                model(*args, **(kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()
    # The pass restores the buffers it finds changed: these changes are meant.
    with torch.no_grad():
        for tensor, value in [pair for pairs in done.values() for pair in pairs]:
            tensor.copy_(value)


def _randomise_(
    norm: nn.Module, x: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Set a norm's tensors; return them with what they were set to."""
    state = norm_state(norm)
    if not isinstance(state, NormState):
        return []

    def normal() -> Tensor:
        return torch.randn(state.channels, generator=generator, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(state.channels, generator=generator, dtype=torch.float64)

    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.detach().to(device="cpu", dtype=torch.float64)
    mean, var = wide.mean(axes), wide.var(axes, correction=0)
    # A dead channel has no scale of its own. One that hardly varies would only magnify rounding.
    var = torch.where(var > 1e-10, var, torch.ones_like(var)).maximum((1e-3 * mean) ** 2)
    sign = torch.where(uniform() < 0.15, -1.0, 1.0)
    alive = torch.where(uniform() < 0.02, 0.0, 1.0)
    state.mean.copy_(mean + 0.1 * var.sqrt() * normal())
    state.var.copy_(var * (0.7 + 0.6 * uniform()))
    with torch.no_grad():
        if state.weight is not None:
            state.weight.copy_((0.5 + uniform()) * sign * alive)
        if state.bias is not None:
            state.bias.copy_(0.2 * normal())
    changed = (state.mean, state.var, state.weight, state.bias)
    return [(tensor, tensor.detach().clone()) for tensor in changed if tensor is not None]


def blind_sites(
    model: nn.Module,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Return the norms that an end-to-end comparison could not see.

    A norm is seen when moving its μ by 0.01 σ changes some output by at least ten times the bound
    that the comparison would use.

    Args:
        model: restored afterwards.
        names: the norms.
        args: positional inputs.
        kwargs: keyword inputs.
    """
    before = evaluate(model, args, kwargs)
    exact = evaluate(model, args, kwargs, dtype=torch.float64)
    dtype = coarsest_dtype(model)
    bounds = {n: noise_bound(dtype, relative_l2(before[n], exact[n])) for n in before}
    blind = []
    for name in names:
        state = norm_state(model.get_submodule(name))
        assert isinstance(state, NormState)
        with _moved(state.mean, 0.01 * (state.var + state.eps).sqrt()):
            after = evaluate(model, args, kwargs)
        if not any(relative_l2(after[n], before[n]) >= 10 * bounds[n] for n in before):
            blind.append(name)
    return tuple(blind)


@contextmanager
def _moved(tensor: Tensor, by: Tensor) -> Iterator[None]:
    kept = tensor.clone()
    try:
        tensor.add_(by)
        yield
    finally:
        tensor.copy_(kept)
