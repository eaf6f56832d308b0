"""Weights that torch's forward pre-hooks compute: weight norm, spectral norm, pruning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from normconv.folding.formulas import normed, spectrally_normed, wide
from normconv.folding.placing import Folded, Left, Made, Outcome, place_, plain_weight, rounded
from normconv.layers import row_layouts

__all__ = ["fold_hooks_"]


def fold_hooks_(module: nn.Module, made: Made, exact: dict[str, Tensor]) -> Iterator[Outcome]:
    """Replace the tensors that hooks compute by their plain eval values, in place.

    A tensor that another hook computes from is folded first. The state of the hooks is read and never
    advanced: no power iteration.

    Args:
        module: changed.
        made: plain weights so far; extended.
        exact: wide values of this module's tensors that were folded before; extended.
    """
    pending = {key: hook for key, hook in module._forward_pre_hooks.items() if _parts(hook)}
    while pending:
        targets = {_target(hook) for hook in pending.values()}
        key, hook = next(
            (key, hook) for key, hook in pending.items() if not targets.intersection(_parts(hook))
        )
        del pending[key]
        kept = [n for n in _parts(hook) if n not in {**module._parameters, **module._buffers}]
        if kept:
            yield Left(
                f"its {_target(hook)} is computed from {', '.join(kept)}, which is not plain"
            )
            continue
        yield _fold_(module, key, hook, made, exact)
    yield from _unknown(module)


def _target(hook: Any) -> str:
    name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
    return name


def _parts(hook: object) -> tuple[str, ...]:
    """What a hook computes from; nothing for a hook of another kind."""
    if isinstance(hook, WeightNorm):
        return f"{hook.name}_g", f"{hook.name}_v"
    if isinstance(hook, SpectralNorm):
        return f"{hook.name}_orig", f"{hook.name}_u", f"{hook.name}_v"
    if isinstance(hook, BasePruningMethod):
        return f"{_target(hook)}_orig", f"{_target(hook)}_mask"
    return ()


def _fold_(module: nn.Module, key: int, hook: Any, made: Made, exact: dict[str, Tensor]) -> Folded:
    names, name = _parts(hook), _target(hook)
    parts = [getattr(module, part) for part in names]
    given = [exact.get(n, part.detach()) for n, part in zip(names, parts, strict=True)]
    value, folded = _value(hook, given)
    exact[name] = value
    like = parts[1] if isinstance(hook, WeightNorm) else parts[0]
    trainable = any(part.requires_grad for part in parts)
    weight = plain_weight(rounded(value, like), parts, made, trainable=trainable)
    del module._forward_pre_hooks[key]
    module._forward_pre_hooks_with_kwargs.pop(key, None)
    _drop_state_hooks_(module, hook)
    place_(module, names, name, weight)
    return folded


def _value(hook: Any, parts: list[Tensor]) -> tuple[Tensor, Folded]:
    """The wide value, and what to report."""
    if isinstance(hook, WeightNorm):
        g, v = parts
        value, reason = normed(g, v, hook.dim)
        return value, Folded("torch weight_norm (hook)", reason)
    if isinstance(hook, SpectralNorm):
        weight, u, v = parts
        value, reason = spectrally_normed(weight, u, v, hook.dim)
        return value, Folded("torch spectral_norm (hook)", reason)
    original, mask = parts
    return wide(original) * mask, Folded("torch pruning (hook)")


def _drop_state_hooks_(module: nn.Module, pre_hook: object) -> None:
    """Spectral norm reads and writes state dicts of its own form."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            # Loading hooks come wrapped.
            if getattr(getattr(hook, "hook", hook), "fn", None) is pre_hook:
                del hooks[key]


def _unknown(module: nn.Module) -> Iterator[Left]:
    """Tensors that stand in place of parameters: something computes them that is not known here."""
    own = [n for n, value in module.__dict__.items() if isinstance(value, Tensor)]
    known = row_layouts(module)
    hooks = ", ".join(sorted({_name(hook) for hook in module._forward_pre_hooks.values()}))
    for name in own:
        parts = [n for n in module._parameters if n.startswith(f"{name}_")]
        if name in known or (hooks and parts):
            by = f"by a forward pre-hook ({hooks})" if hooks else "by something unknown"
            of = f" from {', '.join(parts)}" if parts else ""
            yield Left(f"its {name} is no parameter: it is computed{of} {by}")


def _name(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
