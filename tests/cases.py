"""What a case of the model zoo is: a tiny model, its inputs, and what each target must do with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normconv.targets import TARGETS

__all__ = ["EXACT", "Case", "x"]

# The targets that keep the function, in training mode as well but for what a batch tells.
EXACT = tuple(kind for kind in TARGETS if kind.fidelity == "exact" and not kind.couples)


def x(*shape: int, seed: int = 0) -> Tensor:
    """A random input, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Case:
    """One model.

    Args:
        factory: makes it; weights are random under the global seed, the structure is always the same.
        args: positional example inputs in float32, batch first, batch of at least 2.
        kwargs: keyword example inputs.
        fold: sites that `wn` and `plain` fold.
        forward: sites that they fold forward.
        affine: sites that they leave as an affine map.
        drop: sites whose slot is emptied.
        refused: a word of the reason, where every target refuses.
        plan: more options of `make_plan`.
        dtype: of the model and its floating inputs.
        after: changes values once the norms are randomised.
        captures: the captures that must succeed on it.
        pickles: whether the original can be pickled at all.
        no_grad_of: parameters of the result that the training loss does not reach.
        graph: convert what `to_graph` makes of it.
        couples: its samples see each other by its own doing (not by a norm).
        float64: whether the model runs in float64 when it is cast to it.
    """

    factory: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fold: int = 0
    forward: int = 0
    affine: int = 0
    drop: int = 0
    refused: str = ""
    plan: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    after: Callable[[nn.Module], None] | None = None
    captures: tuple[str, ...] = ("fx", "export", "hooks")
    pickles: bool = True
    no_grad_of: tuple[str, ...] = ()
    graph: bool = False
    couples: bool = False
    float64: bool = True

    @property
    def converts(self) -> bool:
        """Whether the targets take it."""
        return not self.refused

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its inputs, fresh, in its own dtype or another."""
        wanted = self.dtype if dtype is None and self.dtype != torch.float32 else dtype
        return _cast(self.args, wanted), _cast(dict(self.kwargs), wanted)

    def build(self, seed: int = 0) -> nn.Module:
        """Make the model in its dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.factory()
            return model if self.dtype == torch.float32 else model.to(self.dtype)

    def counts(self, target: str) -> dict[str, int]:
        """How many sites get which action."""
        wanted = {"fold": self.fold, "forward": self.forward, "affine": self.affine}
        if target == "frozen":
            wanted = {"frozen": sum(wanted.values())}
        return {action: n for action, n in {**wanted, "drop": self.drop}.items() if n}


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return {name: _cast(item, dtype) for name, item in value.items()}
