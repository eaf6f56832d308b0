"""Partial passes: a model is run only as far as the last module that is looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from normconv.numerics import evaluating

__all__ = ["Partial", "Seen", "run_until"]

Seen = Callable[[str, Tensor], None]


class _FarEnough(BaseException):
    """Every call that was waited for has been seen; no forward that catches exceptions stops it."""


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
                raise _FarEnough

        return look

    with ExitStack() as stack:
        for name in calls:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        with suppress(_FarEnough):
            model(*args, **kwargs)
    return counted


class Partial:
    """What modules of a model get on each batch, from passes that end where the last has been called.

    Args:
        model: its weights may change from pass to pass.
        places: names of modules, each with the site that its inputs are wanted for.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, str]) -> None:
        self.model, self.places = model, places
        self.calls: Mapping[str, int] = dict.fromkeys(places, 0)

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the inputs of each site, one of each call, in one pass."""
        found: dict[str, list[Tensor]] = {site: [] for site in self.places.values()}

        def seen(name: str, value: Tensor) -> None:
            # The layer after may work in place on what is kept here.
            found[self.places[name]].append(value.clone())

        self.calls = run_until(self.model, args, kwargs, self.calls, seen)
        return found
