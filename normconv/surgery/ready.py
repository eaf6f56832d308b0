"""What must hold of a model's tensors before the first one is written: in place nothing is undone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from normconv.errors import PlanError, Problem
from normconv.graph import Names, NormState, norm_state
from normconv.layers import Reparametrised, obstacle_to, row_layouts, unfit_for_weight_norm
from normconv.numerics import all_finite, wide_row_norms
from normconv.plan import Plan, Span, Step
from normconv.surgery.layer_steps import ties_problem

__all__ = ["check_tensors"]

_Place = tuple[str, nn.Module]


def check_tensors(model: nn.Module, plan: Plan, *, in_place: bool = False) -> None:
    """Refuse what an edit would meet half way: unreadable norms, unfinite, tied or unwritable weights.

    Args:
        model: a plan that fits it.
        plan: what will be done.
        in_place: the model's own tensors will be written, not those of a copy.

    Raises:
        PlanError: names each.
    """
    names, problems = Names(model), list[Problem]()
    written: dict[int, str] = {}
    for step in plan.converted:
        if step.action in ("drop", "fresh", "insert"):
            continue
        if step.action == "wrap":
            problems += _wrap_problems(model, plan, step, names)
            layer = model.get_submodule(step.site)
            if in_place:
                problems += _write_problems(step.site, layer)
            written |= {id(t): f"{step.site}.{which}" for which, t in _tensors(layer)}
            continue
        state = norm_state(model.get_submodule(step.site))
        if isinstance(state, str):
            problems.append(Problem(step.site, state, "exclude it, or load sound statistics"))
        elif step.options.get("scale") == "exp":
            problems += _log_problems(model, step, state)
        for name, layer in _written(model, step):
            problems += _layer_problems(name, layer, step, names)
            written |= {id(tensor): f"{name}.{which}" for which, tensor in _tensors(layer)}
            if in_place:
                problems += _write_problems(name, layer)
    if in_place:
        problems += _overlap_problems(model, written)
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))


def _log_problems(model: nn.Module, step: Step, state: NormState) -> Iterator[Problem]:
    """Layers all of whose gains would be 0, which no exponential is."""
    scale = state.affine.scale
    for place, name in enumerate((*step.producers, *step.consumers)):
        weight = model.get_submodule(name)._parameters.get("weight")
        if weight is None or weight.is_meta or scale.is_meta:
            continue
        channels = Span.read(step.spans[place]).channels if step.spans else range(len(scale))
        factor = scale[list(channels)].to(weight.device)
        if step.consumers:
            some = bool(factor.any()) and bool(weight.any())
        else:
            layout = row_layouts(model.get_submodule(name))["weight"]
            some = bool((wide_row_norms(weight, layout) * factor).any())
        if not some:
            what = f"all gains that {step.site} gives it are 0, and none of those is e^(c·s)"
            yield Problem(name, what, "use scale='linear' there")


def _written(model: nn.Module, step: Step) -> Iterator[_Place]:
    """The layers whose tensors the step writes."""
    for name in (*step.producers, *step.consumers):
        yield name, model.get_submodule(name)


def _wrap_problems(model: nn.Module, plan: Plan, step: Step, names: Names) -> Iterator[Problem]:
    """What keeps a layer without a norm from being reparametrised."""
    layer = model.get_submodule(step.site)
    scale, c = str(step.options.get("scale", "linear")), step.options.get("c", 1.0)
    if found := obstacle_to("wn", layer, scale=scale, c=c):
        yield Problem(step.site, *found)
    elif problem := ties_problem(model, plan, step, names):
        yield problem


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    computed = [part for name in row_layouts(layer) for part in (name, f"{name}_g", f"{name}_v")]
    for name in (*computed, "weight_s", "weight_gain", "bias"):
        tensor = layer._parameters.get(name)
        if tensor is not None:
            yield name, tensor


def _layer_problems(name: str, layer: nn.Module, step: Step, names: Names) -> Iterator[Problem]:
    for which, tensor in _tensors(layer):
        if not tensor.is_floating_point():
            what = f"its {which} is {tensor.dtype}, which holds no product"
            yield Problem(name, what, "use action 'affine'")
        elif not all_finite(tensor):
            way_out = "load sound weights first; the meta device gives the structure alone"
            yield Problem(name, f"its {which} holds NaN or infinity", way_out)
        others = [owner for owner in names.owners(tensor) if owner != names.canonical(name)]
        if others:
            what = f"it shares its {which} with {', '.join(others)}"
            yield Problem(name, what, "use action 'affine'")
    becomes = step.target in ("wn", "wn+mobn") and not isinstance(layer, Reparametrised)
    unfit = unfit_for_weight_norm(layer) if becomes else ""
    if unfit:
        yield Problem(name, unfit, "use target 'plain' there")


def _write_problems(name: str, layer: nn.Module) -> Iterator[Problem]:
    way_out = "nc.convert works on a copy"
    for which, tensor in _tensors(layer):
        if not tensor.is_leaf:
            yield Problem(name, f"its {which} has a gradient history", way_out)
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            yield Problem(name, f"its {which} was made in inference mode", way_out)
        if any(
            not step and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            yield Problem(name, f"its {which} is an expanded view of fewer numbers", way_out)


def _overlap_problems(model: nn.Module, written: dict[int, str]) -> Iterator[Problem]:
    """Tensors that are written and lie, in part at least, in another tensor's memory."""
    spans = []
    for name, tensor in _all_tensors(model):
        if tensor.numel() and not tensor.is_meta and tensor.layout is torch.strided:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((size - 1) * step for size, step in steps)
            start = tensor.data_ptr()
            spans.append((start, start + extent * tensor.element_size(), name, id(tensor)))
    spans.sort()
    end, holder, held = 0, "", 0
    for start, stop, name, tensor_id in spans:
        if start < end and {held, tensor_id} & written.keys() and held != tensor_id:
            what = f"its memory is also that of {holder}"
            yield Problem(name, what, "nc.convert works on a copy")
        if stop > end:
            end, holder, held = stop, name, tensor_id


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
