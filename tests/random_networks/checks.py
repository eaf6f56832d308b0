"""What must hold for every random network: each target converts it and proves it, or refuses it.

`check` runs everything on one program and says what became of it; a promise that does not hold is an
AssertionError that names it. The comparisons here are made anew, beside those of `prove`.
"""

from __future__ import annotations

import copy
import pickle
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normconv.api import to_graph
from normconv.errors import Refused
from normconv.folding import fold
from normconv.graph import is_norm
from normconv.layers import Reparametrised
from normconv.numerics import relative_l2
from normconv.plan import Plan
from normconv.proof import coarsest_dtype, evaluate, flat_outputs
from normconv.surgery import apply_plan
from tests.cases import EXACT
from tests.random_networks.expected import must_fold, refused_norms
from tests.random_networks.program import Program
from tests.random_networks.snapshots import assert_unchanged, snapshot, tensors_of
from tests.random_networks.subject import (
    Subject,
    assert_close,
    assert_equal,
    assert_proved,
    assert_same_in_own_dtype,
    in_branches,
)
from tests.random_networks.views import check_captures, check_export, check_sight

__all__ = ["Checked", "assert_samples_apart", "check", "check_drawn"]


@dataclass
class Checked:
    """What became of one network.

    Args:
        actions: by target, how many sites got which.
        refusals: by target, the reasons.
        captures: which captures passed.
        export: of a target's result; ``proved``, or why it could not be.
        blind: a site that could not be seen, and why.
    """

    actions: dict[str, Counter[str]] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    captures: tuple[str, ...] = ()
    export: str = ""
    blind: str = ""


def check(program: Program, *, site: int = 0, captures: bool = True, export: str = "") -> Checked:
    """Check every target on one network.

    Args:
        program: the network.
        site: which site is moved, to see that the proof sees it.
        captures: whether to compare the captures.
        export: a target whose result is exported and run in ONNX Runtime.

    Raises:
        AssertionError: a promise does not hold.
    """
    outcome, model = Checked(), program.model()
    subject = Subject.of(program, model)
    if any(layer.kind == "functional" for _, _, layer in program.calls(aux=True)):
        for target in EXACT:
            refusal = _refusal(subject, target.name)
            assert "graph" in str(refusal), f"the way out is not named: {refusal}"
            outcome.refusals[target.name] = [problem.what for problem in refusal.problems]
        if any(op.kind == "branch" for op in program.ops):
            return outcome  # fx cannot make a graph of it
        graph = to_graph(model, program.args(), program.kwargs())
        if not any(is_norm(module) for module in graph.modules()):
            return outcome  # no output needs one, so that the graph has none
        subject = Subject.of(program, graph)
    if captures:
        outcome.captures = check_captures(subject)
    if refused_norms(program):
        for target in EXACT:
            outcome.refusals[target.name] = _check_refused(subject, target.name)
        return outcome
    for target in EXACT:
        plan = _check_target(subject, target.name)
        outcome.actions[target.name] = Counter(plan.counts())
        if target.name == "wn":
            outcome.blind = check_sight(subject, plan, site)
    if export:
        outcome.export = check_export(subject, export)
    return outcome


def check_drawn(program: Program, *, captures: int, exports: int) -> Checked:
    """Check a program; what is slow only on a share, which the program's own text draws.

    Args:
        program: the network.
        captures: the captures are compared on one network in so many.
        exports: one float32 network in so many is exported.
    """
    drawn = zlib.crc32(repr(program).encode())
    export = program.dtype == "float32" and drawn // 7 % exports == 0
    return check(
        program,
        site=drawn,
        captures=drawn % captures == 0,
        export=EXACT[drawn // 3 % len(EXACT)].name if export else "",
    )


# --- what is refused ------------------------------------------------------------------------------


def _refusal(subject: Subject, target: str) -> Refused:
    before, refusal = snapshot(subject.model), None
    try:
        subject.plan(target)
    except Refused as raised:
        refusal = raised
    assert refusal is not None, f"{target} takes what it must refuse"
    assert refusal.problems, "a refusal without a problem"
    for problem in refusal.problems:
        whole = problem.where and problem.what and problem.way_out
        assert whole, f"a refusal without a place, a reason or a way out: {problem!r}"
    assert_unchanged(before, subject.model, "a refused plan")
    return refusal


def _check_refused(subject: Subject, target: str) -> list[str]:
    """Refused when strict; else what can be is converted, and the rest is kept and listed."""
    refusal, expected = _refusal(subject, target), refused_norms(subject.program)
    places = {problem.where for problem in refusal.problems}
    assert places == expected, f"refused are {sorted(places)}, not {sorted(expected)}: {refusal}"
    plan = subject.plan(target, strict=False)
    kept = {step.site for step in plan.steps if step.action == "keep"}
    assert kept == expected, f"kept are {sorted(kept)}, not {sorted(expected)}"
    if plan.converted:
        result = apply_plan(subject.model, plan).model
        assert_proved(subject, result, plan)
        left = {name for name, module in result.named_modules() if is_norm(module)}
        assert left == expected, f"norms left are {sorted(left)}, not {sorted(expected)}"
    return [problem.what for problem in refusal.problems]


# --- what is converted ----------------------------------------------------------------------------


def _check_target(subject: Subject, target: str) -> Plan:
    model = subject.model
    before, given = snapshot(model), [*subject.args, *subject.kwargs.values()]
    kept = [tensor.clone() for tensor in given]
    plan = subject.plan(target)
    result = apply_plan(model, plan).model
    assert_proved(subject, result, plan)
    assert_unchanged(before, model, f"converting to {target}")
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), "an input changed"
    if target in ("wn", "plain"):
        _assert_folds(subject.program, plan)
    _assert_same_function(subject, apply_plan(subject.wide, plan).model)
    assert_same_in_own_dtype(subject, result)
    _assert_structure(subject, result)
    _assert_copies(subject, result)
    _assert_loads(subject, result, plan)
    if target == "wn":
        assert_samples_apart(subject, result)
    return plan


def _assert_folds(program: Program, plan: Plan) -> None:
    steps = {step.site: step for step in plan.steps}
    for norm, producer in must_fold(program).items():
        step = steps[norm]
        done = step.action == "fold" and step.producers == (producer,)
        assert done, f"{norm} is not folded into {producer} but {step.action}: {step.reason}"


def _assert_same_function(subject: Subject, result: nn.Module) -> None:
    """In float64: as it is, folded, folded further, and in the branches of training."""
    args, kwargs = subject.wide_inputs
    expected = evaluate(subject.wide, args, kwargs)
    bounds = subject.bounds(expected)
    folded = fold(result).model
    further = fold(result, example_inputs=args, example_kwargs=kwargs).model
    candidates = {"converted": result, "folded": folded, "folded further": further}
    for name, model in candidates.items():
        assert_close(evaluate(model, args, kwargs), expected, bounds, f"{name}, float64")
    if subject.program.aux and not subject.is_graph:
        expected = in_branches(subject.wide, args, kwargs)
        for name, model in candidates.items():
            got = in_branches(model, args, kwargs)
            assert_close(got, expected, bounds, f"{name}, float64, in training's branches")


def _assert_structure(subject: Subject, result: nn.Module) -> None:
    """No norm is left; names, classes, modes are; no tensor is shared with the original."""
    left = [name for name, module in result.named_modules() if is_norm(module)]
    assert left == [], f"norms left: {left}"
    shared = {id(t) for _, t in tensors_of(subject.model)} & {id(t) for _, t in tensors_of(result)}
    assert not shared, "the result shares tensors with its original"
    assert type(result) is type(subject.model) or subject.is_graph
    if subject.is_graph:
        return
    after = dict(result.named_modules(remove_duplicate=False))
    for path, module in subject.model.named_modules(remove_duplicate=False):
        assert path in after, f"{path} is gone"
        twin: Any = after[path]
        assert twin.training is module.training, f"{path} changes its mode"
        plain = twin.plain_class if isinstance(twin, Reparametrised) else type(twin)
        assert plain is type(module) or is_norm(module), f"{path} is now a {type(twin).__name__}"


def _assert_copies(subject: Subject, result: nn.Module) -> None:
    args, kwargs = subject.args, subject.kwargs
    expected = evaluate(result, args, kwargs)
    for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert_equal(evaluate(twin, args, kwargs), expected, "a copy")


def _assert_loads(subject: Subject, result: nn.Module, plan: Plan) -> None:
    """The state goes strictly into the plan applied to a fresh network."""
    args, kwargs = subject.args, subject.kwargs
    model = apply_plan(subject.fresh(), Plan.from_json(plan.to_json())).model
    assert list(model.state_dict()) == list(result.state_dict()), "other keys on a fresh model"
    model.load_state_dict(result.state_dict(), strict=True)
    assert_equal(evaluate(model, args, kwargs), evaluate(result, args, kwargs), "a loaded model")
    trained = {name: p.requires_grad for name, p in result.named_parameters()}
    same = {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert same, "a fresh model trains other parameters"


def assert_samples_apart(subject: Subject, result: nn.Module) -> None:
    """In training mode another second sample changes nothing of the first."""
    args, kwargs = subject.args, subject.kwargs
    other = args[0].clone()
    other[1] += 1
    found = []
    for first in (args[0], other):
        model = copy.deepcopy(result).train()
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(flat_outputs(model(first.clone(), *args[1:], **kwargs)))
    tolerance = 64 * torch.finfo(coarsest_dtype(result)).eps
    for key, value in found[0].items():
        if value.shape[0] == args[0].shape[0]:
            error = relative_l2(found[1][key][0], value[0])
            assert error <= tolerance, f"{key}: one sample sees another ({error:.3g})"
