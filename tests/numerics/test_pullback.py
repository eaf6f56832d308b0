"""Pulled-back gradients against autograd through the weight's formula, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normconv.numerics import (
    DIALECTS,
    Pullback,
    RowLayout,
    norm_pullback,
    normed_weight,
    relative_l2,
    standard_pullback,
    standard_weight,
)
from tests.numerics.test_standardization import SHAPES

every_shape = pytest.mark.parametrize(("layout", "shape"), SHAPES)
FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Pullback]]] = {
    "norm": (normed_weight, norm_pullback),
    **{
        name: (
            lambda g, v, layout, name=name: standard_weight(g, v, layout, name),
            lambda g, v, layout, name=name: standard_pullback(g, v, layout, name),
        )
        for name in DIALECTS
    },
}
every_form = pytest.mark.parametrize("form", FORMS)


def drawn(layout: RowLayout, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    v = (torch.randn(shape, dtype=torch.float64) * 0.01 + 0.005).requires_grad_()
    gain = torch.randn(layout.row_shape(v), dtype=torch.float64)
    gain.flatten()[0] = 0
    return gain.requires_grad_(), v, torch.randn(3, *shape, dtype=torch.float64)


@every_form
@every_shape
def test_each_sample_is_pulled_back_as_autograd_does(
    layout: RowLayout, shape: tuple[int, ...], form: str
) -> None:
    compute, pullback = FORMS[form]
    gain, v, grads = drawn(layout, shape)
    weight = compute(gain, v, layout)
    expected = [torch.autograd.grad(weight, (gain, v), g, retain_graph=True) for g in grads]
    found = pullback(gain, v, layout)
    along, across = found.both_(grads.clone())
    assert not along.requires_grad
    assert relative_l2(along, torch.stack([g.flatten() for g, _ in expected])) <= 1e-12
    assert relative_l2(across, torch.stack([g for _, g in expected])) <= 1e-12


@every_form
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("places", [1, 2, 9])
def test_norms_without_the_gradients_and_by_way_of_them(
    form: str, groups: int, places: int
) -> None:
    """Of 8 rows of 7 in one group or two, 9 places take the gradients and 1 does not."""
    compute, pullback = FORMS[form]
    layout = RowLayout()
    gain, v, _ = drawn(layout, (8, 7))
    backprops = torch.randn(3, groups, 8 // groups, places).double()
    activations = torch.randn(3, groups, 7, places).double()
    grads = torch.einsum("ngot,ngit->ngoi", backprops, activations).flatten(1, 2)
    weight = compute(gain, v, layout)
    expected = [torch.autograd.grad(weight, (gain, v), g, retain_graph=True) for g in grads]
    found = pullback(gain, v, layout)
    for at, pulled in enumerate(found.of_places(backprops, activations)):
        wanted = torch.stack([grads[at] for grads in expected]).reshape(pulled.shape)
        assert relative_l2(pulled, wanted) <= 1e-12
    squares = found.squares(backprops, activations)
    for at, square in enumerate(squares):
        norms = torch.stack([grads[at].norm() for grads in expected])
        # What is left of a square is a difference of squares: it is compared with the larger of them.
        torch.testing.assert_close(square, norms.square(), rtol=1e-10, atol=1e-10)


def test_large_weights_in_single_precision() -> None:
    """A sample of this weight is more than a block of the scratch."""
    gain, v = torch.ones(512), torch.randn(512, 4608)
    pullback, exact = (
        norm_pullback(gain.to(t), v.to(t), RowLayout()) for t in (torch.float32, torch.float64)
    )
    for places in (1, 500):
        backprops, activations = torch.randn(2, 1, 512, places), torch.randn(2, 1, 4608, places)
        wanted = exact.squares(backprops.double(), activations.double())
        for square, other in zip(pullback.squares(backprops, activations), wanted, strict=True):
            assert relative_l2(square, other) <= 2e-6


def test_inputs_along_the_direction_leave_no_negative_square() -> None:
    v = torch.randn(4, 64)
    pullback = norm_pullback(torch.ones(4), v, RowLayout())
    for row in v:
        inputs = row.expand(4, 64)[:, None, :, None]
        squares = pullback.squares(torch.eye(4)[:, None, :, None], inputs)
        assert bool((squares[1] >= 0).all())


def test_constant_rows_are_finite() -> None:
    v = torch.ones(2, 3, 3)
    for dialect in DIALECTS:
        pullback = standard_pullback(torch.ones(2), v, RowLayout(), dialect)
        for tensor in pullback.both_(torch.randn(4, 2, 3, 3)):
            assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_wide(dtype: torch.dtype) -> None:
    gain, v, grads = (t.detach().to(dtype) for t in drawn(RowLayout(), (4, 9)))
    for _, pullback in FORMS.values():
        along, across = pullback(gain, v, RowLayout()).both_(grads.clone())
        exact = pullback(gain.double(), v.double(), RowLayout()).both_(grads.double())
        assert across.dtype == dtype
        assert relative_l2(along, exact[0]) <= 1e-5
        assert relative_l2(across, exact[1]) <= torch.finfo(dtype).eps
