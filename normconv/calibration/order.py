"""In which order sites are calibrated: those that do not feed each other go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normconv.errors import CaptureError
from normconv.graph import CallGraph, capture
from normconv.numerics import evaluating

__all__ = ["independent_groups"]


def independent_groups(
    model: nn.Module, sites: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[list[str]]:
    """Group sites so that all that feeds a site is in earlier groups, and no group is larger than that.

    Where the model cannot be captured each site is a group, in the order given.

    >>> import torch
    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    >>> independent_groups(net, ["0", "1"], (torch.ones(2, 2),), {})
    [['0'], ['1']]
    """
    try:
        with evaluating(model):
            graph = capture(model, tuple(args), kwargs)
    except CaptureError:
        return [[site] for site in sites]
    levels = _levels(graph, set(sites))
    if any(site not in levels for site in sites):
        return [[site] for site in sites]
    groups: dict[int, list[str]] = {}
    for site in sites:
        groups.setdefault(levels[site], []).append(site)
    return [groups[level] for level in sorted(groups)]


def _levels(graph: CallGraph, sites: set[str]) -> dict[str, int]:
    """How many sites lie one after another on the longest way to each; its last call counts."""
    passed: dict[int, int] = {}
    levels: dict[str, int] = {}
    for call in graph.calls:
        level = max((passed[index] for index in call.inputs), default=0)
        is_site = call.kind == "module" and call.target in sites
        if is_site:
            levels[call.target] = max(levels.get(call.target, 0), level)
        passed[call.index] = level + is_site
    return levels
