"""Pure maths against float64 written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from normconv.numerics import (
    RowLayout,
    evaluating,
    noise_bound,
    norm_affine,
    normed_weight,
    relative_l2,
    row_norms,
    scale_rows,
    split_weight,
    true_weight,
)

LAYOUTS = [
    pytest.param(RowLayout(), (6, 4), id="linear"),
    pytest.param(RowLayout(), (6, 2, 3), id="conv1d"),
    pytest.param(RowLayout(), (6, 1, 1, 1), id="one element"),
    pytest.param(RowLayout(), (4, 2, 3, 3), id="conv2d"),
    pytest.param(RowLayout(), (4, 2, 2, 3, 2), id="conv3d"),
    pytest.param(RowLayout(transposed=True), (3, 5, 4), id="transposed 1d"),
    pytest.param(RowLayout(transposed=True, groups=2), (4, 3, 3, 2), id="transposed 2d grouped"),
    pytest.param(
        RowLayout(transposed=True, groups=3), (3, 1, 2, 2, 2), id="transposed 3d depthwise"
    ),
]


def rows_of(weight: Tensor, layout: RowLayout) -> list[Tensor]:
    """The rows, one by one, by plain indexing: output channel (group, o) of a transposed weight."""
    if not layout.transposed:
        return [weight[o] for o in range(weight.shape[0])]
    per_group = weight.shape[0] // layout.groups
    return [
        weight[group * per_group : (group + 1) * per_group, o]
        for group in range(layout.groups)
        for o in range(weight.shape[1])
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_affine_is_eval_batch_norm(dtype: torch.dtype) -> None:
    mean, var = torch.randn(5).to(dtype), (torch.rand(5) + 0.1).to(dtype)
    weight, bias, x = torch.randn(5).to(dtype), torch.randn(5).to(dtype), torch.randn(3, 5).double()
    for gamma, beta in ((weight, bias), (None, bias), (weight, None), (None, None)):
        affine = norm_affine(mean, var, gamma, beta, 1e-3)
        assert affine.scale.dtype == affine.shift.dtype == torch.float64
        expected = torch.empty_like(x)
        for c in range(5):
            g = 1.0 if gamma is None else gamma[c].item()
            b = 0.0 if beta is None else beta[c].item()
            sigma = math.sqrt(var[c].item() + 1e-3)
            expected[:, c] = g * (x[:, c] - mean[c].item()) / sigma + b
        torch.testing.assert_close(
            x * affine.scale + affine.shift, expected, rtol=1e-13, atol=1e-13
        )


def test_norm_affine_has_no_gradient_history() -> None:
    weight = nn.Parameter(torch.ones(2))
    affine = norm_affine(torch.zeros(2), torch.ones(2), weight, weight, 0.0)
    assert not affine.scale.requires_grad
    assert not affine.shift.requires_grad


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_rows_are_where_the_layout_says(layout: RowLayout, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    rows = rows_of(weight, layout)
    assert layout.channels(weight) == len(rows)
    assert math.prod(layout.row_shape(weight)) == len(rows)
    expected = torch.stack([row.pow(2).sum().sqrt() for row in rows])
    torch.testing.assert_close(row_norms(weight, layout), expected, rtol=1e-14, atol=0)
    factor = torch.randn(len(rows), dtype=torch.float64)
    scaled = scale_rows(weight, factor, layout)
    assert scaled.shape == weight.shape
    for row, before, f in zip(rows_of(scaled, layout), rows, factor, strict=True):
        assert torch.equal(row, before * f)
    assert torch.equal(scale_rows(weight, factor.reshape(layout.row_shape(weight)), layout), scaled)


def test_scaled_rows_of_a_grouped_transposed_conv_are_its_output_channels() -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False).double()
    x, factor = torch.randn(2, 4, 5, 5).double(), torch.randn(6).double()
    expected = conv(x) * factor.view(1, -1, 1, 1)
    with torch.no_grad():
        conv.weight.copy_(scale_rows(conv.weight, factor, RowLayout(transposed=True, groups=2)))
    torch.testing.assert_close(conv(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_weight_norm_is_the_formula(layout: RowLayout, shape: tuple[int, ...]) -> None:
    v = torch.randn(shape, dtype=torch.float64)
    g = torch.randn(layout.row_shape(v), dtype=torch.float64)
    weight = normed_weight(g, v, layout)
    for row, direction, gain in zip(
        rows_of(weight, layout), rows_of(v, layout), g.flatten(), strict=True
    ):
        torch.testing.assert_close(row, gain * direction / direction.pow(2).sum().sqrt())
    exact, repaired = true_weight(g, v, layout)
    torch.testing.assert_close(exact, weight, rtol=1e-13, atol=0)
    assert not bool(repaired.any())


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_weight_norm_has_the_gradients_of_the_formula(
    layout: RowLayout, shape: tuple[int, ...]
) -> None:
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(layout.row_shape(v), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: normed_weight(a, b, layout), (g, v))


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_norm_has_torch_gradients(transposed: bool) -> None:
    """∂L/∂g and ∂L/∂v equal those of torch's own weight norm, dim 0 and dim 1."""
    layout, shape = RowLayout(transposed=transposed), (4, 5, 3, 3)
    layer = nn.ConvTranspose2d(4, 5, 3) if transposed else nn.Conv2d(5, 4, 3)
    layer = nn.utils.parametrizations.weight_norm(layer.double(), dim=int(transposed))
    wn = layer.parametrizations.weight
    g = wn.original0.detach().clone().requires_grad_()
    v = wn.original1.detach().clone().requires_grad_()
    assert v.shape == shape
    assert g.shape == layout.row_shape(v)
    weights = torch.randn(shape, dtype=torch.float64)
    (layer.weight * weights).sum().backward()
    (normed_weight(g, v, layout) * weights).sum().backward()
    torch.testing.assert_close(g.grad, wn.original0.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(v.grad, wn.original1.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [RowLayout(), RowLayout(transposed=True)])
def test_half_rows_do_not_overflow_in_their_norm(dtype: torch.dtype, layout: RowLayout) -> None:
    v = torch.full((2, 2, 300), 60.0, dtype=dtype)
    g = torch.ones(layout.row_shape(v), dtype=dtype)
    weight = normed_weight(g, v, layout)
    assert weight.dtype == dtype
    expected = 1 / math.sqrt(600)
    assert bool(((weight.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected).all())
    wide = RowLayout().row_shape(v) if not layout.transposed else layout.row_shape(v)
    assert g.shape == wide


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_split_is_undone_by_true_weight(
    layout: RowLayout, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    channels = layout.channels(weight)
    factor = torch.randn(channels, dtype=torch.float64)
    factor[0] = 0.0
    g, v = split_weight(weight, factor, layout)
    assert torch.equal(v, weight)
    assert v.data_ptr() != weight.data_ptr()
    assert g.shape == layout.row_shape(weight)
    assert torch.equal(torch.sign(g.flatten().double()), torch.sign(factor))
    back, repaired = true_weight(g, v, layout)
    assert not bool(repaired.any())
    eps = torch.finfo(dtype).eps
    assert relative_l2(back, scale_rows(weight.double(), factor, layout)) <= 2 * eps


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_zero_rows_are_exact_finite_and_trainable(
    layout: RowLayout, shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape)
    keep = torch.ones(layout.channels(weight))
    keep[-1] = 0
    weight = scale_rows(weight, keep, layout)
    g, v = (t.clone().requires_grad_() for t in split_weight(weight, None, layout))
    assert row_norms(v, layout)[-1].item() == pytest.approx(1.0, rel=1e-6)
    out = normed_weight(g, v, layout)
    assert not bool(rows_of(out, layout)[-1].any())
    torch.testing.assert_close(out, weight)
    (out * torch.rand(shape)).sum().backward()
    assert bool(torch.isfinite(g.grad).all())
    assert bool(torch.isfinite(v.grad).all())
    assert g.grad.flatten()[-1].item() != 0


def test_split_works_on_meta_and_empty_weights() -> None:
    g, v = split_weight(torch.empty(3, 2, device="meta"), None, RowLayout())
    assert g.is_meta
    assert v.is_meta
    assert split_weight(torch.empty(0, 2), None, RowLayout()).g.shape == (0, 1)
    assert split_weight(torch.empty(2, 0), None, RowLayout()).g.shape == (2, 1)


def test_tiny_and_huge_rows_keep_their_value() -> None:
    for scale in (1e-30, 1e-20, 1e18):
        weight = torch.tensor([[3.0, 4.0]]) * scale
        g, v = split_weight(weight, torch.tensor([2.0]).double(), RowLayout())
        back, repaired = true_weight(g, v, RowLayout())
        assert not bool(repaired.any())
        assert relative_l2(back, 2 * weight.double()) <= 2e-7


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format_follows_v(memory_format: torch.memory_format) -> None:
    v = torch.randn(4, 3, 3, 3).to(memory_format=memory_format)
    g = torch.ones(4, 1, 1, 1)
    assert normed_weight(g, v, RowLayout()).is_contiguous(memory_format=memory_format)
    assert true_weight(g, v, RowLayout())[0].is_contiguous(memory_format=memory_format)


def test_relative_l2_never_hides() -> None:
    one = torch.ones(3)
    assert relative_l2(one, one) == 0.0
    assert relative_l2(one, torch.zeros(3)) == math.inf
    assert relative_l2(torch.zeros(3), torch.zeros(3)) == 0.0
    for bad in (math.nan, math.inf, -math.inf):
        poisoned = torch.tensor([1.0, bad, 1.0])
        assert not relative_l2(poisoned, one) <= 1e300
        assert not relative_l2(one, poisoned) <= 1e300
    masked = torch.tensor([-math.inf, 2.0])
    assert relative_l2(masked, masked) == 0.0
    assert not relative_l2(-masked, masked) <= 1e300
    with pytest.raises(ValueError, match="shapes differ"):
        relative_l2(torch.ones(3), torch.ones(3, 1))
    assert relative_l2(torch.tensor([3]), torch.tensor([2])) == 0.5
    assert relative_l2(torch.empty(0), torch.empty(0)) == 0.0


def test_noise_bound() -> None:
    assert noise_bound(torch.float64) == 1e-12
    assert noise_bound(torch.float64, 1e-9) == 4e-9
    assert noise_bound(torch.float16) == 4 * torch.finfo(torch.float16).eps
    assert math.isnan(noise_bound(torch.float32, math.nan))
    assert math.isnan(noise_bound(torch.float64, math.nan))


def test_evaluating_restores_flags_and_generator() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    net[0].eval()
    state = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError), evaluating(net):  # noqa: PT012
        assert not any(module.training for module in net.modules())
        assert not torch.is_grad_enabled()
        first = torch.rand(1)
        raise ZeroDivisionError
    assert [module.training for module in net.modules()] == [True, False, True]
    assert torch.equal(torch.random.get_rng_state(), state)
    with evaluating(net):
        assert torch.equal(torch.rand(1), first)
