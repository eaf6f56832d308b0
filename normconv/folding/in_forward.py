"""Layers whose own `forward` computes their weight, as standardized convolutions do.

No such class is known here by its name. The layer is run in float64 while the operator that it calls is
watched: what that is given as weight is the weight. The layer becomes its plain base class with that
weight only if the outputs are the same then. A forward that asks for the dtype (an eps of 1e-5 in
float32, of 1e-3 otherwise) computes another weight in float64; it is then taken as the layer computes it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from normconv.folding.formulas import is_another, nudged
from normconv.folding.placing import Folded, Left, Made, Outcome, plain_weight, rounded
from normconv.layers import copy_model
from normconv.layers.operators import OPERATORS, row_layouts

__all__ = ["fold_forward"]

_CALLS = (
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_SAME = 1e-12  # of float64 outputs that differ in the order of a sum


def fold_forward(
    module: nn.Module, made: Made, *, replaceable: bool
) -> tuple[nn.Module, Outcome | None]:
    """Return the plain layer that a layer with a `forward` of its own computes, and what it was.

    The layer itself is changed in place and returned, unless it pads its input by a submodule: that and
    the plain layer are returned in a Sequential then, where the layer is `replaceable`. Without an
    outcome nothing was computed.
    """
    plain_class = _plain_class(module)
    if plain_class is None or not _readable(module):
        return module, None
    seen = _watch(module)
    if seen is None or isinstance(seen, Left):
        return module, seen
    kind = type(module).__name__
    for form in _forms(seen.layer, plain_class):
        if form.pad and not replaceable:
            continue
        if all(_same(seen, form, x, y) for x, y in seen.runs):
            found, reason = _as_computed(module, seen)
            return _become_(module, form, found, made), Folded(f"{kind} (forward)", reason)
    what = (
        f"the forward of {type(module).__name__} computes a weight and does more than its operator"
    )
    return module, Left(what, "fold it with its own code")


class _Seen(NamedTuple):
    """A layer run alone.

    Args:
        layer: a float64 copy in eval mode.
        weight: what its operator was given.
        bias: likewise.
        runs: inputs and outputs.
        lost: where the layer itself computes NaN, and other numbers stood for the runs.
    """

    layer: nn.Module
    weight: Tensor
    bias: Tensor | None
    runs: tuple[tuple[Tensor, Tensor], ...]
    lost: Tensor | None = None


class _Form(NamedTuple):
    """What a layer may become: a class, and the child that pads its input."""

    layer_class: type[nn.Module]
    pad: str = ""


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The nearest class above the layer's with torch's own forward; None where that is its own."""
    family: Any = next((family for family in OPERATORS if isinstance(module, family)), None)
    if family is None:
        return None
    for kind in type(module).__mro__:
        if all(getattr(kind, n, None) is getattr(family, n, None) for n in _METHODS):
            return None if kind is type(module) else kind
    return None


_METHODS = ("forward", "_conv_forward")


def _readable(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and not is_lazy(weight)
        and weight.is_floating_point()
        and type(weight) is nn.Parameter
        and weight.numel() > 0
        and "forward" not in module.__dict__
    )


class _Watched(TorchFunctionMode):
    """Notes what the operators of layers are given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: Mapping[str, Any] = kwargs or {}
        if func in _CALLS:
            weight = args[1] if len(args) > 1 else named.get("weight")
            self.given.append((weight, args[2] if len(args) > 2 else named.get("bias")))
        return func(*args, **named)


@torch.no_grad()
def _watch(module: nn.Module) -> _Seen | Left | None:
    """Run a layer twice on one input and once on others; None where no weight is computed."""
    try:
        layer = _alone(module).double()
        inputs = list(_inputs(layer))
        lost = _fill_lost_(layer, inputs[0])
        runs, given = [], []
        for x in (inputs[0], *inputs):
            with _Watched() as watched:
                runs.append((x, layer.forward(x)))
            given.append(watched.given)
    except Exception:  # it takes other inputs, or cannot run in float64: nothing can be told
        return None
    own: Any = layer.weight
    if any(len(calls) != 1 or not isinstance(calls[0][0], Tensor) for calls in given):
        if all(any(weight is own for weight, _ in calls) for calls in given):
            return None
        what = f"the forward of {type(module).__name__} does not give its weight to one operator"
        return Left(f"{what}: whether it computes one is not known", "fold it with its own code")
    (first, bias), (second, _), *others = (calls[0] for calls in given)
    if first is own or (first.shape == own.shape and torch.equal(first, own)):
        return None
    computed = f"the weight that the forward of {type(module).__name__} computes"
    if bool(first.isnan().any()):
        return Left(f"{computed} is NaN")
    if not torch.equal(first, second):
        return Left(f"{computed} changes from call to call")
    if not all(torch.equal(first, other) for other, _ in others):
        return None  # a function of the input, not of parameters
    return _Seen(layer, first, bias, tuple(runs[1:]), lost)


def _fill_lost_(layer: Any, x: Tensor) -> Tensor | None:
    """Draw numbers, in place, where the computed weight is NaN, as 0 / 0 is; return where.

    None where there is none, or where the other rows are not the same afterwards.
    """
    with _Watched() as watched:
        layer.forward(x)
    weight = watched.given[0][0] if len(watched.given) == 1 else None
    own: Tensor = layer.weight
    if not isinstance(weight, Tensor) or weight.shape != own.shape or weight is own:
        return None
    lost = weight.isnan()
    if not bool(lost.any()):
        return None
    before, generator = own.clone(), torch.Generator().manual_seed(0)
    own[lost] = torch.randn(int(lost.sum()), generator=generator, dtype=own.dtype).to(own.device)
    with _Watched() as watched:
        layer.forward(x)
    (again, _), *_ = watched.given
    if not bool(again.isnan().any()) and torch.equal(again[~lost], weight[~lost]):
        return lost
    own.copy_(before)
    return None


@torch.no_grad()
def _as_computed(module: nn.Module, seen: _Seen) -> tuple[_Seen, str]:
    """Put the weight as the layer computes it in its own dtype where that is another formula's.

    Rows that the layer computes as NaN become 0. Returns what is to be said, too.
    """
    reasons = []
    layer: Any = seen.layer
    own: Any = module
    lost = seen.lost
    if lost is not None:
        seen = seen._replace(weight=seen.weight.masked_fill(lost, 0))
        rows = row_layouts(module)["weight"].channels(seen.weight)
        count = int(lost.sum()) * rows // seen.weight.numel()
        reasons.append(f"{count} rows without direction became 0")
    if own.weight.is_meta or own.weight.dtype == torch.float64:
        return seen, ", ".join(reasons)
    x = seen.runs[0][0]
    try:
        with _Watched() as narrow:
            _alone(module).forward(x.to(own.weight.dtype))
        layer.weight.copy_(nudged(layer.weight, own.weight.dtype))
        with _Watched() as moved:
            layer.forward(x)
        (weight, bias), (other, _) = narrow.given[0], moved.given[0]
        weight = weight if lost is None else weight.masked_fill(lost, 0)
    except Exception:  # not every operator is there in half precision
        return seen, ", ".join(reasons)
    if is_another(weight, seen.weight, other, own.weight.dtype):
        reasons.append(f"computed in {str(own.weight.dtype)[6:]}: in float64 it is another weight")
        seen = seen._replace(weight=weight, bias=bias if seen.bias is not layer.bias else seen.bias)
    return seen, ", ".join(reasons)


def _alone(module: nn.Module) -> nn.Module:
    """A copy in eval mode without hooks; a layer without storage gets random numbers."""
    bare: Any = object.__new__(type(module))
    bare.__dict__.update(vars(module))
    # Without hooks, which may lead back to the whole model.
    hooks = {n: v for n, v in nn.Module().__dict__.items() if "hook" in n}
    bare.__dict__.update(hooks)
    layer: Any = copy_model(bare)
    if any(tensor.is_meta for tensor in layer.parameters()):
        generator = torch.Generator().manual_seed(0)
        layer = layer.to_empty(device="cpu")
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.detach().normal_(generator=generator)
    copied: nn.Module = layer.eval()
    return copied


def _inputs(layer: Any) -> Iterator[Tensor]:
    """Inputs of two sizes: a padding that depends on the size shows."""
    generator = torch.Generator().manual_seed(0)
    device = layer.weight.device
    for more in (0, 1):
        if isinstance(layer, nn.Linear):
            shape: tuple[int, ...] = (3, layer.in_features)
        else:
            sizes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
            shape = (1, layer.in_channels, *(d * (k - 1) + 1 + 2 * s + more for k, s, d in sizes))
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        yield x
    yield x * 1e6  # a bound on inputs or outputs shows


def _forms(layer: nn.Module, plain_class: type[nn.Module]) -> Iterator[_Form]:
    yield _Form(plain_class)
    if any(kind.__module__.partition(".")[0] == "timm" for kind in type(layer).__mro__):
        yield _Form(sys.modules["timm.layers"].Conv2dSame)
    for name, child in layer.named_children():
        if not list(child.parameters()):
            yield _Form(plain_class, name)


@torch.no_grad()
def _same(seen: _Seen, form: _Form, x: Tensor, expected: Tensor) -> bool:
    layer: Any = seen.layer
    shell: Any = object.__new__(form.layer_class)
    bias = layer.bias if seen.bias is None else seen.bias
    shell.__dict__.update(vars(layer))
    shell.__dict__.update(_parameters={}, _buffers={}, _modules={}, weight=seen.weight, bias=bias)
    try:
        got = shell.forward(layer.get_submodule(form.pad)(x) if form.pad else x)
    except Exception:  # a form that does not fit
        return False
    if not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= _SAME * (1 + expected.abs().max()))


def _become_(module: Any, form: _Form, seen: _Seen, made: Made) -> nn.Module:
    own: nn.Parameter = module.weight
    bias: nn.Parameter | None = module._parameters.get("bias")
    sources = [p for p in module.parameters() if p is not bias]
    pad = module.get_submodule(form.pad) if form.pad else None
    trainable = any(source.requires_grad for source in sources)
    value = _like(seen.weight, own)
    weight = plain_weight(value, sources, made, trainable=trainable)
    layer: Any = seen.layer
    if seen.bias is not None and seen.bias is not layer.bias:
        trains = trainable if bias is None else bias.requires_grad
        bias = nn.Parameter(_like(seen.bias, own if bias is None else bias), requires_grad=trains)
    module._modules.clear()
    module._buffers.clear()
    module._parameters.clear()
    module._parameters.update(weight=weight, bias=bias)
    module.__class__ = form.layer_class
    if pad is None:
        return module  # type: ignore[no-any-return]
    both = nn.Sequential(OrderedDict(pad=pad, conv=module))
    both.training = module.training
    return both


def _like(value: Tensor, own: Tensor) -> Tensor:
    if own.is_meta:
        return torch.empty(value.shape, dtype=own.dtype, device="meta")
    return rounded(value, own)
