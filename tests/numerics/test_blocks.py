"""Work in blocks gives, bit for bit, what work on the whole weight gives, with a bounded scratch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normconv.numerics import (
    RowLayout,
    all_finite,
    row_norms,
    scale_rows,
    scale_rows_,
    split_weight,
    split_weight_,
    true_weight,
    wide_row_norms,
)
from normconv.numerics import rows as rows_module

DIRECT, TRANSPOSED = RowLayout(), RowLayout(transposed=True)
SHAPES = [
    pytest.param(DIRECT, (64, 100), id="linear"),
    pytest.param(DIRECT, (37, 11, 3, 3), id="conv2d"),
    pytest.param(DIRECT, (5, 700), id="rows larger than a block"),
    pytest.param(DIRECT, (1, 3000), id="one row"),
    pytest.param(DIRECT, (12, 5, 3, 2, 2), id="conv3d"),
    pytest.param(TRANSPOSED, (30, 40, 3), id="transposed 1d"),
    pytest.param(TRANSPOSED, (64, 21, 1, 1), id="transposed 2d, one element"),
    pytest.param(RowLayout(transposed=True, groups=4), (32, 30, 3, 3), id="transposed grouped"),
    pytest.param(RowLayout(transposed=True, groups=96), (96, 1, 5, 5), id="transposed depthwise"),
    pytest.param(DIRECT, (0, 4), id="no rows"),
    pytest.param(DIRECT, (4, 0), id="empty rows"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK", 500)


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if len(shape) in formats:
        return [weight, weight.contiguous(memory_format=formats[len(shape)])]
    return [weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("layout", "shape"), SHAPES)
def test_blocks_change_no_bit(
    layout: RowLayout, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for weight in weights(shape, dtype):
        whole = row_norms(weight.double(), layout)
        assert torch.equal(wide_row_norms(weight, layout), whole)
        factor = torch.randn(layout.channels(weight), dtype=torch.float64)
        expected = torch.empty_like(weight).copy_(
            scale_rows(weight.double(), factor, layout) if weight.numel() else weight
        )
        scaled = weight.clone()
        assert scale_rows_(scaled, factor, layout) is scaled
        assert torch.equal(scaled, expected)
        assert scaled.stride() == weight.stride()


@pytest.mark.parametrize(("layout", "shape"), SHAPES)
def test_every_row_is_in_one_block(layout: RowLayout, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    for block, _ in rows_module.row_blocks(weight, layout):
        block += 1
    assert bool((weight == 1).all())
    spans = [rows for _, rows in rows_module.row_blocks(weight, layout)]
    found = [row for rows in spans for row in range(rows.start, rows.stop)]
    assert found == list(range(layout.channels(weight) if weight.numel() else 0))


def test_the_scratch_is_bounded() -> None:
    for layout, shape in [p.values for p in SHAPES]:
        weight = torch.zeros(shape)
        longest = max(2, weight.numel() // max(1, layout.channels(weight)))
        for block, _ in rows_module.row_blocks(weight, layout):
            assert block.numel() < 2 * max(500, 2 * longest)


@pytest.mark.parametrize(("layout", "shape"), SHAPES)
def test_splitting_in_place_is_splitting(layout: RowLayout, shape: tuple[int, ...]) -> None:
    weight = weights(shape, torch.float32)[0]
    alive = torch.ones(layout.channels(weight))
    alive[::3] = 0
    weight = scale_rows(weight, alive, layout) if weight.numel() else weight
    factor = torch.randn(len(alive), dtype=torch.float64)
    g, v = split_weight(weight, factor, layout)
    storage = weight.data_ptr()
    in_place = split_weight_(weight, factor, layout)
    assert in_place.v is weight
    assert in_place.v.data_ptr() == storage
    assert torch.equal(in_place.v, v)
    assert torch.equal(in_place.g, g)
    if weight.numel():
        assert bool(torch.isfinite(true_weight(g, v, layout)[0]).all())
        assert not bool((row_norms(v, layout) == 0).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_sees_one_element(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.randn(3, 50).to(dtype)
        assert all_finite(tensor)
        tensor[1, 7] = bad
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0))
    assert all_finite(torch.empty(2, device="meta"))
    assert all_finite(torch.ones(2, dtype=torch.int64))
