"""From a model and a recipe to a plan. Pure: the model is read, traced and left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.errors import PlanError, Problem, UsageError
from normconv.graph import (
    Site,
    Survey,
    couples_in_training,
    is_norm,
    norm_names,
    submodule,
    survey,
    survey_within,
    untouched_defaults,
)
from normconv.layers import kind_of
from normconv.plan import KEEP, Plan, Recipe, Rule, Step, history_of
from normconv.surgery.identity import fingerprint
from normconv.surgery.insertions import check_insertion, insertion_steps
from normconv.surgery.layer_steps import (
    Layers,
    LayerSteps,
    check_layers,
    layer_names,
    layer_steps,
)
from normconv.surgery.lazy import lazy_modules, lazy_note, materialised
from normconv.surgery.wrappers import refuse_wrapped
from normconv.targets import make_target

__all__ = ["checked_inputs", "make_plan"]

_LISTED = 5  # names in one note


def make_plan(
    model: nn.Module,
    to: str | Rule | Recipe | Sequence[Rule] = "wn",
    *,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    strict: bool = True,
    drop_unreached: bool = False,
    at: str = "",
    layers: Layers | None = None,
    insert_after: str | Iterable[str] = (),
) -> Plan:
    """Decide what becomes of every norm of a model, or of the layers of one without norms.

    Nothing is changed.

    Args:
        model: any module. Lazy layers get their shapes from the example inputs, on a copy; the plan then
            fits the model once it was called.
        to: a target name, see the README, rules or a `Recipe`.
        example_inputs: positional inputs, as `torch.export` takes them; shapes count, values do not.
        example_kwargs: keyword inputs.
        include: globs of sites to convert, by norms' names, or layers' where those are spoken of; all by
            default.
        exclude: globs of sites to keep.
        options: the target's options.
        strict: refuse when a norm would stay that was not excluded; else keep it and list it.
        drop_unreached: empty the slots of norms that neither eval nor train mode calls.
        at: the name of a submodule: only its norms are spoken of, and only it need be traceable. The
            inputs are still those of the whole model, which is run once to see what the submodule gets.
        layers: with ``wn``, which layers are reparametrised: the ``normed`` ones, or ``all`` that have a
            weight, but for embeddings unless asked for; None takes the normed ones where there are norms,
            else all.
        insert_after: with ``gn``, globs of layers that have no norm and get one.

    Raises:
        PlanError: some norm cannot be converted; names each, with the reason and the way out.
        CaptureError: no dataflow graph could be made of the model.
        UsageError: unknown target or option, a rule that matches no site, or no submodule `at`.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> plan = make_plan(net, "wn", example_inputs=(torch.zeros(1, 3, 8, 8),))
    >>> [(step.site, step.action, step.producers) for step in plan.steps]
    [('1', 'fold', ('0',))]
    """
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    recipe = Recipe.of(to, include=include, exclude=exclude, options=options)
    for rule in recipe.rules:
        if rule.to != KEEP:
            make_target(rule.to, rule.options)  # a wrong name or option is told before any work
    takes_layers = check_layers(layers, recipe)
    globs = check_insertion(insert_after, recipe)
    refuse_wrapped(submodule(model, at) if at else model)
    lazy = len(lazy_modules(model))
    model = materialised(model, args, kwargs)
    _refuse_empty_norms(model)
    args, kwargs = _where_the_model_is(model, args, kwargs)
    found, found_notes = _surveyed(model, at, args, kwargs)
    normless = not found.sites and not found.functional_norms
    of_all = layers == "all" or (
        layers is None and takes_layers and normless and not history_of(model)
    )
    of_normed = layers is None and takes_layers and not of_all
    candidates = layer_names(model, at) if of_all or globs else ()
    if normless and not candidates:
        raise PlanError(_nothing_to_do(model, at))
    kinds = [(name, kind_of(model.get_submodule(name))) for name in candidates]
    recipe.check_used([(site.name, site.op) for site in found.sites] + kinds)
    problems: list[Problem] = _functional_problems(found)
    steps = [_step(site, recipe, drop_unreached, problems) for site in found.sites]
    rest = layer_steps(model, recipe, steps, at=at) if of_all else LayerSteps()
    if globs:
        rest = rest.joined(insertion_steps(model, recipe, globs, steps, args, kwargs, at=at))
    steps += rest.steps
    problems += rest.problems
    if normless and not problems and all(step.action == "keep" for step in steps):
        raise PlanError(_none_taken(model, at, steps, rest.notes))
    if problems and strict:
        raise PlanError(problems)
    return Plan(
        steps=tuple(steps),
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        capture=found.method,
        targets=recipe.targets,
        at=at,
        notes=(
            *((lazy_note(lazy),) if lazy else ()),
            *_notes(found),
            *found_notes,
            *((_NORMLESS,) if normless and of_all else ()),
            *(_left_plain(model, at, steps) if of_normed else ()),
            *rest.notes,
            *(f"kept: {problem}" for problem in problems),
            *_coupling(model, found, steps),
        ),
    )


_NORMLESS = (
    "there are no norms with running statistics: all layers with a weight are reparametrised "
    "(layers='all')"
)


def _left_plain(model: nn.Module, at: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Say which layers the default leaves out."""
    folded = {layer for step in steps for layer in (*step.producers, *step.consumers)}
    left = [name for name in layer_names(model, at) if name not in folded]
    if not left:
        return ()
    more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
    listed = ", ".join(name or "the model itself" for name in left[:_LISTED]) + more
    what = f"layers='normed', the default where there are norms: none is folded into {listed}, "
    return (what + "which stay as they are; layers='all' takes them too",)


def _refuse_empty_norms(model: nn.Module) -> None:
    """A norm of nothing cannot be traced, and what then fails does not name it."""
    problems = []
    for name, module in model.named_modules():
        mean = getattr(module, "running_mean", None) if is_norm(module) else None
        if mean is not None and not mean.numel():
            what = f"{type(module).__name__} has zero channels"
            problems.append(Problem(name, what, "take it out of the model"))
    if problems:
        raise PlanError(problems)


def _where_the_model_is(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put inputs on the meta device for a model that is there whole: only their shapes count."""
    parameters = list(model.parameters())
    if not parameters or not all(parameter.is_meta for parameter in parameters):
        return args, kwargs
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )
    return moved


def _surveyed(
    model: nn.Module, at: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Survey, tuple[str, ...]]:
    """Judge the norms of the model, or of its submodule `at`; with what a reader should know."""
    if at:
        found, reached = survey_within(model, at, args, kwargs)
        inner = model.get_submodule(at)
        return found, reached.notes + _assumptions(inner, reached.args, reached.kwargs)
    methods = None
    if not norm_names(model) and not any(p.is_meta for p in model.parameters()):
        methods = ("fx", "hooks")  # only norms called as functions are looked for: one pass tells
    found = survey(model, args, kwargs, methods=methods)
    return found, _assumptions(model, args, kwargs) if found.sites else ()


def checked_inputs(
    model: object, args: Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take one tensor for a tuple of one, and refuse what is no model.

    Raises:
        UsageError: the model is no `nn.Module`, or has no `forward`.
    """
    if not isinstance(model, nn.Module):
        ways = {
            "str": "load it: nc.load(path)",
            "ExportedProgram": "convert the model it came from",
        }
        way_out = ways.get(type(model).__name__, "")
        raise UsageError(Problem("model", f"it is a {type(model).__name__}, no nn.Module", way_out))
    own = (vars(kind) for kind in type(model).__mro__ if kind is not nn.Module)
    if not any("forward" in names for names in (vars(model), *own)):
        what = f"{type(model).__name__} has no forward: nothing says what feeds what"
        raise UsageError(Problem("model", what, "give the module that calls its parts"))
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    return args, dict(kwargs or {})


def _none_taken(model: nn.Module, at: str, kept: Sequence[Step], notes: Sequence[str]) -> Problem:
    if not kept:
        return _nothing_to_do(model, at)
    reasons = [*dict.fromkeys(step.reason for step in kept)][:_LISTED]
    what = f"it has no norms, and none of its {len(kept)} layers is taken"
    why = "; ".join([*reasons, *notes])
    return Problem(at or type(model).__name__, f"{what} ({why})", "see include= and exclude=")


def _nothing_to_do(model: nn.Module, at: str) -> Problem:
    where = at or type(model).__name__
    done = [entry["apply"] for entry in history_of(model) if "apply" in entry]
    if done:
        targets = ", ".join(dict.fromkeys(target for plan in done for target in plan["targets"]))
        what = f"it is converted already ({targets}, {len(done[-1]['steps'])} sites)"
        way_out = "convert the original for another target; nc.fold(model) gives plain weights"
        return Problem(where, what, way_out)
    return Problem(
        where,
        "it has no BatchNorm nor any other norm with running statistics",
        "to='wn', layers='all' reparametrises the layers; `normconv inspect` shows what is in it",
    )


def _step(site: Site, recipe: Recipe, drop_unreached: bool, problems: list[Problem]) -> Step:
    """Make the step of one site; what stands in the way is appended to `problems`."""
    rule = recipe.rule_for(site.name, site.op)
    if rule is None or rule.to == KEEP:
        why = "no rule matches it" if rule is None else f"excluded by '{rule.match}'"
        return _plan_step(site, KEEP, "keep", why)
    target = make_target(rule.to, rule.options)
    if site.phase == "none":
        if drop_unreached:
            return _plan_step(site, rule.to, "drop", "called in neither mode", fidelity="exact")
        problem = Problem(
            site.name,
            "it is called neither in eval nor in training mode",
            f"exclude it (--exclude '{site.name}') or empty its slot (--drop-unreached)",
        )
    else:
        decision = target.decide(site)
        if not isinstance(decision, Problem):
            return _plan_step(
                site,
                rule.to,
                decision.action,
                decision.reason,
                fidelity=decision.fidelity or target.fidelity,
                producers=decision.producers,
                consumers=decision.consumers,
                spans=decision.spans,
                options=dict(rule.options if decision.options is None else decision.options),
            )
        problem = decision
    problems.append(problem)
    return _plan_step(site, KEEP, "keep", problem.what)


def _plan_step(site: Site, target: str, action: Any, reason: str, **more: Any) -> Step:
    return Step(
        site=site.name,
        norm=site.norm,
        target=target,
        action=action,
        channels=site.channels,
        op=site.op,
        aliases=site.aliases,
        shape=site.shape,
        phase=site.phase,
        reason=reason,
        eps=site.eps,
        **more,
    )


def _functional_problems(found: Survey) -> list[Problem]:
    return [
        Problem(
            name,
            "F.batch_norm is called as a function, which no module holds",
            'ask for a rewritten graph: output="graph" (--output graph)',
        )
        for name in found.functional_norms
    ]


def _assumptions(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    fixed = untouched_defaults(model, args, kwargs)
    if not fixed:
        return ()
    values = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
    return (f"the dataflow was judged for {values}; example_kwargs= covers other values",)


def _coupling(model: nn.Module, found: Survey, steps: Sequence[Step]) -> list[str]:
    """Say where samples would go on seeing each other."""
    notes = []
    kept = [step.site for step in steps if step.action == "keep"]
    mixing = [name for name in kept if couples_in_training(model.get_submodule(name))]
    if mixing:
        more = f" and {len(mixing) - _LISTED} more" if len(mixing) > _LISTED else ""
        listed = ", ".join(mixing[:_LISTED]) + more
        notes.append(f"samples of a batch still see each other in training mode, in {listed}")
    if found.batch_calls:
        notes.append(
            f"samples of a batch see each other in {found.batch_calls} calls of F.batch_norm with "
            "training=True, in eval mode too"
        )
    return notes


def _notes(found: Survey) -> list[str]:
    if not found.sites and not found.functional_norms:
        return []  # then no dataflow was judged
    notes = [f"capture by {name} failed: {reason}" for name, reason in found.failures.items()]
    if found.method == "hooks":
        notes.append(
            "the dataflow is that of one forward pass on the example inputs: other inputs may take "
            "other paths"
        )
    untrained = sum(site.untrained for site in found.sites)
    if untrained:
        notes.append(
            f"{untrained} of {len(found.sites)} norms still have initial statistics (mean 0, "
            "variance 1): the function is kept, but it is that of an untrained norm"
        )
    training_only = [site.name for site in found.sites if site.phase == "train"]
    if training_only:
        notes.append(f"only training mode calls {', '.join(training_only)}")
    return notes
