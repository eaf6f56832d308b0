"""What the right outputs are: the reference in float64, or its own run where that cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normconv.deploy.compare import Reference
from normconv.deploy.runners import Runner
from normconv.errors import NormconvError
from normconv.numerics.error import relative_l2
from normconv.report import Check

__all__ = ["SIGHT", "Truth"]

#: Two inputs must move the output by this much (rel-L2), or an equal output proves little.
SIGHT = 1e-2

_SEED = 0

Batch = tuple[tuple[Any, ...], dict[str, Any]]


class Truth:
    """The reference, and its float64 run where it has one."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.subject = runner.subject
        self._exact = runner.exact()

    @property
    def kind(self) -> str:
        """How the truth was computed."""
        if self._exact is not None:
            return "float64 run"
        return "own dtype; the bound is its response to a change of one rounding step"

    def repeats(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Check:
        """Check that the reference, run twice under one seed, gives the same twice."""
        first, second = self.runner.run(args, kwargs), self.runner.run(args, kwargs)
        differing = [
            name
            for name, value in first.items()
            if name not in second or not torch.equal(_plain(value), _plain(second[name]))
        ]
        detail = (
            f"{self.subject} differs from itself in {', '.join(differing)}, in eval mode under one "
            "seed"
            if differing
            else "two runs under one seed give the same"
        )
        way_out = "take its source of randomness out, or feed it as an input" if differing else ""
        return Check("reference repeats", not differing, detail=detail, way_out=way_out)

    def on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reference:
        """Return the right outputs for one batch."""
        native = self.runner.run(args, kwargs)
        exact = self._exact_run(args, kwargs, native)
        if exact is not None:
            return Reference(exact, native)
        nudged = self.runner.run(*_nudged(args, dict(kwargs)))
        response = {name: relative_l2(nudged[name], value) for name, value in native.items()}
        return Reference(native, native, response)

    def sight(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, float], tuple[str, ...]]:
        """Measure how much another input moves the outputs.

        Returns:
            rel-L2 by output, and a note for each output that hardly moves.
        """
        try:
            here = self.runner.run(args, kwargs)
            there = self.runner.run(*_other_inputs(args, kwargs))
            moves = {
                name: relative_l2(there[name], value)
                for name, value in here.items()
                if value.is_floating_point()
            }
        except (RuntimeError, ValueError, IndexError, KeyError, NormconvError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return {}, (f"how much the outputs depend on the input: unknown ({line})",)
        notes = tuple(
            f"the check is nearly blind: another input moves {name} by {move:.1e} only"
            for name, move in moves.items()
            if not move >= SIGHT
        )
        return moves, notes

    def _exact_run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], native: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        if self._exact is None:
            return None
        try:
            exact = self._exact.run(args, kwargs)
        except (RuntimeError, AssertionError, TypeError, ValueError):
            exact = {}
        finer = [
            exact[name].dtype == torch.float64
            for name, value in native.items()
            if value.is_floating_point() and name in exact
        ]
        if exact and all(finer):
            return exact
        self._exact = None
        return None


def _other_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Return inputs of the same shapes and moments: noise for floats, the rest in flipped order."""
    generator = torch.Generator().manual_seed(_SEED)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or not leaf.numel():
            return leaf
        if not leaf.is_floating_point():
            return leaf.flip(-1)
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        spread = leaf.std(correction=0)
        return noise * (spread if spread > 0 else torch.ones_like(spread)) + leaf.mean()

    other_args, other_kwargs = pytree.tree_map(other, (args, kwargs))
    return other_args, other_kwargs


def _nudged(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Move every float by one rounding step, up or down by chance."""
    generator = torch.Generator().manual_seed(_SEED)

    def nudge(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        sign = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
        return leaf * (1 + sign * torch.finfo(leaf.dtype).eps)

    new_args, new_kwargs = pytree.tree_map(nudge, (args, kwargs))
    return new_args, new_kwargs


def _plain(value: Tensor) -> Tensor:
    """Let NaN equal NaN: a reference that gives NaN twice does repeat itself."""
    return torch.nan_to_num(value) if value.is_floating_point() else value
