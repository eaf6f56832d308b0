"""One network under several normalizations, all from the same initial weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from normconv.calibration import initialise
from normconv.errors import Problem, UsageError
from normconv.folding import fold
from normconv.graph import norm_names
from normconv.graph.rewrite import empty_slot_
from normconv.graph.standardizable import why_not_standardized
from normconv.layers import Reparametrised, kind_of, weight_standardize_, wrap_
from normconv.plan import Rule
from normconv.surgery import apply_plan, make_plan

__all__ = ["DATA_INIT", "NORMALIZATIONS", "check_normalizations", "normalized"]

DATA_INIT = "+init"  # ends the name of a normalization whose initial weights come from data
NORMALIZATIONS = {
    "plain": "no normalization",
    "bn": "BatchNorm",
    "wn": "weight norm on every layer",
    "wn+mobn": "weight norm on every layer, mean-only BatchNorm in place of BatchNorm",
    "gn": "GroupNorm, 16 channels a group",
    "gn+ws": "GroupNorm on weight-standardized layers",
    "ln": "GroupNorm of one group",
}
_TARGETS = {"wn+mobn": "wn+mobn", "gn": "gn", "gn+ws": "gn+ws", "ln": "gn"}
_INITIALISED = ("plain", "wn", "wn+mobn")


def check_normalizations(names: Sequence[str]) -> None:
    """Refuse names that say nothing.

    Raises:
        UsageError: lists all that are unknown, doubled, or take no data-dependent initial weights.
    """
    if isinstance(names, str):
        what = f"{names!r} is a text, no list of names"
        raise UsageError(Problem("normalizations", what, f"[{names!r}]"))
    problems = []
    for name in names:
        kind = name.removesuffix(DATA_INIT)
        if kind not in NORMALIZATIONS:
            way_out = f"known are {', '.join(NORMALIZATIONS)}"
            problems.append(Problem("normalizations", f"{name!r} is unknown", way_out))
        elif kind != name and kind not in _INITIALISED:
            what = f"{kind} has no data-dependent initial weights"
            way_out = f"{', '.join(_INITIALISED)} have"
            problems.append(Problem("normalizations", what, way_out))
    if len(set(names)) < len(names) or not names:
        problems.append(
            Problem("normalizations", f"{', '.join(names) or 'none'}", "name each once")
        )
    if problems:
        raise UsageError(problems)


def normalized(network: nn.Module, name: str, samples: Tensor) -> nn.Module:
    """Return a copy of an untrained network under another normalization.

    A fresh BatchNorm has γ = 1, β = 0, mean 0 and variance 1: taking it out, or converting it, leaves the
    weights of the layers what they were, but for a factor of √(1 + eps).

    Args:
        network: with its initial weights and fresh BatchNorms; not changed.
        name: one of `NORMALIZATIONS`, with ``+init`` for data-dependent initial weights.
        samples: inputs for those, (N, ...).

    Raises:
        UsageError: it has no norms, and the normalization is to stand in their place.

    Source: Salimans & Kingma 2016, section 3, for ``+init`` of a network without norms, whose gains are
    set from data and then stay.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    >>> [type(layer).__name__ for layer in normalized(net, "wn", torch.randn(8, 4))]
    ['WNLinear', 'Identity', 'ReLU', 'WNLinear']
    """
    kind = name.removesuffix(DATA_INIT)
    norms = norm_names(network)
    if not norms and (kind == "bn" or kind in _TARGETS):
        what = f"the {type(network).__name__} has no BatchNorm in whose place {kind} could stand"
        raise UsageError(Problem("normalizations", what, "plain and wn need none"))
    if kind == "bn":
        return copy.deepcopy(network)
    if kind in _TARGETS:
        made = _converted(network, kind, samples)
        if kind == "gn+ws":
            _standardize_all_(made)
    else:
        made = copy.deepcopy(network)
        for norm in norms:
            empty_slot_(made, (norm,))
    if kind.startswith("wn") or name != kind:
        weight_norm_all_(made)
    if name != kind:
        made = _initialised(made, samples)
    return fold(made)[0] if name == f"plain{DATA_INIT}" else made


def weight_norm_all_(network: nn.Module) -> None:
    """Give weight norm, in place, to every layer with a weight that has none yet, but embeddings."""
    for layer in list(network.modules()):
        known = kind_of(layer) not in ("none", "embedding")
        if known and not isinstance(layer, Reparametrised):
            wrap_(layer)


def _standardize_all_(network: nn.Module) -> None:
    """Standardize, in place, also the layers that no norm follows directly: with a ReLU between, say."""
    for layer in list(network.modules()):
        if kind_of(layer) not in ("none", "embedding") and not why_not_standardized([layer]):
            weight_standardize_(layer)


def _converted(network: nn.Module, kind: str, samples: Tensor) -> nn.Module:
    options: dict[str, Any] = {"groups": 1} if kind == "ln" else {}
    rule = Rule(_TARGETS[kind], options=options)
    return apply_plan(network, make_plan(network, rule, example_inputs=(samples[:2],))).model


def _initialised(network: nn.Module, samples: Tensor) -> nn.Module:
    """Set gains and biases from data, layer after layer, as the first step of training meets it."""
    return initialise(network, [samples], fresh=True, dropout=True).model
