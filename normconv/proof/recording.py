"""What a proof needs of an original, recorded so that the original need not be there afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normconv.graph import training_branches
from normconv.numerics import evaluating
from normconv.plan import Step
from normconv.proof.outputs import cast_inputs, flat_outputs, map_floats, run_in
from normconv.proof.recorder import record_outputs
from normconv.report import Check

__all__ = [
    "OriginalRuns",
    "Recording",
    "Run",
    "coarsest_dtype",
    "in_phase",
    "places_in",
    "record_original",
    "run_model",
]

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Run:
    """One forward pass: named outputs, and what the sites put out."""

    outputs: dict[str, Tensor]
    sites: dict[str, list[Tensor]]
    failure: str = ""


@dataclass
class OriginalRuns:
    """The original in float64 and as it is.

    `own` may hold several runs: the worst of their errors is its own error. `again` gives one more, on
    inputs moved by one ulp.
    """

    reference: Run
    own: list[Run]
    again: Callable[[], Run]


@dataclass(frozen=True)
class Recording:
    """All that a proof needs of an original: outputs, and a sample of what each site puts out.

    Args:
        steps: the plan's steps, whose sites were recorded.
        inputs: positional and keyword inputs.
        dtype: the original's.
        repeats: whether the original equals itself.
        in_eval: its runs in eval mode.
        in_training: its runs through the branches of training mode, where some site is only there.
        granted: an own error that is granted besides, for roundings that the original does not have.
    """

    steps: tuple[Step, ...]
    inputs: _Inputs
    dtype: torch.dtype
    repeats: Check
    in_eval: OriginalRuns
    in_training: OriginalRuns | None
    granted: float = 0.0


def record_original(
    original: nn.Module,
    steps: Sequence[Step],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    for_good: bool = False,
) -> Recording:
    """Run an original as `prove` needs it.

    Args:
        original: the reference; it is run in float64 as well; not changed.
        steps: the plan's steps: the sites to record at their own output.
        args: positional inputs in the model's dtype.
        kwargs: keyword inputs.
        for_good: the original will be gone when the candidate is judged, so that what is only needed
            on a miss is run now.
    """
    inputs = (args, dict(kwargs or {}))
    dtype = coarsest_dtype(original)
    in_eval = _original(original, in_phase(steps, "eval"), inputs, dtype, False, for_good)
    first = in_eval.reference if dtype == torch.float64 else in_eval.own[0]
    repeats = _repeats(original, inputs, first.outputs)
    in_training = None
    if training := in_phase(steps, "train"):
        in_training = _original(original, training, inputs, dtype, True, for_good)
    return Recording(tuple(steps), inputs, dtype, repeats, in_eval, in_training)


def in_phase(steps: Sequence[Step], phase: str) -> list[Step]:
    """Return the steps of norms that are called in that mode."""
    return [step for step in steps if step.phase == phase]


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """Return the floating dtype of the model's tensors with the largest eps; float32 without any."""
    dtypes = {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _original(
    original: nn.Module,
    steps: Sequence[Step],
    inputs: _Inputs,
    dtype: torch.dtype,
    training: bool,
    for_good: bool,
) -> OriginalRuns:
    places = places_in(None, steps)

    moved = [step.site for step in steps if step.action in ("forward", "affine", "frozen")]

    def again() -> Run:
        with _moved_one_ulp_up(original, moved):
            return run_model(original, _one_ulp_up(inputs), places, training)

    if dtype == torch.float64:
        reference, own = run_model(original, inputs, places, training), again()
        return OriginalRuns(reference, [own], again=lambda: own)
    own = run_model(original, inputs, places, training)
    wide = cast_inputs(inputs, torch.float64)
    reference = run_in(original, torch.float64, lambda m: run_model(m, wide, places, training))
    if for_good:
        kept = again()
        return OriginalRuns(reference, [own], again=lambda: kept)
    return OriginalRuns(reference, [own], again)


def places_in(model: nn.Module | None, steps: Sequence[Step]) -> dict[str, tuple[str, ...]]:
    """Say where each site's values are to be seen: in the original (None), or in a candidate.

    That is its slot. The map of a norm folded forward is seen at what the layers after it put out, or
    in the slot of the norm that those absorbed in turn. A pass over a GraphModule takes empty slots out
    of the graph: the output of the layer before it is then the site's, if nothing lies between. Where
    nothing is to be seen the place is empty.
    """
    absorbed = {layer: s.site for s in steps if s.action == "fold" for layer in s.producers}
    places: dict[str, tuple[str, ...]] = {}
    for step in steps:
        after = dict.fromkeys(absorbed.get(layer, layer) for layer in step.consumers)
        places[step.site] = tuple(after) if step.action == "forward" else (step.site,)
    if not isinstance(model, torch.fx.GraphModule):
        return places
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    for step in steps:
        if not called.issuperset(places[step.site]):
            seen = step.action == "fold" and not step.spans
            places[step.site] = step.producers if seen else ()
    return places


def run_model(
    model: nn.Module,
    inputs: _Inputs,
    places: Mapping[str, tuple[str, ...]],
    training: bool,
) -> Run:
    """Run the model once, in eval mode or through the branches of training mode, and record."""
    names = [name for group in places.values() for name in group]
    mode = training_branches(model) if training else evaluating(model)
    with mode, record_outputs(model, names) as seen:
        args, kwargs = inputs
        outputs = flat_outputs(model(*args, **kwargs))
        outputs = {name: tensor.clone() for name, tensor in outputs.items()}
    sites = {
        site: [output for name in group for output in seen.get(name, [])]
        for site, group in places.items()
    }
    return Run(outputs, sites)


def _one_ulp_up(inputs: _Inputs) -> _Inputs:
    return map_floats(lambda tensor: tensor * (1 + torch.finfo(tensor.dtype).eps), inputs)


@contextmanager
def _moved_one_ulp_up(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Move what the named modules take by one ulp as well.

    A norm takes its mean off before it scales; an affine map in its slot, or the sums of the layer it is
    folded forward into, take off a product that may be far larger than what is left. How much a rounded
    input already costs there is what the original's response to such a move says.
    """

    def up(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        moved: tuple[Any, ...] = _one_ulp_up((args, {}))[0]
        return moved

    handles = [model.get_submodule(name).register_forward_pre_hook(up) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeats(original: nn.Module, inputs: _Inputs, first: Mapping[str, Tensor]) -> Check:
    """A model that differs from itself under a fixed seed can prove nothing."""
    second = run_model(original, inputs, {}, False).outputs
    differing = [name for name in first if not _same(first[name], second[name])]
    return Check(
        "the original repeats itself",
        not differing,
        detail=f"two runs differ in {', '.join(differing)}" if differing else "",
        way_out="make it deterministic in eval mode (a random or stateful operation is left)",
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
