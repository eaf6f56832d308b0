"""Tensors under `torch.nn.utils.parametrize`: torch's own parametrizations and any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm

from normconv.folding.formulas import is_another, normed, nudged, spectrally_normed, wide
from normconv.folding.placing import Folded, Left, Made, Outcome, place_, plain_weight, rounded
from normconv.layers import copy_model

__all__ = ["fold_parametrizations_"]

_NAMES: dict[type, str] = {
    _WeightNorm: "torch weight_norm",
    _SpectralNorm: "torch spectral_norm",
    _Orthogonal: "torch orthogonal",
}


def fold_parametrizations_(
    module: nn.Module, made: Made, exact: dict[str, Tensor]
) -> Iterator[Outcome]:
    """Replace parametrized tensors by their plain eval values, in place.

    A chain of parametrizations is evaluated on a copy in eval mode and in float64, or in its own dtype
    where it does not run in float64. One that fails, or that gives another value each time, is left.

    Args:
        module: changed.
        made: plain weights so far; extended.
        exact: takes the wide values of the tensors that were folded.
    """
    if not parametrize.is_parametrized(module):
        return
    lists: Any = module.parametrizations
    for name, chain in list(lists.items()):
        try:
            wide_value, like, reason = _value(chain)
        except Exception as error:  # a parametrization is the user's code
            line = (str(error).splitlines() or [type(error).__name__])[0]
            yield Left(f"its parametrization of {name} by {_title(chain)} is left: {line}")
            continue
        exact[name] = wide_value
        value = rounded(wide_value, like, like.dtype)
        _take_off_(module, name)
        if any(n.startswith("original") for n in chain._buffers):
            module.register_buffer(name, value)
        else:
            trainable = any(part.requires_grad for part in chain.parameters())
            weight = plain_weight(value, _originals(chain), made, trainable=trainable)
            place_(module, (), name, weight)
        yield Folded(f"{_title(chain)} (parametrization)", reason)


def _title(chain: Any) -> str:
    return " + ".join(_NAMES.get(type(part), type(part).__name__) for part in chain)


def _originals(chain: Any) -> list[Tensor]:
    if chain.is_tensor:
        return [chain.original]
    return [getattr(chain, f"original{at}") for at in range(chain.ntensors)]


class _Unsteady(Exception):
    """A parametrization without one value."""


def _value(chain: Any) -> tuple[Tensor, Tensor, str]:
    """The wide value, a tensor of the dtype and layout to round to, and what is to be said."""
    if len(chain) == 1 and isinstance(chain[0], _WeightNorm):
        value, reason = normed(chain.original0, chain.original1, chain[0].dim)
        return value, chain.original1, reason
    # Evaluated on copies: a forward may write into buffers, as spectral norm does in training mode.
    copies = [copy_model(chain).eval() for _ in range(2)]
    originals = [tensor.detach() for tensor in _originals(chain)]
    own: Tensor | None
    try:
        own, _ = _run(copies[0], originals)
    except Exception:  # linear algebra has no half precision
        own = None
    copied = copies[1].double()
    try:
        given = [wide(tensor) for tensor in originals]
        value, reason = _run(copied, given)
        again, _ = _run(copied, given)
    except Exception:
        if own is None:
            raise
        value, reason = own, ""
        again, _ = _run(copies[0], originals)
    if not value.is_meta:
        if not torch.equal(value, again) and not bool(value.isnan().any()):
            raise _Unsteady("its value changes from call to call")
        if not bool(value.isfinite().all()):
            raise _Unsteady("its value is not finite")
    if own is not None and _asks_for_dtype(own, value, copied, originals):
        said = f"computed in {str(own.dtype)[6:]}: in float64 it is another weight"
        value, reason = wide(own), ", ".join(filter(None, (reason, said)))
    like = own if own is not None else originals[-1]
    same = (tensor for tensor in originals if tensor.shape == value.shape)
    return value, next(same, like).to(like.dtype), reason


def _asks_for_dtype(own: Tensor, value: Tensor, copied: Any, originals: list[Tensor]) -> bool:
    """Whether a chain computes another formula in float64 than in its own dtype."""
    given = [nudged(tensor, own.dtype) for tensor in originals]
    try:
        moved, _ = _run(copied, given)
    except Exception:  # it takes only numbers of a certain kind
        moved = value
    return is_another(own, value, moved, own.dtype)


@torch.no_grad()
def _run(chain: Any, originals: list[Tensor]) -> tuple[Tensor, str]:
    given, reasons = originals, []
    for part in chain:
        if isinstance(part, _WeightNorm):
            value, reason = normed(given[0], given[1], part.dim)
            value = value.to(given[1].dtype)
        elif isinstance(part, _SpectralNorm) and given[0].dim() > 1:
            value, reason = spectrally_normed(given[0], part._u, part._v, part.dim)
            value = value.to(given[0].dtype)
        else:
            value, reason = part(*given), ""
        given = [value]
        reasons.append(reason)
    return given[0], ", ".join(filter(None, reasons))


def _take_off_(module: nn.Module, name: str) -> None:
    """Undo what torch did to the module, without its removal: that evaluates, and writes in place."""
    made: Any = type(module)
    lists: Any = module.parametrizations
    del lists[name]
    if len(lists):
        # torch makes one class per layer and deepcopy shares it: the layer copied from keeps its own.
        rest = {n: v for n, v in vars(made).items() if n not in (name, "__dict__", "__weakref__")}
        module.__class__ = type(made.__name__, made.__bases__, rest)
        return
    del module.parametrizations
    module.__class__ = made.__bases__[0]
    # Weight norm leaves behind a local function, with which no module can be pickled.
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        inner = getattr(hook, "hook", hook)
        if "_weight_norm_compat_hook" in getattr(inner, "__qualname__", ""):
            del hooks[key]
