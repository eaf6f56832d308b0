"""Zoo cases of dataflow: what lies between a norm and the layers before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Case, x

__all__ = ["FLOWS"]


class Flow(nn.Module):
    """Named modules, and a function of this file that says what calls what."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def flow(function: Callable[..., Any], **factories: Callable[[], nn.Module]) -> Any:
    """A factory of `Flow`, for a case."""
    return lambda: Flow(function, **{name: make() for name, make in factories.items()})


def conv(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **kwargs)


def fc(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*args, **kwargs)


def bn2(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.BatchNorm2d(channels)


def bn1(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.BatchNorm1d(channels)


# --- before the norm ------------------------------------------------------------------------------


def flat_tokens(m: Any, x: Tensor) -> Tensor:
    """As LeViT does it."""
    y = m.fc(x)
    return m.bn(y.flatten(0, 1)).reshape_as(y)


def pooled(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.avg_pool2d(m.conv(x), 2))


def padded_pool(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.avg_pool2d(m.conv(x), 3, padding=1))


def spatial_mean(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x).mean((2, 3)))


def channel_mean(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x).mean(1, keepdim=True).expand(-1, 4, -1, -1))


def upsampled(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.interpolate(m.conv(x), scale_factor=2, mode="bilinear"))


def generator_stem(m: Any, x: Tensor) -> Tensor:
    """As DCGAN does it: features become maps before they are normalized."""
    return m.bn(m.fc(x).view(x.shape[0], 4, 3, 3))


def flattened_before(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.bn(m.conv(x).flatten(1)))


def concatenated(m: Any, x: Tensor) -> Tensor:
    return m.bn(torch.cat([m.a(x), m.b(x)], dim=1))


def concatenated_with_input(m: Any, x: Tensor) -> Tensor:
    return m.bn(torch.cat([m.a(x), x], dim=1))


def concatenated_reused(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.bn(torch.cat([y, m.b(x)], dim=1)).sum(1) + y.sum(1)


def concatenated_tokens(m: Any, x: Tensor) -> Tensor:
    """Along the sequence: both layers hold all channels."""
    return m.bn(torch.cat([m.a(x), m.b(x)], dim=1).transpose(1, 2))


def shuffled(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    n, c, h, w = y.shape
    return m.bn(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def dropped(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.drop(m.conv(x)))


def functionally_dropped(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.dropout(m.conv(x), 0.5, m.training))


def clamped(m: Any, x: Tensor) -> Tensor:
    """A clamp that random numbers never reach is no identity."""
    return m.bn(m.conv(x).clamp(-1e4, 1e4))


def padded_map(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.pad(m.conv(x), (1, 1, 1, 1)))


def dropped_nothing(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.dropout(m.conv(x), 0.0, m.training))


def halves(m: Any, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, dim=1)
    return m.bn(a) * torch.sigmoid(b)


def two_norms_of_halves(m: Any, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, dim=1)
    return torch.tanh(m.bn(a)) + m.bn_b(b)


class TrainingBranch(nn.Module):
    """Training mode uses the conv's output once more: it must go on seeing it as it was."""

    def __init__(self, norm_in_branch: bool = False, forward_fold: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        last: nn.Module = nn.BatchNorm2d(2) if norm_in_branch else nn.ReLU()
        self.aux = nn.Sequential(nn.Conv2d(4, 2, 1), last)
        self.act: nn.Module = nn.ReLU() if forward_fold else nn.Identity()
        self.head = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.bn(self.act(y))
        out = self.head(torch.relu(z) if type(self.act) is nn.Identity else z)
        if self.training:
            return out, self.aux(z if type(self.act) is nn.ReLU else y)
        return out


# --- after the norm -------------------------------------------------------------------------------


def then(m: Any, x: Tensor) -> Tensor:
    return m.after(m.bn(torch.tanh(x)))


def flattened_after(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.bn(torch.relu(m.conv(x))).flatten(1))


def flattened_channels_last(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.bn(torch.relu(m.conv(x))).permute(0, 2, 3, 1).flatten(1))


def tokens_after(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.bn(torch.relu(m.conv(x))).flatten(2).transpose(1, 2))


def pooled_after(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.adaptive_avg_pool2d(m.bn(torch.relu(x)), 1).flatten(1))


def two_readers(m: Any, x: Tensor) -> Tensor:
    y = m.bn(torch.tanh(x))
    return m.q(y) * m.k(y)


def two_readers_one_other(m: Any, x: Tensor) -> Tensor:
    y = m.bn(torch.tanh(x))
    return m.q(y) * torch.sigmoid(y)


def between_two_norms(m: Any, x: Tensor) -> Tensor:
    """The conv takes the first norm at its input and the second at its output."""
    return m.bn_out(m.conv(m.bn(torch.tanh(x))))


def between_two_norms_of_tokens(m: Any, x: Tensor) -> Tensor:
    y = m.fc(m.bn(torch.tanh(x)))
    return m.bn_out(y.view(x.shape[0], 4, 2, 2))


def dropped_after(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.drop(m.bn(torch.tanh(x))))


def joined_after(m: Any, x: Tensor) -> Tensor:
    return m.after(torch.cat([m.bn(torch.tanh(x)), x], dim=1))


def called_twice_after(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.bn(torch.tanh(x))) + m.fc(x)


def shared_norm_two_layers(m: Any, x: Tensor) -> Tensor:
    return m.q(m.bn(torch.tanh(x))) + m.k(m.bn(torch.sigmoid(x)))


C, F4 = (x(2, 3, 6, 6),), (x(3, 4),)
W4 = (x(2, 4, 5, 5),)

FLOWS: dict[str, Case] = {
    "levit_tokens": Case(flow(flat_tokens, fc=fc(5, 4), bn=bn1(4)), (x(2, 3, 5),), fold=1),
    "after_avg_pool": Case(flow(pooled, conv=conv(3, 4, 3), bn=bn2(4)), C, fold=1),
    "after_padded_avg_pool": Case(flow(padded_pool, conv=conv(3, 4, 3), bn=bn2(4)), C, affine=1),
    "after_spatial_mean": Case(flow(spatial_mean, conv=conv(3, 4, 3), bn=bn1(4)), C, fold=1),
    "after_channel_mean": Case(flow(channel_mean, conv=conv(3, 4, 3), bn=bn2(4)), C, affine=1),
    "after_upsampling": Case(flow(upsampled, conv=conv(3, 4, 3), bn=bn2(4)), C, fold=1),
    "features_to_maps": Case(flow(generator_stem, fc=fc(4, 36), bn=bn2(4)), F4, fold=1),
    "flatten_between": Case(flow(flattened_before, conv=conv(3, 2, 3), bn=bn1(32)), C, affine=1),
    "concat_split": Case(
        flow(concatenated, a=conv(3, 2, 3), b=conv(3, 4, 3, bias=False), bn=bn2(6)), C, fold=1
    ),
    "concat_with_input": Case(
        flow(concatenated_with_input, a=conv(3, 2, 1), bn=bn2(5)), C, affine=1
    ),
    "concat_reused": Case(
        flow(concatenated_reused, a=conv(3, 2, 3), b=conv(3, 4, 3), bn=bn2(6)), C, affine=1
    ),
    "concat_of_tokens": Case(
        flow(concatenated_tokens, a=fc(5, 4), b=fc(5, 4), bn=bn1(4)), (x(2, 3, 5),), fold=1
    ),
    "channel_shuffle_between": Case(flow(shuffled, conv=conv(3, 4, 3), bn=bn2(4)), C, affine=1),
    "dropout_between": Case(
        flow(dropped, conv=conv(3, 4, 3), drop=lambda: nn.Dropout(0.5), bn=bn2(4)), C, affine=1
    ),
    "dropout_of_nothing_between": Case(
        flow(dropped, conv=conv(3, 4, 3), drop=lambda: nn.Dropout(0.0), bn=bn2(4)), C, fold=1
    ),
    "functional_dropout_between": Case(
        flow(functionally_dropped, conv=conv(3, 4, 3), bn=bn2(4)), C, affine=1
    ),
    "functional_dropout_of_nothing": Case(
        flow(dropped_nothing, conv=conv(3, 4, 3), bn=bn2(4)), C, fold=1
    ),
    "clamp_between": Case(flow(clamped, conv=conv(3, 4, 3), bn=bn2(4)), C, affine=1),
    "padding_between": Case(flow(padded_map, conv=conv(3, 4, 3), bn=bn2(4)), C, affine=1),
    "half_of_a_conv": Case(flow(halves, conv=conv(3, 8, 3), bn=bn2(4)), C, affine=1),
    "two_norms_of_halves": Case(
        flow(two_norms_of_halves, conv=conv(3, 8, 3), bn=bn2(4), bn_b=bn2(4)), C, affine=2
    ),
    "training_branch": Case(TrainingBranch, C, affine=1),
    "training_branch_with_norm": Case(lambda: TrainingBranch(True), C, affine=1, fold=1),
    "training_branch_after_norm": Case(lambda: TrainingBranch(forward_fold=True), C, affine=1),
    "forward_conv": Case(flow(then, bn=bn2(4), after=conv(4, 3, 3)), W4, forward=1),
    "forward_pointwise": Case(
        flow(then, bn=bn2(4), after=conv(4, 3, 1, bias=False)), W4, forward=1
    ),
    "forward_grouped": Case(flow(then, bn=bn2(4), after=conv(4, 6, 3, groups=2)), W4, forward=1),
    "forward_depthwise": Case(flow(then, bn=bn2(4), after=conv(4, 8, 3, groups=4)), W4, forward=1),
    "forward_zero_padding": Case(
        flow(then, bn=bn2(4), after=conv(4, 3, 3, padding=1)), W4, affine=1
    ),
    "forward_same_padding": Case(
        flow(then, bn=bn2(4), after=conv(4, 3, 3, padding="same")), W4, affine=1
    ),
    "forward_reflect_padding": Case(
        flow(then, bn=bn2(4), after=conv(4, 3, 3, padding=1, padding_mode="reflect")), W4, forward=1
    ),
    "forward_circular_padding": Case(
        flow(then, bn=bn2(4), after=conv(4, 3, 3, padding=1, padding_mode="circular")),
        W4,
        forward=1,
    ),
    "forward_transposed": Case(
        flow(then, bn=bn2(4), after=lambda: nn.ConvTranspose2d(4, 3, 3)), W4, affine=1
    ),
    "forward_linear": Case(flow(then, bn=bn1(4), after=fc(4, 3, bias=False)), F4, forward=1),
    "forward_weight_normed": Case(
        flow(then, bn=bn1(4), after=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        F4,
        affine=1,
        pickles=False,
    ),
    "forward_flattened": Case(
        flow(flattened_after, conv=conv(3, 2, 3), bn=bn2(2), fc=fc(32, 3)), C, forward=1
    ),
    "forward_channels_last": Case(
        flow(flattened_channels_last, conv=conv(3, 2, 3), bn=bn2(2), fc=fc(32, 3)), C, forward=1
    ),
    "forward_tokens": Case(
        flow(tokens_after, conv=conv(3, 2, 3), bn=bn2(2), fc=fc(2, 3)), C, forward=1
    ),
    "forward_pooled": Case(flow(pooled_after, bn=bn2(4), fc=fc(4, 3)), W4, forward=1),
    "forward_two_readers": Case(
        flow(two_readers, bn=bn2(4), q=conv(4, 3, 3), k=conv(4, 3, 3)), W4, forward=1
    ),
    "forward_other_reader": Case(
        flow(two_readers_one_other, bn=bn2(4), q=conv(4, 4, 1)), W4, affine=1
    ),
    "forward_and_back": Case(
        flow(between_two_norms, bn=bn2(4), conv=conv(4, 3, 3, bias=False), bn_out=bn2(3)),
        W4,
        fold=1,
        forward=1,
    ),
    "forward_and_back_through_views": Case(
        flow(between_two_norms_of_tokens, bn=bn1(4), fc=fc(4, 16), bn_out=bn2(4)),
        F4,
        fold=1,
        forward=1,
    ),
    "forward_dropout": Case(
        flow(dropped_after, bn=bn1(4), drop=lambda: nn.Dropout(0.5), fc=fc(4, 3)), F4, affine=1
    ),
    "forward_joined": Case(flow(joined_after, bn=bn2(4), after=conv(8, 3, 3)), W4, affine=1),
    "forward_called_twice": Case(flow(called_twice_after, bn=bn1(4), fc=fc(4, 3)), F4, affine=1),
    "forward_shared_norm": Case(
        flow(shared_norm_two_layers, bn=bn1(4), q=fc(4, 3), k=fc(4, 3)), F4, forward=1
    ),
}
