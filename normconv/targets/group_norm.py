"""GroupNorm in the place of BatchNorm, with the statistics kept; with or without standardized weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.graph import Site, norm_state
from normconv.graph.rewrite import replace_module_, replace_norm_
from normconv.layers import Normed
from normconv.plan import Action, Step
from normconv.targets.base import Decision
from normconv.targets.exact import NO_STATISTICS, refusal
from normconv.targets.groups import choose_groups

__all__ = ["GroupNorm"]

_SOFT = 1.0  # eps where statistics are trained, in units of the trained variance
_FRESH = 1e-5  # torch's own


@dataclass(frozen=True)
class GroupNorm:
    """y = γ' (x̂ − m) / √(v + eps) + β with x̂ = (x − μ) / √(σ² + eps_BN), m and v of each group.

    μ and σ go into the layer before the norm (or into an affine map), γ and β into the GroupNorm.
    After that the trained variance is 1, so that eps weighs it against the sample's: v is shrunk toward
    1, and γ' = γ √(1 + eps) makes up for it. With eps → ∞ nothing of the sample's variance would be
    left, with 1e-5 all of it is.

    Args:
        groups: number of groups, or ``auto``: by the data in `calibrate`, by the case without.
        channels_per_group: size of a group, in place of their number.
        eps: added to a group's variance; ``auto`` takes 1 where the statistics are trained, else 1e-5.
        search: let `calibrate` try other numbers of groups; a plan says so where groups was ``auto``.

    Source: Wu & He 2018, equations 3 and 4; keeping the statistics and shrinking: docs/adr/0005.
    """

    groups: int | str = "auto"
    channels_per_group: int = 0
    eps: float | str = "auto"
    search: bool = False

    name: ClassVar[str] = "gn"
    fidelity: ClassVar[str] = "calibrated"
    couples: ClassVar[bool] = False
    actions: ClassVar[tuple[Action, ...]] = ("fold", "affine", "fresh", "insert")
    promise: ClassVar[str] = "no sample sees another; near the original, nearer after `calibrate`"

    def __post_init__(self) -> None:
        problems = []
        if self.groups != "auto" and (isinstance(self.groups, (str, bool)) or self.groups < 1):
            problems.append(f"groups={self.groups!r} is neither 'auto' nor a number from 1")
        if self.channels_per_group < 0:
            problems.append(f"channels_per_group={self.channels_per_group} is negative")
        if self.groups != "auto" and self.channels_per_group:
            problems.append("groups and channels_per_group say the same thing twice")
        if self.eps != "auto" and (isinstance(self.eps, str) or not 0 < self.eps < math.inf):
            problems.append(f"eps={self.eps!r} is neither 'auto' nor a positive number")
        if problems:
            raise UsageError([Problem(f"target {self.name}", what) for what in problems])

    def decide(self, site: Site) -> Decision | Problem:
        """Fold μ and σ into the layers before the norm where exact, else into an affine map."""
        statistics = not site.refusal.startswith(NO_STATISTICS)
        if statistics and (refused := refusal(site)) is not None:
            return refused
        chosen = choose_groups(
            site.channels,
            site.shape,
            groups=None if isinstance(self.groups, str) else self.groups,
            channels_per_group=self.channels_per_group or None,
            pretrained=statistics and not site.untrained,
        )
        if isinstance(chosen, str):
            return Problem(site.name, chosen, "exclude it, or take an exact target for it")
        eps = self.eps
        if isinstance(eps, str):
            eps = _SOFT if statistics and not site.untrained else _FRESH
        free = self.groups == "auto" and not self.channels_per_group
        options = {"groups": chosen.number, "eps": eps, **({"search": True} if free else {})}
        if not statistics:
            why = f"{chosen.reason}; {site.refusal}: γ and β are copied, nothing else is known"
            return Decision("fresh", why, options=options, fidelity="fresh")
        if site.untrained and not site.producers:
            why = f"{chosen.reason}; initial statistics: there is nothing to put before it"
            return Decision("fresh", why, options=options, fidelity="fresh")
        where = f"μ and σ into {' + '.join(site.producers)}"
        if not site.producers:
            where = f"μ and σ into an affine map ({site.obstacle or 'nothing can absorb them'})"
        return Decision(
            "fold" if site.producers else "affine",
            f"{chosen.reason}; {where}",
            site.producers,
            spans=site.spans if site.producers else (),
            options=options,
            fidelity="fresh" if site.untrained else "",
        )

    def decide_after(
        self, layer: str, channels: int, shape: tuple[int, ...] | None
    ) -> Decision | Problem:
        """Decide on a norm after a layer that has none: nothing is trained, γ = 1 and β = 0."""
        chosen = choose_groups(
            channels,
            shape,
            groups=None if isinstance(self.groups, str) else self.groups,
            channels_per_group=self.channels_per_group or None,
            pretrained=False,
        )
        if isinstance(chosen, str):
            return Problem(layer, chosen, "leave it out of insert_after")
        eps = _FRESH if isinstance(self.eps, str) else self.eps
        options = {"groups": chosen.number, "eps": eps}
        why = f"{chosen.reason}; a new norm after it"
        return Decision("insert", why, options=options, fidelity="fresh")

    @property
    def _eps(self) -> float:
        """What a step without options gets: a plan that was made here has a number."""
        return _SOFT if isinstance(self.eps, str) else self.eps

    def edit(self, root: nn.Module, step: Step) -> None:
        """Put the GroupNorm into the slot, and μ and σ before it."""
        names = (step.site, *step.aliases)
        was = root.get_submodule(step.site)
        if step.action == "insert":
            groups = 1 if isinstance(self.groups, str) else self.groups
            eps = _FRESH if isinstance(self.eps, str) else self.eps
            like = next(was.parameters())
            place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
            norm = nn.GroupNorm(groups, step.channels, eps=eps, **place)
            replace_module_(root, names, Normed.of(was, norm.requires_grad_(like.requires_grad)))
            return
        if step.action == "fresh":
            replace_norm_(root, names, self._made(root, was, step.channels, scale=1.0), None)
            return
        state = norm_state(was)
        before = None if isinstance(state, str) else state.standardizing  # else it is refused there
        scale = (1 + self._eps) ** 0.5
        made = self._made(root, was, step.channels, scale)
        replace_norm_(root, names, made, before, step.producers, spans=step.spans)

    def _made(self, root: nn.Module, was: nn.Module, channels: int, scale: float) -> nn.GroupNorm:
        """Make the GroupNorm, with γ · scale and β of the norm that was there."""
        given = [getattr(was, name, None) for name in ("weight", "bias", "running_mean")]
        like = next((t for t in (*given, *root.parameters()) if isinstance(t, Tensor)), None)
        place: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
        groups = 1 if isinstance(self.groups, str) else self.groups
        made = nn.GroupNorm(groups, channels, eps=self._eps, **place)
        with torch.no_grad():
            for parameter, value, factor in (
                (made.weight, given[0], scale),
                (made.bias, given[1], 1.0),
            ):
                trained = isinstance(value, Tensor) and value.requires_grad
                source = value.double() if isinstance(value, Tensor) else parameter.double()
                parameter.copy_(source * factor)
                parameter.requires_grad_(trained)
        return made
