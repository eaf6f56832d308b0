"""Weight norm with mean-only batch normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from normconv.errors import PlanError, Problem
from normconv.graph import Site, couples_in_training, norm_state
from normconv.graph.rewrite import absorb_norm_, affine_norm_, replace_norm_
from normconv.layers import MeanOnlyBatchNorm
from normconv.numerics import Affine
from normconv.plan import Action, Step
from normconv.targets.base import Decision
from normconv.targets.exact import affine_cost, refusal

__all__ = ["WeightNormMeanOnly"]


@dataclass(frozen=True)
class WeightNormMeanOnly:
    """y = s x − m + β with s = γ / √(σ² + eps) in a weight-normed layer, and m the mean of s x.

    In eval mode m is the running mean, s μ, and the function is that of the BatchNorm. In training mode
    it is the batch's: samples see each other by their mean, and nothing is divided. A frozen norm, which
    never took a batch's mean, becomes what `wn` makes of it.

    Source: Salimans & Kingma 2016, section 3.
    """

    name: ClassVar[str] = "wn+mobn"
    fidelity: ClassVar[str] = "exact"
    couples: ClassVar[bool] = True
    actions: ClassVar[tuple[Action, ...]] = ("fold", "affine")
    promise: ClassVar[str] = "same eval function; training subtracts the batch mean, and only that"

    def decide(self, site: Site) -> Decision | Problem:
        """Fold the scale into the layers before the norm where exact, else into an affine map."""
        if (refused := refusal(site)) is not None:
            return refused
        if site.producers:
            why = f"scale into {' + '.join(site.producers)}"
            return Decision("fold", why, site.producers, spans=site.spans)
        obstacle = site.obstacle or "nothing before it can absorb its scale"
        return Decision("affine", f"{obstacle}; {affine_cost(site)}")

    def edit(self, root: nn.Module, step: Step) -> None:
        """Put the mean-only norm into the slot, and the scale before it."""
        names = (step.site, *step.aliases)
        was: Any = root.get_submodule(step.site)
        state = norm_state(was)
        if isinstance(state, str):
            raise PlanError(Problem(step.site, state))
        if not couples_in_training(was):  # frozen, or of each sample: it never took a batch's mean
            if step.action == "fold":
                absorb_norm_(root, names, step.producers, spans=step.spans, weight_norm=True)
            else:
                affine_norm_(root, names)
            return
        scale = state.affine.scale
        momentum = getattr(was, "momentum", 0.1)
        made = MeanOnlyBatchNorm(
            state.channels, momentum=momentum, dtype=state.dtype, device=state.mean.device
        )
        with torch.no_grad():
            made.running_mean.copy_(scale * state.mean.double())
            if state.bias is not None:
                made.bias.copy_(state.bias)
            if isinstance(seen := getattr(was, "num_batches_tracked", None), torch.Tensor):
                made.num_batches_tracked.copy_(seen)
        made.bias.requires_grad_(bool(state.bias_trainable))
        before = Affine(scale, torch.zeros_like(scale))
        replace_norm_(root, names, made, before, step.producers, spans=step.spans, weight_norm=True)
