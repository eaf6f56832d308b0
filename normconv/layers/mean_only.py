"""Mean-only batch normalization: the batch gives the mean, and nothing is divided."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconv.numerics import wide_dtype

__all__ = ["MeanOnlyBatchNorm"]


class MeanOnlyBatchNorm(nn.Module):
    """y = x − mean_c + bias_c along axis 1; in training the batch's mean, in eval the running one.

    The scale of activations is left to the layer before, which is why it goes with weight norm. The
    running mean moves as BatchNorm's does: mean ← (1 − momentum) · mean + momentum · batch mean.

    Args:
        num_features: C.
        momentum: of the running mean; None for the average over all batches since the last reset.
        device: of bias and running mean.
        dtype: of bias and running mean; None for the default.

    Shape: (N, C) or (N, C, *) to the same, in the input's dtype.

    Raises:
        ValueError: the input has other channels, or in training no values or one a channel, of which the
            mean would leave nothing.

    Source: Salimans & Kingma 2016, "Weight Normalization", section 3.

    >>> norm = MeanOnlyBatchNorm(1)
    >>> norm(torch.tensor([[1.0], [3.0]])).tolist(), norm.running_mean.item()
    ([[-1.0], [1.0]], 0.20000000298023224)
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    def reset_running_stats(self) -> None:
        """Forget the batches seen."""
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Center (N, C, *) and add the bias."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"expected (N, {self.num_features}) or (N, {self.num_features}, ...), got "
                f"{tuple(input.shape)}"
            )
        mean = self._batch_mean(input) if self.training else self.running_mean
        shape = (1, -1) + (1,) * (input.dim() - 2)
        # Half precision is rounded once.
        wide = wide_dtype(input.dtype)
        return ((input - mean.to(wide).view(shape)) + self.bias.view(shape)).to(input.dtype)

    def _batch_mean(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            raise ValueError(
                f"a batch without values has no mean: got {tuple(input.shape)} in training"
            )
        if input.numel() == self.num_features:
            raise ValueError(
                f"one value a channel is its own mean, nothing would be left: got "
                f"{tuple(input.shape)} in training; use a larger batch, or convert with to='wn'"
            )
        wide = wide_dtype(input.dtype)
        mean = input.mean([0, *range(2, input.dim())], dtype=wide)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            # As a tensor, so that the cumulative average needs no number from the device.
            factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            running = self.running_mean.to(wide)
            self.running_mean.copy_((1 - factor) * running + factor * mean)
        return mean

    def extra_repr(self) -> str:
        """Say the size and the momentum."""
        return f"{self.num_features}, momentum={self.momentum}"
