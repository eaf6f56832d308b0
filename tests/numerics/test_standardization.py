"""Weight standardization as maths: every dialect against an implementation of its own, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normconv.errors import UsageError
from normconv.numerics import (
    DIALECTS,
    RowLayout,
    mean_shares,
    relative_l2,
    standard_gain,
    standard_weight,
    true_standard_weight,
)
from normconv.numerics import rows as rows_module
from normconv.numerics.standardization import row_size

DIRECT = RowLayout()
SHAPES = [
    pytest.param(DIRECT, (4, 7), id="linear"),
    pytest.param(DIRECT, (6, 2, 3), id="conv1d"),
    pytest.param(DIRECT, (5, 3, 3, 3), id="conv2d"),
    pytest.param(DIRECT, (4, 2, 2, 3, 2), id="conv3d"),
    pytest.param(RowLayout(True, 1), (3, 4, 3), id="transposed 1d"),
    pytest.param(RowLayout(True, 2), (4, 3, 3, 3), id="transposed 2d grouped"),
    pytest.param(RowLayout(True, 4), (4, 1, 2, 2, 2), id="transposed 3d depthwise"),
]
every_shape = pytest.mark.parametrize(("layout", "shape"), SHAPES)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def rows_of(weight: Tensor, layout: RowLayout) -> list[Tensor]:
    """The rows one by one, found by index: the filter of one output channel."""
    if not layout.transposed:
        return [weight[o].flatten() for o in range(weight.shape[0])]
    ins, outs = weight.shape[0] // layout.groups, weight.shape[1]
    return [
        weight[g * ins : (g + 1) * ins, o].flatten()
        for g in range(layout.groups)
        for o in range(outs)
    ]


def written_out(row: Tensor, gain: Tensor, dialect: str) -> Tensor:
    """One filter by the words of each code."""
    n, centered = row.numel(), row - row.sum() / row.numel()
    biased = centered.square().sum() / n
    if dialect == "qiao":
        return gain * centered / (centered.square().sum().div(n - 1).sqrt() + 1e-5)
    if dialect == "timm":
        return gain * centered / (biased + 1e-6).sqrt()
    if dialect == "bit":
        return gain * centered / (biased + 1e-10).sqrt()
    return gain * n**-0.5 * centered / (biased + 1e-6).sqrt()


def drawn(layout: RowLayout, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    v = torch.randn(shape, dtype=torch.float64) * 0.05 + 0.02
    return torch.randn(layout.channels(v), dtype=torch.float64), v


@every_dialect
@every_shape
def test_each_dialect_is_its_formula(
    layout: RowLayout, shape: tuple[int, ...], dialect: str
) -> None:
    gain, v = drawn(layout, shape)
    expected = [written_out(r, a, dialect) for r, a in zip(rows_of(v, layout), gain, strict=True)]
    for weight in (
        standard_weight(gain.reshape(layout.row_shape(v)), v, layout, dialect),
        true_standard_weight(gain, v, layout, dialect),
    ):
        assert weight.shape == v.shape
        assert relative_l2(torch.stack(rows_of(weight, layout)), torch.stack(expected)) <= 1e-14


def test_qiao_is_the_reference_code() -> None:
    weight = torch.randn(8, 3, 5, 5) * 0.1 + 0.05
    mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
    theirs = weight - mean
    theirs = theirs / (theirs.view(8, -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
    assert relative_l2(standard_weight(torch.ones(8), weight, DIRECT, "qiao"), theirs) <= 1e-6


@pytest.mark.parametrize("groups", [1, 2])
def test_timm_and_nf_are_the_classes_of_timm(groups: int) -> None:
    layers = pytest.importorskip("timm.layers")
    x = torch.randn(2, 4, 9, 9)
    plain = layers.StdConv2d(4, 6, 3, groups=groups)
    torch.nn.init.normal_(plain.weight, 0.1, 0.02)
    ours = standard_weight(torch.ones(6), plain.weight, DIRECT, "timm")
    assert relative_l2(F.conv2d(x, ours, None, 1, 1, 1, groups), plain(x)) <= 1e-6
    scaled = layers.ScaledStdConv2d(4, 6, 3, groups=groups, bias=False)
    torch.nn.init.normal_(scaled.gain)
    ours = standard_weight(scaled.gain, scaled.weight, DIRECT, "nf")
    assert relative_l2(F.conv2d(x, ours, None, 1, 1, 1, groups), scaled(x)) <= 1e-6


def test_bit_is_the_fused_formula_of_its_code() -> None:
    weight = torch.randn(8, 3, 5, 5) * 1e-4
    var, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, correction=0)
    theirs = (weight - mean) / torch.sqrt(var + 1e-10)
    assert relative_l2(standard_weight(torch.ones(8), weight, DIRECT, "bit"), theirs) <= 1e-6
    assert relative_l2(standard_weight(torch.ones(8), weight, DIRECT, "timm"), theirs) > 0.1


@every_dialect
@every_shape
def test_gradients_are_those_of_the_formula(
    layout: RowLayout, shape: tuple[int, ...], dialect: str
) -> None:
    gain, v = drawn(layout, shape)
    gain = gain.reshape(layout.row_shape(v)).requires_grad_()
    v.requires_grad_()
    torch.autograd.gradcheck(lambda a, b: standard_weight(a, b, layout, dialect), (gain, v))


@every_dialect
@every_shape
def test_the_gain_gives_the_centered_weight_back(
    layout: RowLayout, shape: tuple[int, ...], dialect: str
) -> None:
    _, v = drawn(layout, shape)
    gain = standard_gain(v, layout, dialect)
    expected = torch.stack([row - row.mean() for row in rows_of(v, layout)])
    weight = standard_weight(gain, v, layout, dialect)
    assert relative_l2(torch.stack(rows_of(weight, layout)), expected) <= 1e-14
    assert bool((gain > 0).all())


@every_dialect
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e-20])
def test_constant_rows_give_nothing_and_finite_gradients(
    dialect: str, dtype: torch.dtype, value: float
) -> None:
    v = torch.randn(3, 5, 3, 3).to(dtype)
    v[1] = value
    for layout in (DIRECT, RowLayout(True, 1), RowLayout(True, 3)):
        # Grouped, v[1] is all of one group.
        rows = v.transpose(0, 1) if layout == RowLayout(True, 1) else v
        rows = rows.clone().requires_grad_()
        gain = standard_gain(rows, layout, dialect).to(dtype).requires_grad_()
        weight = standard_weight(gain, rows, layout, dialect)
        weight.sum().backward()
        for tensor in (weight, rows.grad, gain.grad, gain):
            assert bool(torch.isfinite(tensor).all())
        if layout.groups == 1:
            row = rows_of(weight, layout)[1]
            assert bool((row.abs() <= 1e-6 * max(1.0, abs(value))).all())
        exact = true_standard_weight(gain, rows, layout, dialect)
        assert bool(torch.isfinite(exact).all())


@every_dialect
def test_rows_of_one_element_give_zero_and_zero_gradients(dialect: str) -> None:
    v = torch.randn(4, 1, requires_grad=True)
    gain = torch.randn(4, 1, requires_grad=True)
    weight = standard_weight(gain, v, DIRECT, dialect)
    weight.sum().backward()
    for tensor in (weight, v.grad, gain.grad, true_standard_weight(gain, v, DIRECT, dialect)):
        assert torch.equal(tensor, torch.zeros(4, 1))


@every_dialect
def test_weights_without_elements(dialect: str) -> None:
    for shape in ((0, 3), (3, 0)):
        v = torch.empty(shape)
        assert standard_weight(torch.ones(shape[0]), v, DIRECT, dialect).shape == shape
        assert true_standard_weight(torch.ones(shape[0]), v, DIRECT, dialect).shape == shape
        assert standard_gain(v, DIRECT, dialect).shape == (shape[0],)
        assert mean_shares(v, DIRECT).shape == (shape[0],)


@every_dialect
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_wide(dialect: str, dtype: torch.dtype) -> None:
    """300² overflows float16, and the last bits of a mean in bfloat16 are all of a small variance."""
    v = (torch.randn(4, 50) * (300 if dtype is torch.float16 else 0.01) + 1).to(dtype)
    gain = torch.ones(4, dtype=dtype)
    weight = standard_weight(gain, v, DIRECT, dialect)
    assert weight.dtype == dtype
    exact = standard_weight(gain.double(), v.double(), DIRECT, dialect)
    # A float32 result may lie on the other side of a rounding boundary: one unit, rarely.
    assert relative_l2(weight, exact) <= torch.finfo(dtype).eps
    assert torch.equal(true_standard_weight(gain, v, DIRECT, dialect), exact.to(dtype))


@every_dialect
@every_shape
def test_blocks_change_no_row(
    layout: RowLayout, shape: tuple[int, ...], dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gain, v = drawn(layout, shape)
    whole = (
        true_standard_weight(gain, v, layout, dialect),
        standard_gain(v, layout, dialect),
        mean_shares(v, layout),
    )
    monkeypatch.setattr(rows_module, "_BLOCK", 8)
    blocks = (
        true_standard_weight(gain, v, layout, dialect),
        standard_gain(v, layout, dialect),
        mean_shares(v, layout),
    )
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


@every_shape
def test_memory_format_is_kept(layout: RowLayout, shape: tuple[int, ...]) -> None:
    gain, v = drawn(layout, shape)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if v.dim() not in formats:
        pytest.skip("there is one memory format")
    last = v.contiguous(memory_format=formats[v.dim()])
    for dialect in DIALECTS:
        for weight in (
            standard_weight(gain, last, layout, dialect),
            true_standard_weight(gain, last, layout, dialect),
        ):
            assert weight.is_contiguous(memory_format=formats[v.dim()])
            expected = standard_weight(gain, v, layout, dialect)
            torch.testing.assert_close(weight, expected, rtol=1e-13, atol=1e-15)


@every_shape
def test_mean_shares_is_the_part_that_is_lost(layout: RowLayout, shape: tuple[int, ...]) -> None:
    _, v = drawn(layout, shape)
    for row, share in zip(rows_of(v, layout), mean_shares(v, layout), strict=True):
        lost = row.mean() * torch.ones_like(row)
        assert math.isclose(share, lost.norm() / row.norm(), rel_tol=1e-12)
        kept = (row - lost).norm() / row.norm()
        assert math.isclose(kept**2 + share**2, 1, rel_tol=1e-12)
    assert mean_shares(v * 1e-300, layout).isfinite().all()
    assert mean_shares(v * 1e300, layout).isfinite().all()


def test_size_of_a_row() -> None:
    assert row_size(torch.empty(8, 3, 5, 5), DIRECT) == 75
    assert row_size(torch.empty(8, 3, 5), RowLayout(True, 4)) == 2 * 5


def test_unknown_dialects_are_named() -> None:
    with pytest.raises(UsageError, match="use qiao, timm, bit, nf"):
        standard_weight(torch.ones(1), torch.ones(1, 2), DIRECT, "keras")
