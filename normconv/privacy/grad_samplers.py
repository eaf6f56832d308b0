"""Per-sample gradients of reparametrised layers in Opacus.

What our weights are computed from follows from each sample's gradient by the weight through a map that is
linear and the same for every sample (see `normconv.numerics.Pullback`). For torch's own Linear and
convolutions that gradient is a product over the places of a sample; its norm, for ghost clipping, needs
no gradient where places are few. For other classes that Opacus knows, their sampler is given a plain
layer with the computed weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.errors import MissingDependency
from normconv.layers import Reparametrised, on_each_class
from normconv.numerics import wide_dtype
from normconv.privacy.validators import refuse_batch_norms

__all__ = ["register_grad_samplers"]

Samples = dict[nn.Parameter, Tensor]

_TORCHS_OWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def register_grad_samplers() -> None:
    """Teach Opacus the weight-normed and weight-standardized layers, those made later too.

    Linear, Conv1d, Conv2d and Conv3d get samplers of gradients and, for ghost clipping, of norms; classes
    registered with Opacus before this call get one of gradients. Others, such as transposed convolutions,
    need none: Opacus takes them through `torch.func`.

    Call it once before `PrivacyEngine.make_private` or `GradSampleModule`; another call adds the classes
    registered since.

    From then on Opacus's `ModuleValidator` also refuses `MeanOnlyBatchNorm` and every class made from
    BatchNorm, of which it knows torch's own: through them samples see each other.

    Raises:
        MissingDependency: Opacus is not installed.

    Source: Salimans & Kingma 2016, equation 3, taken sample by sample.

    >>> from opacus.grad_sample import GradSampleModule
    >>> from normconv.layers import weight_norm_
    >>> register_grad_samplers()
    >>> model = GradSampleModule(nn.Sequential(weight_norm_(nn.Linear(3, 2))))
    >>> model(torch.ones(5, 3, requires_grad=True)).sum().backward()
    >>> {name: tuple(p.grad_sample.shape) for name, p in model.named_parameters()}
    {'_module.0.weight_g': (5, 2, 1), '_module.0.weight_v': (5, 2, 3), '_module.0.bias': (5, 2)}
    """
    _opacus()
    on_each_class(_register)
    refuse_batch_norms()


def _opacus() -> Any:
    try:
        from opacus import grad_sample
    except ImportError:
        raise MissingDependency.needs("Opacus", "privacy") from None
    return grad_sample


def _register(made: type[nn.Module]) -> None:
    assert issubclass(made, Reparametrised)
    opacus, plain = _opacus(), made.plain_class
    if plain in opacus.GradSampleHooks.GRAD_SAMPLERS:
        opacus.register_grad_sampler(made)(_grad_sample)
    if plain in _TORCHS_OWN:  # exactly: another class may have another forward
        opacus.register_norm_sampler(made)(_norm_sample)


def _grad_sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Samples:
    """Gradients of each sample by gain, v and bias, (N, *shape)."""
    assert isinstance(layer, Reparametrised)
    gain, v = _gain_and_v(layer)
    samples: Samples = {}
    trainable = gain.requires_grad or v.requires_grad
    if layer.plain_class in _TORCHS_OWN:
        outer, inner = _places(layer, activations[0].to(backprops.dtype), backprops)
        bias = layer._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            samples[bias] = outer.sum(-1).flatten(1)
        if not trainable:
            return samples
        along, across = layer.pullback().of_places(outer, inner)
    else:
        plain = _plain_twin(layer, trainable=trainable)
        sampler = _opacus().GradSampleHooks.GRAD_SAMPLERS[layer.plain_class]
        samples = sampler(plain, activations, backprops)
        if not trainable:
            return samples
        along, across = layer.pullback().both_(samples.pop(plain.weight))
    if gain.requires_grad:
        samples[gain] = along.reshape(len(along), *gain.shape).to(backprops.dtype)
    if v.requires_grad:
        samples[v] = across.reshape(len(across), *v.shape)
    return samples


def _gain_and_v(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    gain, v = (layer._parameters[name] for name in layer.computed_from)
    return gain, v


def _plain_twin(layer: nn.Module, *, trainable: bool) -> Any:
    """Return a layer of exactly the plain class, which Opacus decides by, with the computed weight."""
    assert isinstance(layer, Reparametrised)
    assert isinstance(layer, nn.Module)
    plain: Any = layer.plain_class.__new__(layer.plain_class)
    plain.__dict__.update(layer.__dict__)
    weight: Any = layer.weight
    parameters = {k: p for k, p in layer._parameters.items() if k not in layer.computed_from}
    parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=trainable)
    plain.__dict__["_parameters"] = parameters
    return plain


def _norm_sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Samples:
    """Norms of the per-sample gradients of a Linear or convolution, (N,) each."""
    assert isinstance(layer, Reparametrised)
    bias, wide = layer._parameters.get("bias"), wide_dtype(backprops.dtype)
    outer, inner = _places(layer, activations[0].to(wide), backprops.to(wide))
    samples: Samples = {}
    if bias is not None and bias.requires_grad:
        samples[bias] = torch.linalg.vector_norm(outer.sum(-1), dim=(1, 2))
    wanted = _gain_and_v(layer)
    if any(parameter.requires_grad for parameter in wanted):
        squares = layer.pullback().squares(outer, inner)
        for parameter, square in zip(wanted, squares, strict=True):
            if parameter.requires_grad:
                samples[parameter] = square.sqrt()
    return samples


def _places(layer: Any, inputs: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the outputs and the inputs they come from, place by place.

    Both are (N, groups, *, T); the gradient of a sample by the weight is the product over the places.
    """
    if layer.plain_class is nn.Linear:
        places = math.prod(inputs.shape[1:-1])
        outer, inner = (t.reshape(len(t), 1, places, t.shape[-1]).mT for t in (backprops, inputs))
        return outer, inner
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    kernel = layer.kernel_size
    for axis, (size, step, apart) in enumerate(
        zip(kernel, layer.stride, layer.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    # (N, I, *places, *K), with the places last
    rank, groups, places = len(kernel), layer.groups, math.prod(backprops.shape[2:])
    windows = windows.movedim(tuple(range(2, 2 + rank)), tuple(range(-rank, 0)))
    across = math.prod(kernel) * layer.in_channels // groups
    return (
        backprops.reshape(len(inputs), groups, layer.out_channels // groups, places),
        windows.reshape(len(inputs), groups, across, places),
    )
