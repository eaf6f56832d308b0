"""From a plan and a model to a new model: all of it, or an error and nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from normconv.errors import PlanError, Problem
from normconv.graph import Names, norm_names
from normconv.graph.passes import settle_
from normconv.graph.rewrite import empty_slot_
from normconv.layers import copy_model, layout_of
from normconv.plan import Plan, Span, Step, record
from normconv.report import Report
from normconv.surgery.identity import fingerprint
from normconv.surgery.layer_steps import rows_of
from normconv.surgery.lazy import lazy_problems
from normconv.surgery.originals import originals
from normconv.surgery.ready import check_tensors
from normconv.surgery.wrappers import refuse_wrapped
from normconv.targets import make_target

__all__ = ["Result", "apply_plan", "apply_plan_", "check_plan"]

_LISTED = 5  # problems of a plan that does not fit; more say nothing new


class Result(NamedTuple):
    """What every verb that makes a model returns.

    Args:
        model: the new model; the argument is never changed, unless the verb's name ends in ``_``.
        report: what was done and what was proved.
    """

    model: nn.Module
    report: Report


def apply_plan(model: nn.Module, plan: Plan) -> Result:
    """Carry a plan out on a copy of a model.

    No data and no inputs are needed: on a fresh, random or meta model of the same architecture this
    gives the converted *structure*, into which a converted checkpoint loads strictly.

    Args:
        model: of the architecture the plan was made for; not changed.
        plan: from `make_plan` or a file, edited or not.

    Raises:
        PlanError: the plan does not fit the model, or a step cannot be done; lists all such.

    >>> import torch, normconv as nc
    >>> def factory(): return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> plan = nc.make_plan(factory(), "wn", example_inputs=(torch.zeros(1, 3, 8, 8),))
    >>> list(nc.apply_plan(factory(), plan).model.state_dict())
    ['0.weight_g', '0.weight_v', '0.bias']
    """
    check_plan(model, plan)
    return _carried_out(copy_model(model), plan)


def apply_plan_(model: nn.Module, plan: Plan) -> Result:
    """Carry a plan out on the model itself, all of it or nothing.

    Memory: weights are rewritten where they lie, in float64 a few rows at a time, so that beyond the
    model it takes a scratch of some 4 MiB and what is new: a gain and a bias a row, an affine map a
    channel. Everything that could stop the edit is checked before the first write; after that only a
    lack of memory can.

    Parameters keep their identity: an optimizer made before goes on with all that the model still has.
    `weight_v` of a weight-normed layer is the very parameter that `weight` was. Gradients of rewritten
    parameters are dropped. The report names what is new and what is gone under ``new parameters`` and
    ``gone parameters``.

    Args:
        model: of the architecture the plan was made for; changed.
        plan: from `make_plan` or a file, edited or not.

    Raises:
        PlanError: the plan does not fit the model, or a step cannot be done; lists all such, and the
            model is as it was.

    >>> import torch, normconv as nc
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> plan = nc.make_plan(net, "wn", example_inputs=(torch.zeros(1, 3, 8, 8),))
    >>> weight, result = net[0].weight, nc.apply_plan_(net, plan)
    >>> result.model is net, net[0].weight_v is weight, result.report.facts["new parameters"]
    (True, True, ['0.weight_g'])
    """
    check_plan(model, plan, in_place=True)
    before = {id(p): (name, p) for name, p in model.named_parameters()}
    result = _carried_out(model, plan)
    after = {id(p): name for name, p in model.named_parameters()}
    facts = {
        "new parameters": [name for key, name in after.items() if key not in before],
        "gone parameters": [name for key, (name, _) in before.items() if key not in after],
    }
    return Result(model, result.report.extended(facts=facts))


def check_plan(model: nn.Module, plan: Plan, *, in_place: bool = False) -> None:
    """Refuse a plan that could not be carried out whole; nothing is changed.

    Args:
        model: what the plan would be applied to.
        plan: from `make_plan` or a file, edited or not.
        in_place: the model's own tensors would be written, not those of a copy.

    Raises:
        PlanError: lists all that is wrong.
    """
    if plan.at and not Names(model).known(plan.at):
        what = f"the plan works within it, and the {type(model).__name__} has no such module"
        raise PlanError(Problem(plan.at, what, "make a plan for this model"))
    refuse_wrapped(model.get_submodule(plan.at))
    if in_place and any(_needs_a_slot(step) for step in plan.converted):
        what = "it is itself a norm: nothing holds its slot"
        raise PlanError(Problem(type(model).__name__, what, "wrap it: nn.Sequential(model)"))
    if lazy := lazy_problems(model):
        raise PlanError(lazy)
    _check_fit(model, plan)
    check_tensors(model, plan, in_place=in_place)


def _carried_out(model: nn.Module, plan: Plan) -> Result:
    was = originals(model, plan)
    if any(_needs_a_slot(step) for step in plan.converted):
        holder = nn.Sequential(model)  # a model that is itself a norm: something must hold its slot
        notes = _carry_out(holder, [replace(step, site="0") for step in plan.converted])
        model = holder[0]
    else:
        notes = _carry_out(model, plan.converted)
    settle_(model)
    record(model, {"apply": plan.to_dict(), **({"was": was} if was else {})})
    return Result(model, plan.report("apply").extended(notes=notes))


def _needs_a_slot(step: Step) -> bool:
    """Whether the model itself is what the step replaces."""
    return not step.site and step.action != "wrap"


def _carry_out(model: nn.Module, steps: Iterable[Step]) -> tuple[str, ...]:
    problems: list[Problem] = []
    notes: list[str] = []
    # Of two norms around one layer the one before it goes first: weight norm comes last.
    for step in sorted(steps, key=lambda step: step.action != "forward"):
        try:
            if step.action == "drop":
                empty_slot_(model, (step.site, *step.aliases))
            else:
                notes += make_target(step.target, step.options).edit(model, step) or ()
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    return tuple(notes)


def _check_fit(model: nn.Module, plan: Plan) -> None:
    problems = [problem for step in plan.steps for problem in _step_problems(model, step)]
    problems += _coverage_problems(model, plan)
    if not problems and fingerprint(model) != plan.fingerprint:
        problems = [
            Problem(
                type(model).__name__,
                f"its structure is not that of the {plan.model} the plan was made for, though all "
                "sites are there",
                "make a new plan for this model",
            )
        ]
    if len(problems) > _LISTED:
        what = f"the plan is for {plan.model} ({len(plan.steps)} norms), this is {type(model).__name__}"
        rest = Problem("", f"{len(problems) - _LISTED} more of the kind")
        problems = [Problem("plan", what, "make a plan for it"), *problems[:_LISTED], rest]
    if problems:
        raise PlanError(problems)


def _coverage_problems(model: nn.Module, plan: Plan) -> list[Problem]:
    """Every norm has one step: a step left out of an edited plan would keep a norm in silence."""
    known = Names(model)
    planned = Counter(
        known.canonical(name)
        for step in plan.steps
        for name in (step.site, *step.aliases)
        if known.known(name)
    )
    counted = {name: 1 + len(known.aliases(name)) for name in planned}
    twice = [name for name, times in planned.items() if times > counted[name]]
    layers = {s.site for s in plan.converted if s.action in ("wrap", "insert")}
    folded = [n for s in plan.converted for n in (*s.producers, *s.consumers) if s.action != "wrap"]
    twice += [name for name in dict.fromkeys(folded) if name in layers]
    norms = norm_names(model.get_submodule(plan.at))
    wanted = [known.canonical(".".join(filter(None, (plan.at, name)))) for name in norms]
    missing = [name for name in wanted if name not in planned]
    return [Problem(name, "two steps of the plan speak of it", "leave one") for name in twice] + [
        Problem(name, "no step of the plan speaks of this norm", "give it one with action 'keep'")
        for name in missing
    ]


def _layer_problems(model: nn.Module, step: Step, name: str, span: str) -> list[Problem]:
    """What keeps a layer that a plan names from absorbing the norm, whatever feeds what."""
    layer = model.get_submodule(name)
    layout, weight = layout_of(layer), layer._parameters.get("weight")
    forward = step.action == "forward"
    if layout is None or weight is None or (forward and layout.transposed):
        what = f"it is a {type(layer).__name__} and cannot absorb {step.site}"
        return [Problem(name, what, "use action 'affine'")]
    try:
        channels = Span.read(span) if span else Span(0, step.channels)
    except ValueError as error:
        return [Problem(step.site, str(error), "make a new plan")]
    features = layout.channels(weight)
    if forward:
        features = weight.shape[1] * getattr(layer, "groups", 1)
    if channels.features != features or channels.stop > step.channels:
        kind = "input" if forward else "output"
        what = f"it has {features} {kind} channels, {step.site} {step.channels}"
        what += f" (span {span})" if span else ""
        return [Problem(name, what, "use action 'affine'")]
    return []


def _rows_problems(model: nn.Module, step: Step) -> list[Problem]:
    """What keeps a layer without a norm from what the plan has for it."""
    if step.consumers or len(step.producers) > (step.action == "wrap"):
        what = f"'{step.action}' is about one layer, and 'wrap' may name one that it shares with"
        return [Problem(step.site, what, "make a new plan")]
    try:
        layer = model.get_submodule(step.site)
    except AttributeError:
        return []  # said already
    rows = rows_of(layer)
    if rows != step.channels:
        return [
            Problem(step.site, f"the plan expects {step.channels} rows, its weights have {rows}")
        ]
    return []


def _step_problems(model: nn.Module, step: Step) -> list[Problem]:
    problems: list[Problem] = []
    for name in (step.site, *step.aliases, *step.producers, *step.consumers):
        try:
            model.get_submodule(name)
        except AttributeError:
            problems.append(Problem(name, "the plan names it and the model has no such module"))
    into = {"fold": step.producers, "standardize": step.producers, "forward": step.consumers}
    layers = into.get(step.action, ())
    if step.action in ("wrap", "insert"):
        problems += _rows_problems(model, step)
    if step.action in into and not layers:
        problems.append(
            Problem(step.site, "the plan folds it into no layer", "use action 'affine'")
        )
    if layers and step.spans and len(step.spans) != len(layers):
        problems.append(Problem(step.site, "the plan has not one span for each layer"))
    if problems:
        return problems
    if step.action == "drop" and step.phase != "none":
        problems.append(Problem(step.site, "the plan drops a norm that is called", "keep it"))
    if len(set(layers)) != len(layers):
        problems.append(
            Problem(step.site, "the plan folds it twice into one layer", "name it once")
        )
    if step.action not in ("keep", "drop"):
        able = make_target(step.target, step.options).actions
        if step.action not in able:
            what = f"target {step.target} cannot do '{step.action}'"
            problems.append(Problem(step.site, what, f"use one of {list(able)}"))
    groups = step.options.get("groups")
    if isinstance(groups, int) and groups > 0 and step.channels % groups:
        what = f"{step.channels} channels are not divisible into {groups} groups"
        problems.append(Problem(step.site, what, "name a divisor"))
    for name, span in zip(layers, step.spans or ("",) * len(layers), strict=True):
        problems += _layer_problems(model, step, name, span)
    found = type(model.get_submodule(step.site)).__name__
    if found != step.norm:
        problems.append(
            Problem(step.site, f"the plan expects a {step.norm}, the model has a {found}")
        )
    return problems
