"""Models that sample in their forward are judged on the same draws."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normconv.proof.outputs as outputs_module
from normconv.numerics import relative_l2
from normconv.proof import evaluate, prove
from normconv.proof.random_draws import DrawnAsBefore


class Noisy(nn.Module):
    """Draws in every way that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y = y + torch.randn_like(y) + torch.rand_like(y)
        y = y + torch.randn(y.shape, dtype=y.dtype) + torch.rand(y.shape).to(y.dtype)
        return y + torch.empty_like(y).normal_() * torch.empty_like(y).uniform_(0.5, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_float64_run_draws_the_same(dtype: torch.dtype) -> None:
    model, x = Noisy().to(dtype), torch.randn(8, 4).to(dtype)
    own = evaluate(model, (x,))["output"]
    wide = evaluate(model, (x,), dtype=torch.float64)["output"]
    assert wide.dtype == torch.float64
    assert relative_l2(own, wide) < 8 * torch.finfo(dtype).eps
    proof = prove(model, model, (), (x,))
    assert all(check.passed for check in proof.checks)


def test_other_draws_would_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*_: Any, **__: Any) -> Any:
        return nullcontext()

    monkeypatch.setattr(outputs_module, "DrawnAsBefore", off)
    model, x = Noisy(), torch.randn(8, 4)
    wide = evaluate(model, (x,), dtype=torch.float64)["output"]
    assert relative_l2(evaluate(model, (x,))["output"], wide) > 0.1


def test_what_is_drawn_in_another_dtype_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3, dtype=torch.float32), torch.randint(0, 9, (3,))
    torch.manual_seed(0)
    with DrawnAsBefore(torch.float64, own=torch.float32, default=torch.float32):
        got = torch.randn(3, dtype=torch.float32), torch.randint(0, 9, (3,))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))


class OfItsDtype(nn.Module):
    """Puts out fewer numbers in float64, as a duration does that rounding decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y[:, :3] if y.dtype == torch.float64 else y


def test_a_length_that_depends_on_rounding_is_a_failed_check() -> None:
    model = OfItsDtype()
    proof = prove(model, model, (), (torch.randn(8, 4),))
    assert [check.name for check in proof.checks if not check.passed] == ["output"]
