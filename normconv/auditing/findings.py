"""What an audit finds, and how it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normconv.graph import couples_in_training, is_norm, norm_state
from normconv.report import Check, SiteRow
from normconv.targets import TARGETS

__all__ = ["Finding", "Kind", "checks_of", "is_known_coupler", "merged", "rows_of", "way_out"]

Kind = Literal["couples", "keeps statistics", "not judged", "not called"]

_ORDER: tuple[Kind, ...] = ("couples", "keeps statistics", "not judged", "not called")


@dataclass(frozen=True)
class Finding:
    """One thing found at one module.

    Args:
        module: its name; empty for the model itself.
        cls: its class.
        kind: it ``couples`` samples; it ``keeps statistics`` of them, which later samples see; it was
            ``not judged``; it is a norm over the batch that was ``not called``.
        modes: in which modes.
        size: the largest relative change of another sample, where it was measured.
        bound: the largest that passes.
        why: what shows it, in a sentence.
        way_out: what mends it.
    """

    module: str
    cls: str
    kind: Kind
    modes: tuple[str, ...]
    size: float | None = None
    bound: float | None = None
    why: str = ""
    way_out: str = ""

    @property
    def label(self) -> str:
        """The module and its class."""
        return f"{self.module} ({self.cls})" if self.module else self.cls

    @property
    def fails(self) -> bool:
        """Whether an audit that finds it has failed."""
        return self.kind != "not called"


def is_known_coupler(module: nn.Module) -> bool:
    """Say whether samples meet in the module by its class, in training at the latest.

    >>> is_known_coupler(nn.LazyBatchNorm1d(affine=False)), is_known_coupler(nn.InstanceNorm1d(2))
    (True, False)
    """
    keeps = isinstance(module, _InstanceNorm) and bool(module.track_running_stats)
    return couples_in_training(module) or keeps


def way_out(module: nn.Module, functions: Iterable[str] = (), in_eval: bool = False) -> str:
    """Name the target that mends a module, else say that it is to be rewritten.

    Args:
        module: the module to blame.
        functions: what it calls that couples.
        in_eval: it couples in eval mode too.
    """
    if isinstance(module, _BatchNorm) or is_norm(module):
        state = norm_state(module)
        if isinstance(state, str) and "lazy" not in state:
            return f"put nn.GroupNorm in its place: {state}"
        return f"convert it: --to {_listed([t for t in _MENDING if t in _built()])}"
    if any("batch_norm" in name for name in functions) and not in_eval:
        return 'convert the model with output="graph" (--output graph), or rewrite it with a module'
    return "rewrite it so that it computes each sample by itself"


_MENDING = ("wn", "plain", "frozen", "gn", "gn+ws")


def _built() -> set[str]:
    return {target.name for target in TARGETS}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else "".join(names)


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Put together what was found at one module in several modes; what fails comes first.

    >>> sizes = {"eval": 1.0, "train": 2.0}
    >>> one = merged(Finding("bn", "BN", "couples", (mode,), sizes[mode]) for mode in sizes)[0]
    >>> one.modes, one.size
    (('eval', 'train'), 2.0)
    """
    groups: dict[tuple[str, Kind], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.module, finding.kind), []).append(finding)
    made = []
    for group in groups.values():
        worst = max(group, key=lambda one: -1.0 if one.size is None else one.size)
        modes = tuple(dict.fromkeys(mode for one in group for mode in one.modes))
        made.append(Finding(**{**asdict(worst), "modes": modes}))
    return tuple(sorted(made, key=lambda one: _ORDER.index(one.kind)))


def rows_of(findings: Iterable[Finding]) -> tuple[SiteRow, ...]:
    """Make a row of each finding."""
    return tuple(
        SiteRow(
            site=one.module,
            norm=one.cls,
            producer="",
            action=one.kind,
            fidelity="",
            reason=f"{' and '.join(one.modes)}: {one.why}",
            error=one.size,
            bound=one.bound,
        )
        for one in findings
    )


_SAID: Mapping[Kind, str] = {
    "couples": "lets samples see each other",
    "keeps statistics": "keeps statistics of the samples it saw",
    "not judged": "could not be judged",
    "not called": "was not called",
}


def checks_of(findings: Iterable[Finding]) -> tuple[Check, ...]:
    """Make a failed check of each finding that fails the audit."""
    return tuple(
        Check(
            f"{one.label} {_SAID[one.kind]} in {' and '.join(one.modes)} mode",
            passed=False,
            measured=one.size,
            bound=one.bound,
            detail=one.why,
            way_out=one.way_out,
        )
        for one in findings
        if one.fails
    )
