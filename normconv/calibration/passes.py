"""Partial passes: a model is run only as far as the last module that is looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normconv.calibration.replay import Replay
from normconv.numerics import evaluating

__all__ = ["FarEnough", "Partial", "Seen", "run_hooked", "run_until"]

Seen = Callable[[str, Tensor], None]


class FarEnough(BaseException):
    """Raised by a hook when it has seen all; no forward that catches exceptions stops it."""


def run_hooked(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    handles: Iterable[RemovableHandle],
) -> None:
    """Run a model in eval mode to its end or until a hook raises `FarEnough`, then take the hooks off.

    Args:
        model: not changed.
        args: positional inputs.
        kwargs: keyword inputs.
        handles: of the hooks.
    """
    try:
        with evaluating(model), suppress(FarEnough):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def run_until(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    calls: Mapping[str, int],
    seen: Seen,
) -> Counter[str]:
    """Run a model in eval mode until modules were called as often as they are going to be.

    Args:
        model: not changed.
        args: positional inputs.
        kwargs: keyword inputs.
        calls: how often each named module is called in a forward; 0 for "run to the end".
        seen: gets the name and the first input of each of those calls.

    Returns:
        How often each was called.

    >>> import torch
    >>> net, got = nn.Sequential(nn.ReLU(), nn.Linear(2, 1)), []
    >>> run_until(net, (torch.ones(1, 2),), {}, {"0": 1}, lambda name, x: got.append((name, x.shape)))
    Counter({'0': 1})
    >>> got
    [('0', torch.Size([1, 2]))]
    """
    counted: Counter[str] = Counter()
    left = sum(calls.values()) if all(calls.values()) else -1

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal left
            values = (*inputs, *named.values())
            seen(name, values[0].detach())
            counted[name] += 1
            left -= 1
            if left == 0:
                raise FarEnough

        return look

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in calls
    ]
    run_hooked(model, args, kwargs, handles)
    return counted


class Partial:
    """What modules of a model get on each batch, from passes that end where the last has been called.

    Args:
        replay: the model.
        places: names of modules, each with the site that its inputs are wanted for.
        moving: modules whose weights change from pass to pass, or that are looked at later.
    """

    def __init__(self, replay: Replay, places: Mapping[str, str], moving: Set[nn.Module]) -> None:
        self.replay, self.places, self.moving = replay, places, moving

    def inputs(
        self, batch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, list[Tensor]]:
        """Return the inputs of each site on a batch, one of each call, in one pass."""
        found: dict[str, list[Tensor]] = {site: [] for site in self.places.values()}

        def seen(name: str, value: Tensor) -> None:
            # The layer after may work in place on what is kept here.
            found[self.places[name]].append(value.clone())

        model, counted = self.replay.model, self.replay.calls(args, kwargs)
        calls = {name: counted[model.get_submodule(name)] for name in self.places}
        with self.replay.passing(batch, (args, kwargs), self.moving):
            run_until(model, args, kwargs, calls, seen)
        return found
