"""Which parameters of a model are weights with rows, and what an optimizer cannot do with one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normconv.errors import Problem, UsageError
from normconv.layers import row_layouts
from normconv.numerics import RowLayout
from normconv.training.optimizers.shards import why_cut

__all__ = ["NamedLayout", "layouts_of", "unfit"]

NamedLayout = tuple[str, RowLayout]


def layouts_of(model: nn.Module) -> dict[Tensor, NamedLayout]:
    """Return the plain weights of linear, convolutional, recurrent and attention layers.

    A table of embeddings is none: a step changes the few rows that were looked up.

    Raises:
        UsageError: two layers share a weight and have its rows along different axes.

    >>> net = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 3), nn.ConvTranspose1d(3, 2, 1))
    >>> [name for name, _ in layouts_of(net).values()]
    ['1.weight_ih_l0', '1.weight_hh_l0', '2.weight']
    """
    found: dict[Tensor, NamedLayout] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Embedding):
            continue
        for name, layout in row_layouts(layer).items():
            weight = layer._parameters.get(name)
            full = f"{path}.{name}".lstrip(".")
            if weight is None:  # computed from other parameters, which are stepped as they are
                continue
            first, known = found.setdefault(weight, (full, layout))
            if known != layout:
                what = f"is the same parameter as {first}, whose rows are along another axis"
                way_out = 'put it in a group with "form": "plain"'
                raise UsageError(Problem(full, what, way_out))
    return found


def unfit(weight: Tensor, layout: RowLayout, form: str) -> str:
    """Say why a weight cannot be stepped by rows; empty where it can.

    >>> import torch
    >>> unfit(torch.empty(3, 1), RowLayout(), "ws")
    'its filters have one element each: without its mean a filter is 0'
    """
    if is_lazy(weight):
        return "it is lazy and has no shape yet: call the model once first"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"it is {str(weight.dtype).removeprefix('torch.')}, which holds no product"
    if reason := why_cut(weight, layout):
        return reason
    if weight.numel() == 0:
        return "it has no elements"
    if form == "ws" and weight.numel() == layout.channels(weight):
        return "its filters have one element each: without its mean a filter is 0"
    return ""
