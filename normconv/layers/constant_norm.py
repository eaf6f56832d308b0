"""A norm whose statistics are constants: what stands in for a per-sample norm while it is frozen."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ConstantNorm"]


class ConstantNorm(_BatchNorm):
    """y = γ (x − μ) / √(σ² + eps) + β for each channel of (N, C, *), whatever the number of axes.

    A BatchNorm in all respects but the check of its input's rank, so that whatever takes a BatchNorm out
    of a model takes this out of it too.

    >>> import torch
    >>> ConstantNorm(3).eval()(torch.ones(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """

    def _check_input_dim(self, input: Tensor) -> None:  # torch calls it by this name
        """Take any rank from 2 on; the channels are axis 1."""
