"""Cases about what goes into a model, what comes out, and what Python does in between."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Case, x

__all__ = ["FORMS"]

C2 = x(2, 3, 6, 6)
NOISE = 0.1


class ConvNorm(nn.Module):
    """A convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def features(self, image: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(image)))


class WithHead(ConvNorm):
    """The same with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)


class TakesDict(ConvNorm):
    """A batch as a dict, of which one entry may be missing."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        y = self.features(batch["image"])
        if "weight" in batch:
            y = y * batch["weight"]
        return {"nested": (y, [{"mean": y.mean((2, 3))}])}


class OnlyKeywords(ConvNorm):
    """Keywords alone, an optional one left out between two that are given."""

    def forward(
        self, *, image: Tensor, mask: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        y = self.features(image)
        if mask is not None:
            y = y * mask
        if scale is not None:
            y = y * scale
        return y, (y.mean((2, 3)), mask)


class AnyKeywords(ConvNorm):
    """Keywords that the signature does not name."""

    def forward(self, image: Tensor, **more: Tensor) -> Tensor:
        y = self.features(image)
        return y + more["bias"] if "bias" in more else y


class ValueBranch(ConvNorm):
    """A branch on values."""

    def forward(self, image: Tensor) -> Tensor:
        y = self.features(image)
        return y + 1 if float(y.detach().abs().sum()) > 0 else y


class RandomLoop(WithHead):
    """A policy: a dict in, a number of steps that is drawn, a loss out."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        state = self.features(batch["image"]).mean((2, 3))
        for _ in range(2 + int(torch.rand(state.shape, dtype=torch.float32).sum() > 4)):
            state = state + NOISE * torch.tanh(state)
        action = self.head(state)
        return {"loss": F.mse_loss(action, batch["action"]), "action": action}


class ThroughNumpy(ConvNorm):
    """The conv's output leaves torch by the way."""

    def forward(self, image: Tensor) -> Tensor:
        y = self.conv(image)
        largest = float(abs(y.detach().numpy()).max())
        return self.bn(y) / (1 + largest)


class Opaque:
    """An output of a class that nobody knows."""

    def __init__(self, logits: Tensor, feature: Tensor) -> None:
        self.logits, self.feature = logits, feature


@dataclasses.dataclass
class Wrapped:
    """An output that holds another class's output."""

    logits: Tensor
    inner: Opaque


class ReturnsOpaque(WithHead):
    """The conv's output comes out inside a class that nobody knows."""

    def forward(self, image: Tensor) -> Wrapped:
        y = self.conv(image)
        logits = self.head(torch.relu(self.bn(y)).mean((2, 3)))
        return Wrapped(logits, Opaque(logits, y))


class WritesThroughView(ConvNorm):
    """One channel of the conv's output is written through a view that was taken before."""

    def forward(self, image: Tensor) -> Tensor:
        y = self.conv(image)
        first = y[:, 0]
        first.mul_(2)
        return self.bn(y)


class FillsBuffer(ConvNorm):
    """Two convolutions write their parts of one tensor, which the norm takes."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8)

    def forward(self, image: Tensor) -> Tensor:
        out = image.new_empty(image.shape[0], 8, 4, 4)
        out[:, :4] = self.conv(image)
        out[:, 4:] = self.other(image)
        return self.bn(out) if float(image.sum()) < 1e9 else out


class Handled(ConvNorm):
    """An exception that the model itself handles, raised inside a layer."""

    def forward(self, image: Tensor) -> Tensor:
        try:
            y = self.conv(image[:, :2])
        except RuntimeError:
            y = self.conv(image)
        return torch.relu(self.bn(y))


def model_output() -> nn.Module:
    """A transformers ModelOutput."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class ReturnsModelOutput(ConvNorm):
        def forward(self, image: Tensor) -> BaseModelOutputWithPooling:
            y = self.features(image)
            return BaseModelOutputWithPooling(last_hidden_state=y, pooler_output=y.mean((2, 3)))

    return ReturnsModelOutput()


FORMS: dict[str, Case] = {
    "dict_input": Case(
        TakesDict,
        ({"image": C2, "weight": x(2, 4, 4, 4, seed=1)},),
        fold=1,
        captures=("export", "hooks"),
    ),
    "only_keywords": Case(OnlyKeywords, (), {"image": C2, "scale": x(2, 4, 4, 4, seed=1)}, fold=1),
    "any_keywords": Case(
        AnyKeywords, (C2,), {"bias": x(2, 4, 4, 4, seed=1)}, fold=1, captures=("export", "hooks")
    ),
    "value_branch": Case(ValueBranch, (C2,), fold=1, captures=("hooks",)),
    "random_loop": Case(
        RandomLoop, ({"image": C2, "action": x(2, 2, seed=1)},), fold=1, captures=("hooks",)
    ),
    "through_numpy": Case(ThroughNumpy, (C2,), affine=1, captures=("hooks",), couples=True),
    "returns_opaque": Case(ReturnsOpaque, (C2,), affine=1, captures=("export", "hooks")),
    "returns_model_output": Case(model_output, (C2,), fold=1, pickles=False),
    "writes_through_view": Case(WritesThroughView, (C2,), affine=1),
    "fills_buffer": Case(FillsBuffer, (C2,), affine=1, captures=("hooks",)),
    "handled_exception": Case(Handled, (C2,), fold=1, captures=("hooks",)),
}
