"""From a plan and a model to a new model: all of it, or an error and nothing."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from normconv.errors import PlanError, Problem
from normconv.graph import Names, norm_names
from normconv.graph.passes import settle_
from normconv.graph.rewrite import empty_slot_
from normconv.layers import copy_model, layout_of
from normconv.plan import Plan, Step, record
from normconv.report import Report
from normconv.surgery.identity import fingerprint
from normconv.surgery.wrappers import refuse_wrapped
from normconv.targets import make_target

__all__ = ["Result", "apply_plan"]

_LISTED = 5  # problems of a plan that does not fit; more say nothing new


class Result(NamedTuple):
    """What every verb that makes a model returns.

    Args:
        model: the new model; the argument is never changed.
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
    refuse_wrapped(model)
    _check_fit(model, plan)
    twin = copy_model(model)
    _carry_out(twin, plan)
    settle_(twin)
    record(twin, {"apply": plan.to_dict()})
    return Result(twin, plan.report("apply"))


def _carry_out(model: nn.Module, plan: Plan) -> None:
    problems: list[Problem] = []
    for step in plan.converted:
        try:
            if step.action == "drop":
                empty_slot_(model, (step.site, *step.aliases))
            else:
                make_target(step.target, step.options).edit(model, step)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)


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
    missing = [name for name in norm_names(model) if name not in planned]
    return [Problem(name, "two steps of the plan speak of it", "leave one") for name in twice] + [
        Problem(name, "no step of the plan speaks of this norm", "give it one with action 'keep'")
        for name in missing
    ]


def _producer_problems(model: nn.Module, step: Step, name: str) -> list[Problem]:
    """What keeps a layer that a plan names from absorbing the norm, whatever feeds what."""
    layer = model.get_submodule(name)
    layout, weight = layout_of(layer), layer._parameters.get("weight")
    if layout is None or weight is None:
        what = f"it is a {type(layer).__name__} and cannot absorb {step.site}"
        return [Problem(name, what, "use action 'affine'")]
    if layout.channels(weight) != step.channels:
        what = f"it has {layout.channels(weight)} output channels, {step.site} {step.channels}"
        return [Problem(name, what, "use action 'affine'")]
    return []


def _step_problems(model: nn.Module, step: Step) -> list[Problem]:
    problems: list[Problem] = []
    for name in (step.site, *step.aliases, *step.producers):
        try:
            model.get_submodule(name)
        except AttributeError:
            problems.append(Problem(name, "the plan names it and the model has no such module"))
    if step.action == "fold" and not step.producers:
        problems.append(
            Problem(step.site, "the plan folds it into no layer", "use action 'affine'")
        )
    if problems:
        return problems
    if step.action == "drop" and step.phase != "none":
        problems.append(Problem(step.site, "the plan drops a norm that is called", "keep it"))
    if len(set(step.producers)) != len(step.producers):
        problems.append(
            Problem(step.site, "the plan folds it twice into one layer", "name it once")
        )
    if step.action not in ("keep", "drop"):
        able = make_target(step.target, step.options).actions
        if step.action not in able:
            what = f"target {step.target} cannot do '{step.action}'"
            problems.append(Problem(step.site, what, f"use one of {list(able)}"))
    if step.action == "fold":
        for name in step.producers:
            problems += _producer_problems(model, step, name)
    found = type(model.get_submodule(step.site)).__name__
    if found != step.norm:
        problems.append(
            Problem(step.site, f"the plan expects a {step.norm}, the model has a {found}")
        )
    return problems
