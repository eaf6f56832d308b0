"""Numerical probes: is a class whose `forward` we do not know the map we think it is?

Each probe works on a float64 copy of the one module with random values that let it see, never on the
user's weights, so that it answers the same for trained, fresh and meta models.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from normconv.graph.families import NormState, norm_state, trailing_of
from normconv.layers import absorb_affine_, absorb_input_affine_
from normconv.numerics import Affine, apply_affine, relative_l2

__all__ = ["absorbs_affine", "absorbs_input_affine", "is_affine_then_children"]

# A class may compute in float32 inside; a map that differs is off by orders of magnitude more.
_BOUND = 1e-6
_SEED = 0


def is_affine_then_children(norm: nn.Module, rank: int) -> str:
    """Compare the norm with its eval affine map followed by its child modules in order.

    Args:
        norm: any module that `norm_state` can read.
        rank: dimensions of its input, batch included.

    Returns:
        Empty when they agree, else one sentence that says how they differ.

    >>> class Shifted(nn.BatchNorm1d):
    ...     def forward(self, x): return super().forward(x) + 1
    >>> is_affine_then_children(nn.BatchNorm1d(3), rank=2)
    ''
    >>> "differs" in is_affine_then_children(Shifted(3), rank=2)
    True
    """
    try:
        generator = torch.Generator().manual_seed(_SEED)
        twin = _float64_twin(norm, generator)
        state = norm_state(twin)
        assert isinstance(state, NormState)
        # A small variance in some channels makes the place of eps visible.
        state.var.copy_(torch.rand(state.channels, generator=generator).double() + 0.01)
        x = _normal((2, state.channels, *(3,) * (rank - 2)), generator)
        with torch.no_grad():
            expected = apply_affine(x, state.affine)
            for child in trailing_of(twin).values():
                expected = child(expected)
            actual = twin(x.clone())
        error = relative_l2(actual, expected)
    except Exception as reason:  # the class is the user's: whatever it raises is the answer
        return f"its forward could not be probed ({type(reason).__name__}: {reason})"
    return "" if error <= _BOUND else f"its forward differs from its affine map by {error:.1e}"


def absorbs_affine(layer: nn.Module, input_shape: tuple[int, ...]) -> str:
    """Check on random values that scaling the rows and shifting the bias does so to the output.

    Args:
        layer: a subclass of a linear operator with its own `forward`.
        input_shape: a traced input shape.

    Returns:
        Empty when it does, else one sentence.

    >>> class Standardized(nn.Conv1d):
    ...     def forward(self, x):
    ...         w = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1)
    ...         return nn.functional.conv1d(x, w, self.bias)
    >>> absorbs_affine(Standardized(2, 3, 3), (1, 2, 8)) != ""
    True
    """
    try:
        generator = torch.Generator().manual_seed(_SEED)
        twin = _float64_twin(layer, generator)
        x = _normal((min(2, input_shape[0]), *input_shape[1:]), generator)
        with torch.no_grad():
            before = twin(x.clone())
            channels = before.shape[1]
            affine = Affine(_normal((channels,), generator), _normal((channels,), generator))
            expected = apply_affine(before, affine)
            absorb_affine_(twin, affine)
            error = relative_l2(twin(x.clone()), expected)
    except Exception as reason:
        return f"its forward could not be probed ({type(reason).__name__}: {reason})"
    return (
        ""
        if error <= _BOUND
        else f"its forward does not scale with its weight (off by {error:.1e})"
    )


def absorbs_input_affine(layer: nn.Module, input_shape: tuple[int, ...]) -> str:
    """Check on random values that scaled columns and a shifted bias do what a map of the input does.

    Args:
        layer: a subclass of a linear operator with its own `forward`.
        input_shape: a traced input shape.

    Returns:
        Empty when they do, else one sentence.

    >>> class Padded(nn.Conv1d):
    ...     def forward(self, x): return super().forward(nn.functional.pad(x, (1, 1)))
    >>> absorbs_input_affine(Padded(2, 3, 3), (1, 2, 8)) != ""
    True
    """
    try:
        generator = torch.Generator().manual_seed(_SEED)
        twin = _float64_twin(layer, generator)
        x = _normal((min(2, input_shape[0]), *input_shape[1:]), generator)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        features = x.shape[axis]
        affine = Affine(_normal((features,), generator), _normal((features,), generator))
        with torch.no_grad():
            expected = twin(apply_affine(x, affine, axis))
            absorb_input_affine_(twin, affine)
            error = relative_l2(twin(x.clone()), expected)
    except Exception as reason:
        return f"its forward could not be probed ({type(reason).__name__}: {reason})"
    return (
        "" if error <= _BOUND else f"its forward does not move a map through (off by {error:.1e})"
    )


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _float64_twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    twin = copy.deepcopy(module)
    if any(t.is_meta for t in [*twin.parameters(), *twin.buffers()]):
        twin = twin.to_empty(device="cpu")
    twin = twin.to(device="cpu", dtype=torch.float64).eval()
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        for name, buffer in twin.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_().add_(0.01)
    return twin
