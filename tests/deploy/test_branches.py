"""What depends on the inputs' values is seen where it leaves torch; sizes and buffers are not it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normconv.deploy.branches import values_read


class Reads(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("size", torch.tensor(3))

    def forward(self, x):
        return self.body(self, x)


def written_into(self, x):
    y = torch.zeros(2)
    y[0] = x.sum()
    return x if y.max() > 0 else -x


def out_of(self, x):
    y = torch.empty(())
    torch.sum(x, (0, 1), out=y)
    return x * float(y)


@pytest.mark.parametrize(
    ("body", "read"),
    [
        (lambda self, x: x * x.mean().item(), ["a Python number"]),
        (lambda self, x: x[: int(x.abs().sum())], ["a Python int"]),
        (lambda self, x: x.new_tensor(x.flatten().tolist()), ["Python numbers"]),
        (written_into, ["a truth value"]),
        (out_of, ["a Python float"]),
        (lambda self, x: x[:, : int(self.size)], []),
        (lambda self, x: x if torch.tensor(x.shape[1]) > 3 else -x, []),
        (lambda self, x: torch.where(x > 0, x, -x), []),
    ],
)
def test_what_is_read(body, read):
    assert values_read(Reads(body), (torch.randn(2, 6),), {}) == read
