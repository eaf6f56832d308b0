"""Filters fitted to patches: against least squares, and against the Lagrangian of the constraint."""

from __future__ import annotations

import pytest
import torch

from normconv.numerics import fit_filters, relative_l2, second_of


def patches(rows: int = 4000, n: int = 9) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, n).double() @ torch.randn(n, n).double() + torch.randn(n).double()


def test_without_ridge_it_is_least_squares() -> None:
    x = patches()
    y = torch.randn(len(x), 3).double() + x[:, :3] * 2
    fit = fit_filters(second_of(x, y), torch.randn(3, 9), torch.randn(3), ridge=0.0)
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], 1), y).solution
    assert torch.allclose(fit.weight, wanted[:-1].T, atol=1e-8)
    assert torch.allclose(fit.bias, wanted[-1], atol=1e-8)
    assert not fit.lost.any()


def test_no_filter_without_a_mean_is_nearer() -> None:
    x, weight, bias = patches(), torch.randn(3, 9).double(), torch.randn(3).double()
    fit = fit_filters(second_of(x), weight, bias, zero_mean=True, ridge=0.0)
    assert fit.weight.sum(1).abs().max() < 1e-9
    outputs = x @ weight.T + bias

    def error(w: torch.Tensor) -> torch.Tensor:
        difference = outputs - x @ w.T
        return difference.var(0, correction=0)

    least = error(fit.weight)
    assert torch.allclose(least / outputs.var(0, correction=0), fit.lost, rtol=1e-6)
    for _ in range(20):
        step = torch.randn(3, 9).double() * 0.1
        assert (error(fit.weight + step - step.mean(1, keepdim=True)) >= least - 1e-12).all()
    centred = weight - weight.mean(1, keepdim=True)
    assert (error(centred) > 1.05 * least).all()
    difference = outputs - (x @ fit.weight.T + fit.bias)
    assert difference.mean(0).abs().max() < 1e-9


@pytest.mark.parametrize("zero_mean", [False, True])
def test_few_or_constant_patches_stay_finite_and_near(zero_mean: bool) -> None:
    weight, bias = torch.randn(3, 9), torch.randn(3)
    for x in (patches(4), torch.ones(50, 9), torch.zeros(50, 9)):
        y = x.double() @ weight.double().T + bias
        fit = fit_filters(second_of(x, y), weight, bias, zero_mean=zero_mean)
        assert fit.weight.isfinite().all()
        assert fit.bias.isfinite().all()
        if not zero_mean:
            assert torch.allclose(fit.weight, weight.double(), atol=1e-6)


def test_ridge_keeps_what_was_there() -> None:
    x, weight = patches(40), torch.randn(2, 9).double()
    y = torch.randn(40, 2).double()
    seen = second_of(x, y)
    far = fit_filters(seen, weight, torch.zeros(2), ridge=1e-6).weight - weight
    near = fit_filters(seen, weight, torch.zeros(2), ridge=10.0).weight - weight
    assert near.norm() < 0.5 * far.norm()


@pytest.mark.parametrize("outputs", [False, True])
def test_sums_of_parts_are_the_sums_of_all(outputs: bool) -> None:
    """Parts whose means are far apart, which sums that are not centred would lose digits to."""
    x = patches(60) + 1e6 * torch.arange(60).div(20, rounding_mode="floor")[:, None]
    y = torch.randn(60, 3).double() if outputs else None
    parts = [
        second_of(p, None if y is None else y[i * 20 : i * 20 + 20])
        for i, p in enumerate(x.split(20))
    ]
    together, whole = parts[0] + parts[1] + parts[2], second_of(x, y)
    assert together.number == whole.number
    for got, wanted in zip(together[1:], whole[1:], strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert relative_l2(got, wanted) < 1e-9
