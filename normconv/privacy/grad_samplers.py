"""Per-sample gradients of reparametrised layers in Opacus.

Opacus has a sampler for each class of plain layers: the gradient of each sample by the weight. What our
weights are computed from follows by a map that is linear and the same for every sample (see
`normconv.numerics.Pullback`), so its sampler is asked for a plain layer with the computed weight, and the
map is applied to what it gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.errors import MissingDependency
from normconv.layers import Reparametrised, on_each_class
from normconv.numerics import wide_dtype

__all__ = ["register_grad_samplers"]

Samples = dict[nn.Parameter, Tensor]


def register_grad_samplers() -> None:
    """Teach Opacus the weight-normed and weight-standardized layers, those made later too.

    Layers whose plain class Opacus has a sampler for (Linear, Conv1d, Conv2d, Conv3d, and classes
    registered with it before this call) get one of that speed, Linear layers also one for ghost clipping.
    Others, such as transposed convolutions, need none: Opacus takes them through `torch.func`.

    Call it once before `PrivacyEngine.make_private` or `GradSampleModule`; another call adds the classes
    registered since.

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
    if plain is nn.Linear:  # the closed form of its norms is that of Linear's own forward
        opacus.register_norm_sampler(made)(_norm_sample)


def _grad_sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Samples:
    assert isinstance(layer, Reparametrised)
    gain, v = (layer._parameters[name] for name in layer.computed_from)
    assert gain is not None
    assert v is not None
    plain = _plain_twin(layer, trainable=gain.requires_grad or v.requires_grad)
    sampler = _opacus().GradSampleHooks.GRAD_SAMPLERS[layer.plain_class]
    samples: Samples = sampler(plain, _padded(plain, activations), backprops)
    grads = samples.pop(plain.weight, None)
    if grads is None:
        return samples
    if not v.requires_grad:
        along = layer.pullback().along(grads)
    else:
        along, samples[v] = layer.pullback().both_(grads)
    if gain.requires_grad:
        samples[gain] = along.reshape(len(along), *gain.shape).to(grads.dtype)
    return samples


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


def _padded(plain: Any, activations: list[Tensor]) -> list[Tensor]:
    """Do what Opacus's convolutions take for granted: zero padding and contiguous inputs.

    They know no other padding mode and unfold by strides, both without a word; so padding of another
    mode is done here, as the layer does it, and the plain layer then pads nothing.
    """
    first = activations[0]
    if getattr(plain, "padding_mode", "zeros") != "zeros":
        first = F.pad(first, plain._reversed_padding_repeated_twice, mode=plain.padding_mode)
        plain.__dict__.update(padding=(0,) * len(plain.kernel_size), padding_mode="zeros")
    return [first.contiguous(), *activations[1:]]


def _norm_sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Samples:
    """Norms of the per-sample gradients of a Linear, (N,) each, without the gradients themselves."""
    assert isinstance(layer, Reparametrised)
    gain, v = (layer._parameters[name] for name in layer.computed_from)
    bias = layer._parameters.get("bias")
    wide = wide_dtype(backprops.dtype)
    places = backprops.to(wide).reshape(len(backprops), -1, backprops.shape[-1])
    samples: Samples = {}
    if bias is not None and bias.requires_grad:
        samples[bias] = torch.linalg.vector_norm(places.sum(1), dim=-1)
    wanted = [p for p in (gain, v) if p is not None and p.requires_grad]
    if wanted:
        inputs = activations[0].to(wide)
        inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        squares = layer.pullback().squares(places, inputs)
        for parameter, square in zip((gain, v), squares, strict=True):
            if parameter is not None and parameter.requires_grad:
                samples[parameter] = square.sqrt()
    return samples
