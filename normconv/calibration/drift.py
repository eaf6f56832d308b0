"""How far activations and predictions of a converted model are from those of the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from normconv.calibration.batches import Batches
from normconv.calibration.ranks import of_all_ranks
from normconv.errors import Problem, UsageError
from normconv.plan import Step
from normconv.proof import evaluate, record_outputs
from normconv.report import Check

__all__ = [
    "Agreement",
    "Drift",
    "Progress",
    "SiteDrift",
    "measure_drift",
    "summary",
    "wilson_interval",
]

Progress = Callable[[int, int, str], None]  # done, of how many, what was last measured

_Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class SiteDrift:
    """One site's output against the original's.

    Args:
        snr_db: 10 log10 of the power of the original's over that of the difference.
        cosine: of the angle between both.
    """

    snr_db: float
    cosine: float


@dataclass(frozen=True)
class Agreement:
    """On how many samples both models have the same largest logit, with a 95 % Wilson interval."""

    same: int
    samples: int

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        low, high = wilson_interval(self.same, self.samples)
        return {
            "agreement": self.same / max(1, self.samples),
            "interval": [low, high],
            "samples": self.samples,
        }


@dataclass(frozen=True)
class Drift:
    """What `measure_drift` found.

    Args:
        sites: by site.
        output: rel-L2 difference over all outputs.
        agreement: of the first output of shape (N, classes), where there is one.
        divergence: of the same: the mean over the samples of KL(softmax of the original's ‖ of the
            candidate's), in nats; None where there is none.
    """

    sites: Mapping[str, SiteDrift]
    output: float
    agreement: Agreement | None
    divergence: float | None = None

    def agreed(self, least: float | None, way_out: str) -> list[Check]:
        """Return the check of an agreement that was asked for; none where none was."""
        if least is None:
            return []
        if self.agreement is None:
            what = "no output is one of class scores, (N, classes): there is nothing to agree on"
            return [Check("agreement", False, detail=what, way_out="leave min_agreement out")]
        share = self.agreement.same / self.agreement.samples
        detail = f"{share:.4f}, at least {least:g} was asked for"
        return [Check("agreement", share >= least, detail=detail, way_out=way_out)]

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        agreement = {} if self.agreement is None else self.agreement.document()
        sites = {name: vars(site) for name, site in self.sites.items()}
        divergence = {} if self.divergence is None else {"divergence": self.divergence}
        return {"output": self.output, **agreement, **divergence, "sites": sites}


class _Sums(NamedTuple):
    """Σ t², Σ o², Σ t·o and Σ (t − o)² of an original's values t and a candidate's o."""

    original: float = 0.0
    candidate: float = 0.0
    product: float = 0.0
    difference: float = 0.0

    def plus(self, *others: _Sums) -> _Sums:
        return _Sums(*(sum(values) for values in zip(self, *others, strict=True)))

    def with_values(self, original: Tensor, candidate: Tensor) -> _Sums:
        t, o = original.double(), candidate.double()
        sums = ((t * t).sum(), (o * o).sum(), (t * o).sum(), (t - o).pow(2).sum())
        return self.plus(_Sums(*(value.item() for value in sums)))

    @property
    def relative(self) -> float:
        """‖t − o‖ / ‖t‖; NaN where any number is, infinite where only t is 0."""
        if self.original == 0:
            return 0.0 if self.difference == 0 else self.difference * math.inf
        return math.sqrt(self.difference / self.original)

    def site(self) -> SiteDrift:
        off = self.relative
        snr = math.inf if off == 0 else -20 * math.log10(off) if off < math.inf else -math.inf
        norm = math.sqrt(self.original * self.candidate)
        return SiteDrift(math.nan if math.isnan(off) else snr, self.product / norm if norm else 1.0)


class _Tally(NamedTuple):
    """What one process saw."""

    sites: dict[str, _Sums]
    output: _Sums
    same: int
    samples: int
    divergence: float

    def drift(self, *others: _Tally) -> Drift:
        """Put several together."""
        every = (self, *others)
        same, samples = (sum(t.same for t in every), sum(t.samples for t in every))
        sites = {n: s.plus(*(t.sites[n] for t in others)).site() for n, s in self.sites.items()}
        output = self.output.plus(*(t.output for t in others)).relative
        if not samples:
            return Drift(sites, output, None)
        divergence = sum(t.divergence for t in every) / samples
        return Drift(sites, output, Agreement(same, samples), divergence)


def measure_drift(
    original: nn.Module,
    candidate: nn.Module,
    steps: Sequence[Step],
    data: Batches,
    *,
    scores: bool = True,
) -> Drift:
    """Run both models in eval mode over the data and compare sites and outputs; neither is changed.

    Of each site 4 samples a batch and 16 positions a channel are compared.

    Args:
        original: the reference.
        candidate: converted by a plan of these steps.
        steps: whose sites are compared.
        data: inputs; under `torch.distributed` those of this process, and the result is that of all.
        scores: whether the first output of shape (N, classes) is one of class scores.
    """
    tally, *others = of_all_ranks(_tallied(original, candidate, steps, data, scores))
    return tally.drift(*others)


def _tallied(
    original: nn.Module,
    candidate: nn.Module,
    steps: Sequence[Step],
    data: Batches,
    scores: bool,
) -> _Tally:
    names = [step.site for step in steps if step.phase == "eval"]
    sites = {name: _Sums() for name in names}
    output, same, samples, divergence = _Sums(), 0, 0, 0.0
    for place, (args, kwargs) in enumerate(data):
        try:
            with record_outputs(original, names) as seen:
                expected = evaluate(original, args, kwargs)
            with record_outputs(candidate, names) as ours:
                got = evaluate(candidate, args, kwargs)
        except Exception as reason:  # the forward is the user's, and so is the data
            what = f"the model does not run on it ({type(reason).__name__}: {reason})"
            way_out = "give batches of the model's own inputs"
            raise UsageError(Problem(f"data, batch {place}", what, way_out)) from None
        for name in names:
            for one, other in zip(seen.get(name, []), ours.get(name, []), strict=False):
                sites[name] = sites[name].with_values(one, other)
        for name, value in expected.items():
            if value.is_floating_point() and name in got:
                output = output.with_values(value, got[name])
        alike = (n for n, t in expected.items() if scores and _are_scores(t) and n in got)
        if name := next(alike, ""):
            same += int((expected[name].argmax(1) == got[name].argmax(1)).sum())
            samples += len(expected[name])
            divergence += _divergence(expected[name], got[name])
    return _Tally(sites, output, same, samples, divergence)


def _divergence(original: Tensor, candidate: Tensor) -> float:
    """Σ over the samples of KL(p ‖ q)."""
    p, q = (F.log_softmax(scores.double(), 1) for scores in (original, candidate))
    return F.kl_div(q, p, log_target=True, reduction="sum").item()


def _are_scores(output: Tensor) -> bool:
    return output.is_floating_point() and output.dim() == 2 and output.shape[1] > 1


def summary(before: Drift, after: Drift) -> dict[str, str]:
    """Return what a reader of a report looks for first."""
    lines = {"outputs differ by": f"{before.output:.3g} before, {after.output:.3g} after"}
    if before.agreement is not None and after.agreement is not None:
        then, now = before.agreement.document(), after.agreement.document()
        low, high = now["interval"]
        lines["same top-1"] = (
            f"{then['agreement']:.4f} before, {now['agreement']:.4f} after (95 % interval {low:.4f} to "
            f"{high:.4f}, {now['samples']} samples)"
        )
    return lines


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Source: Wilson 1927.

    >>> [round(bound, 3) for bound in wilson_interval(9, 10)]
    [0.596, 0.982]
    """
    if not trials:
        return 0.0, 1.0
    share, z2 = hits / trials, _Z**2
    middle = share + z2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return (middle - spread) / scale, (middle + spread) / scale
