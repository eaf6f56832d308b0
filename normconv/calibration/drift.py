"""How far activations and predictions of a converted model are from those of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normconv.calibration.batches import Batches
from normconv.calibration.ranks import of_all_ranks
from normconv.plan import Step
from normconv.proof import evaluate, record_outputs

__all__ = ["Agreement", "Drift", "SiteDrift", "measure_drift", "summary", "wilson_interval"]

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
        agreement: where the first output is (N, classes).
    """

    sites: Mapping[str, SiteDrift]
    output: float
    agreement: Agreement | None

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        agreement = {} if self.agreement is None else self.agreement.document()
        sites = {name: vars(site) for name, site in self.sites.items()}
        return {"output": self.output, **agreement, "sites": sites}


@dataclass
class _Sums:
    """Σ t², Σ o², Σ t·o of an original's values t and a candidate's o."""

    original: float = 0.0
    candidate: float = 0.0
    product: float = 0.0

    def add(self, original: Tensor, candidate: Tensor) -> None:
        t, o = original.double(), candidate.double()
        self.original += float((t * t).sum())
        self.candidate += float((o * o).sum())
        self.product += float((t * o).sum())

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.original + other.original,
            self.candidate + other.candidate,
            self.product + other.product,
        )

    @property
    def difference(self) -> float:
        return max(0.0, self.original + self.candidate - 2 * self.product)

    def site(self) -> SiteDrift:
        if not self.original:
            return SiteDrift(math.inf if not self.candidate else -math.inf, 1.0)
        # Sums of squares lose what is below their own rounding.
        ratio = max(self.difference / self.original, 1e-15)
        cosine = self.product / max(math.sqrt(self.original * self.candidate), 1e-300)
        return SiteDrift(-10 * math.log10(ratio), cosine)


def measure_drift(
    original: nn.Module, candidate: nn.Module, steps: Sequence[Step], data: Batches
) -> Drift:
    """Run both models in eval mode over the data and compare sites and outputs; neither is changed.

    Of each site 4 samples a batch and 16 positions a channel are compared.

    Args:
        original: the reference.
        candidate: converted by a plan of these steps.
        steps: whose sites are compared.
        data: inputs.
    """
    names = [step.site for step in steps if step.phase == "eval"]
    sites = {name: _Sums() for name in names}
    output, same, samples = _Sums(), 0, 0
    for args, kwargs in data:
        with record_outputs(original, names) as seen:
            expected = evaluate(original, args, kwargs)
        with record_outputs(candidate, names) as ours:
            got = evaluate(candidate, args, kwargs)
        for name, sums in sites.items():
            for one, other in zip(seen.get(name, []), ours.get(name, []), strict=False):
                sums.add(one, other)
        for name, value in expected.items():
            if value.is_floating_point() and name in got:
                output.add(value, got[name])
        first = next(iter(expected), "")
        if first in got and expected[first].dim() == 2 and expected[first].shape[1] > 1:
            same += int((expected[first].argmax(1) == got[first].argmax(1)).sum())
            samples += len(expected[first])
    parts = of_all_ranks((sites, output, same, samples))
    sites = {name: sum((part[0][name] for part in parts), _Sums()) for name in names}
    output = sum((part[1] for part in parts), _Sums())
    same, samples = sum(part[2] for part in parts), sum(part[3] for part in parts)
    off = math.sqrt(output.difference / output.original) if output.original else 0.0
    agreement = Agreement(same, samples) if samples else None
    return Drift({name: sums.site() for name, sums in sites.items()}, off, agreement)


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
