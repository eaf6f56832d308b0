"""What is exact in a model whose norms look at each sample: all but the samples' statistics.

A GroupNorm that took a BatchNorm's place gets, from the layers before it, activations whose trained
mean is 0 and whose trained variance is 1. Put these two numbers in the place of the sample's mean and
variance, and the model must be the original, up to rounding. What is left of the difference is the
samples' statistics alone (and the mean of weights that were standardized), and that is measured, not
bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normconv.graph.rewrite import normalizer_name, replace_module_
from normconv.graph.running import first_line
from normconv.layers import ChannelAffine, WeightStandardized, copy_model, fold_layer_
from normconv.numerics import NOISE_FACTOR, Affine, relative_l2
from normconv.plan import Step
from normconv.proof.conversion import Proof
from normconv.proof.outputs import evaluate
from normconv.proof.within import RecordingWithin, prove_recorded_within
from normconv.report import Check

__all__ = ["prove_converted", "with_trained_statistics"]

_NAME = "with the trained statistics"


def prove_converted(recording: RecordingWithin, candidate: nn.Module) -> Proof:
    """Prove what is exact in a candidate, and measure the rest; the candidate is not changed.

    Args:
        recording: of the original.
        candidate: what `apply_plan` made of it, not yet calibrated.
    """
    steps = recording.steps
    sampled = [step for step in steps if _normalizer(candidate, step) is not None]
    unknown = [step for step in steps if step.action in ("fresh", "insert")]
    if not sampled and not unknown:
        return prove_recorded_within(recording, candidate)
    facts, checks = _measured(recording, candidate)
    if unknown:
        listed = ", ".join(step.site for step in unknown[:5]) + ", …" * (len(unknown) > 5)
        note = f"nothing is exact after {listed}: outputs were measured, not bounded"
        return Proof(checks, tuple(step.row() for step in steps), facts, (note,))
    # γ' is rounded once more than γ, in every channel the same where γ is: over n norms in a row the
    # error adds up to n · eps.
    granted = len(sampled) * torch.finfo(recording.inner.dtype).eps / NOISE_FACTOR
    whole = recording.whole and replace(recording.whole, granted=granted)
    inner = replace(recording.inner, granted=granted)
    recording = replace(recording, inner=inner, whole=whole)
    proof = prove_recorded_within(recording, with_trained_statistics(candidate, steps))
    exact = tuple(
        check if "repeats itself" in check.name else replace(check, name=f"{_NAME}: {check.name}")
        for check in proof.checks
    )
    return Proof((*exact, *checks), proof.rows, {**proof.facts, **facts}, proof.notes)


def with_trained_statistics(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """Return a copy in which every norm of a sample's statistics uses mean 0 and variance 1.

    y = γ' x / √(1 + eps) + β. Standardized weights get back the mean that they lost: v keeps it. The
    copy shares its tensors with the model and is only to be run.

    Args:
        model: what `apply_plan` made; not changed.
        steps: of that plan.

    >>> import torch
    >>> net = nn.Sequential(nn.GroupNorm(1, 2, eps=3.0))
    >>> step = Step("0", "BatchNorm1d", "gn", "fold", 2)
    >>> with_trained_statistics(net, [step])(torch.tensor([[2.0, 4.0]])).tolist()
    [[1.0, 2.0]]
    """
    twin = copy_model(model, share_tensors=True)
    for step in steps:
        norm = _normalizer(twin, step)
        if norm is None:
            continue
        for layer in map(twin.get_submodule, step.producers):
            if isinstance(layer, WeightStandardized):
                plain: Any = layer
                v = layer.weight_v
                fold_layer_(plain)
                plain.weight = v
        scale = norm.weight.detach().double() / (1 + norm.eps) ** 0.5
        map_ = Affine(scale, norm.bias.detach().double())
        fixed = ChannelAffine.of(map_, trainable=True, dtype=norm.weight.dtype)
        inside = normalizer_name(twin, step.site).removeprefix(step.site)
        replace_module_(twin, [f"{site}{inside}" for site in (step.site, *step.aliases)], fixed)
    return twin


def _normalizer(model: nn.Module, step: Step) -> nn.GroupNorm | None:
    """The norm of a sample's statistics that the step put in place."""
    if step.action not in ("fold", "standardize", "affine"):
        return None
    try:
        norm = model.get_submodule(normalizer_name(model, step.site))
    except AttributeError:
        return None
    return norm if isinstance(norm, nn.GroupNorm) else None


def _measured(
    recording: RecordingWithin, candidate: nn.Module
) -> tuple[dict[str, Any], tuple[Check, ...]]:
    """Run the candidate as it is: it runs, its outputs are finite, and so far they are off."""
    whole = recording.whole or recording.inner
    subject = (
        candidate if recording.whole or not recording.at else candidate.get_submodule(recording.at)
    )
    args, kwargs = whole.inputs
    try:
        got = evaluate(subject, args, kwargs)
    except Exception as reason:  # the forward is the user's, and may need what the norm had
        return {}, (Check("the converted model runs", False, detail=first_line(reason)),)
    expected = whole.in_eval.reference.outputs
    checks, off = [], {}
    for name, reference in expected.items():
        output = got.get(name)
        if output is None or output.shape != reference.shape:
            detail = "missing" if output is None else f"shape {tuple(output.shape)}"
            checks.append(Check(f"{name} as it is", False, detail=detail))
            continue
        finite = bool(output.isfinite().all()) or not bool(reference.isfinite().all())
        checks.append(Check(f"{name} as it is: finite", finite))
        off[name] = relative_l2(output, reference)
    return {"off on the example inputs": off}, tuple(checks)
