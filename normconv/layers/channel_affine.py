"""One scale and one shift per channel: what is left of a norm that no layer could absorb."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconv.numerics import Affine

__all__ = ["ChannelAffine"]


class ChannelAffine(nn.Module):
    """y = scale_c · x + shift_c along axis 1.

    Trainable ones hold Parameters; frozen ones hold buffers, as FrozenBatchNorm does. It is not a
    norm: nothing is computed from the activations.

    Args:
        num_channels: C.
        trainable: whether scale and shift are Parameters.
        dtype: of scale and shift; None for the default.
        device: of scale and shift.

    Shape: (N, C, *) to the same, in the input's dtype.

    >>> ChannelAffine(2)(torch.ones(1, 2, 3)).shape
    torch.Size([1, 2, 3])
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        trainable: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        scale = torch.ones(num_channels, dtype=dtype, device=device)
        shift = torch.zeros(num_channels, dtype=dtype, device=device)
        if trainable:
            self.scale = nn.Parameter(scale)
            self.shift = nn.Parameter(shift)
        else:
            self.register_buffer("scale", scale)
            self.register_buffer("shift", shift)

    @classmethod
    def of(
        cls, affine: Affine, *, trainable: bool, dtype: torch.dtype, center: Tensor | None = None
    ) -> ChannelAffine:
        """Make one that computes the given map, rounded once to `dtype`.

        The shift takes back what the rounding of the scale does to a `center`, (C,): a typical input.
        """
        layer = cls(
            affine.scale.numel(), trainable=trainable, dtype=dtype, device=affine.scale.device
        )
        with torch.no_grad():
            layer.scale.copy_(affine.scale)
            shift = affine.shift
            if center is not None:
                shift = shift + (affine.scale - layer.scale.double()) * center.double()
            layer.shift.copy_(shift)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Apply the map to (N, C, *)."""
        shape = (1, -1) + (1,) * (input.dim() - 2)
        # One call, rounded once in half precision too, as BatchNorm is: the product and the shift may
        # be far larger than their sum.
        return torch.addcmul(self.shift.view(shape), input, self.scale.view(shape)).to(input.dtype)

    def extra_repr(self) -> str:
        """Say the size and whether it is trained."""
        return f"{self.num_channels}, trainable={isinstance(self.scale, nn.Parameter)}"
