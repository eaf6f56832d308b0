"""What data-dependent initialisation set, what it left and why, and how near to standard it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from normconv.calibration.init_sites import InitSite, LayerSite, init_sites
from normconv.layers import Reparametrised, WeightNormed, layout_of
from normconv.numerics import Moments
from normconv.report import Check, Report, SiteRow

__all__ = ["init_report"]

_LISTED = 6


def init_report(
    model: nn.Module,
    sites: Mapping[str, InitSite],
    found: Mapping[str, Moments],
    left: Mapping[str, str],
    strange: Sequence[str] = (),
) -> Report:
    """Report on an initialised model, and hold every channel that was set to mean 0 and deviation 1.

    Args:
        model: initialised.
        sites: what was set in it, in order.
        found: moments of their values afterwards, over all the data.
        left: what some of them leave to others.
        strange: layers whose own forward does not give g · t + b.
    """
    layers = [name for name, site in sites.items() if isinstance(site, LayerSite)]
    dead = {name: rows for name, site in sites.items() if (rows := _rows(site.dead))}
    closed = {name: rows for name, site in sites.items() if (rows := _rows(site.closed))}
    facts = {"layers initialised": layers, "channels without variance": dead, "gains of 0": closed}
    notes = [f"{name}: {why}, and stays what that makes it" for name, why in left.items()]
    for what, where in (("channels without variance", dead), ("channels with a gain of 0", closed)):
        if where:
            number = sum(len(rows) for rows in where.values())
            notes.append(f"{number} {what} keep what they have, in {_listed(list(where))}")
    return Report(
        verb="initialise",
        subject=type(model).__name__,
        sites=tuple(_row(site, found[name], left.get(name, "")) for name, site in sites.items()),
        checks=_checks(sites, found),
        facts={name: value for name, value in facts.items() if value},
        notes=(*notes, *_left_alone(model, sites, strange)),
    )


def _row(site: InitSite, found: Moments, left: str) -> SiteRow:
    return SiteRow(
        site=site.name,
        norm=type(site.module).__name__,
        producer="",
        action=site.action,
        fidelity="calibrated",
        reason=left or f"each of {found.mean.numel()} channels by {found.number} numbers",
        error=site.error(found),
        bound=site.bound,
    )


def _checks(sites: Mapping[str, InitSite], found: Mapping[str, Moments]) -> tuple[Check, ...]:
    checks = []
    for place, what in enumerate(("|mean|", "|deviation − 1|")):
        errors = {name: site.errors(found[name])[place] for name, site in sites.items()}
        shares = {name: error / sites[name].bound for name, error in errors.items()}
        worst = max(shares, key=lambda name: (shares[name] != shares[name], shares[name]))
        checks.append(
            Check.at_most(
                f"largest {what} of a channel",
                errors[worst],
                sites[worst].bound,
                detail=f"at {worst or type(sites[worst].module).__name__}",
                way_out=_way_out(sites[worst]),
            )
        )
    return tuple(checks)


def _way_out(site: InitSite) -> str:
    if site.calls == 1:
        return "give more samples, or compute in float64"
    near = "the model that the error carries is as near as it came"
    return f"{site.calls} calls of it feed each other, and may never be standard together; {near}"


def _left_alone(
    model: nn.Module, sites: Mapping[str, InitSite], strange: Sequence[str]
) -> list[str]:
    """Say which layers nothing was done to."""
    uncalled = [name for name in init_sites(model) if name not in (*sites, *strange)]
    recurrent, others, plain = [], [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            recurrent.append(name)
        elif layout_of(module) is not None:
            plain += [] if isinstance(module, WeightNormed) else [name]
        elif isinstance(module, Reparametrised):
            others.append(name)
    reasons = {
        "what their own forward gives is not g · t + b, left as they are": strange,
        "not called as modules on the first batch, left as they are": uncalled,
        "recurrent layers have no data-dependent initialisation, left as they are": recurrent,
        "neither Linear nor convolution, left as they are": others,
        "without weight norm, left as they are": plain,
    }
    notes = [f"{why}: {_listed(names)}" for why, names in reasons.items() if names]
    bare = [n for n, s in sites.items() if isinstance(s, LayerSite) and s.bias() is None]
    if bare:
        notes.append(f"without a bias, so that the mean stays what it is: {_listed(bare)}")
    return notes


def _rows(which: Tensor) -> list[int]:
    rows: list[int] = which.nonzero().flatten().tolist()
    return rows


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(name or "the model itself" for name in names[:_LISTED]) + more
