"""Layers that no norm is folded into, and what becomes of them: reparametrised as they are, or kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from normconv.errors import Problem, UsageError
from normconv.graph import Names, norm_names
from normconv.layers import Reparametrised, kind_of, obstacle_to, row_layouts
from normconv.plan import KEEP, Plan, Recipe, Rule, Step
from normconv.targets import WeightNorm, make_target

__all__ = [
    "LayerSteps",
    "Layers",
    "check_layers",
    "layer_names",
    "layer_steps",
    "rows_of",
    "ties_problem",
]

Layers = Literal["normed", "all"]


@dataclass(frozen=True)
class LayerSteps:
    """The steps of layers.

    Args:
        steps: one for each layer that the recipe speaks of.
        problems: layers that cannot be taken and should be.
        notes: what the reader should know.
    """

    steps: tuple[Step, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def joined(self, other: LayerSteps) -> LayerSteps:
        """Return both; of a layer that both speak of, what the other says."""
        sites = {step.site for step in other.steps}
        own = tuple(step for step in self.steps if step.site not in sites)
        return LayerSteps(
            own + other.steps, self.problems + other.problems, self.notes + other.notes
        )


def check_layers(layers: object, recipe: Recipe) -> bool:
    """Say whether some rule's target takes layers without a norm.

    Raises:
        UsageError: `layers` is no such word, or asks for what no target does.
    """
    if layers not in (None, "normed", "all"):
        raise UsageError(Problem("layers", f"it is 'normed' or 'all', not {layers!r}"))
    targets = [make_target(rule.to, rule.options) for rule in recipe.rules if rule.to != KEEP]
    able = any(isinstance(target, WeightNorm) for target in targets)
    if layers == "all" and not able:
        what = f"{', '.join(recipe.targets) or KEEP} does nothing to a layer without a norm"
        raise UsageError(Problem("layers='all'", what, "to='wn' does"))
    return able


def layer_names(model: nn.Module, at: str = "") -> tuple[str, ...]:
    """Return the first names of all layers with a weight of their own, outside of norms.

    >>> layer_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.MultiheadAttention(2, 1)))
    ('0', '2', '2.out_proj')
    """
    norms = norm_names(model)
    found = []
    for name, module in model.named_modules():
        if at and name != at and not name.startswith(f"{at}."):
            continue
        inside = any(name == norm or name.startswith(f"{norm}.") for norm in norms)
        if not inside and row_layouts(module):
            found.append(name)
    return tuple(found)


def layer_steps(
    model: nn.Module, recipe: Recipe, steps: Sequence[Step], *, at: str = ""
) -> LayerSteps:
    """Decide what becomes of every layer that no norm is folded into; nothing is changed.

    A weight that several layers hold stays that of all of them: all are reparametrised and share gain
    and v, or none is.

    Args:
        model: read only.
        recipe: what is wanted.
        steps: those of the norms.
        at: only layers inside that submodule.
    """
    folded = {layer for step in steps for layer in (*step.producers, *step.consumers)}
    planner = _Planner(model, Names(model), recipe)
    names = [name for name in layer_names(model, at) if name not in folded]
    for name in names:
        planner.look_at(name)
    made = [planner.step(name) for name in names]
    found = [step for step in made if step is not None]
    return LayerSteps(tuple(found), tuple(planner.problems), _notes(model, at, found))


def _notes(model: nn.Module, at: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Say which matrices are in layers of no known family."""
    known = set(layer_names(model))
    others: Counter[str] = Counter()
    norms = norm_names(model)
    for name, module in model.named_modules():
        here = not at or name == at or name.startswith(f"{at}.")
        inside = any(name == norm or name.startswith(f"{norm}.") for norm in norms)
        own = [p for p in module._parameters.values() if p is not None]
        if here and not inside and name not in known and any(p.dim() > 1 for p in own):
            others[type(module).__name__] += 1
    if not others:
        return ()
    listed = ", ".join(f"{number} {kind}" for kind, number in others.items())
    return (f"the weights of {listed} stay plain: layers of no known family",)


class _Planner:
    """The layers in order: first which of them are wanted, then what each becomes."""

    def __init__(self, model: nn.Module, names: Names, recipe: Recipe) -> None:
        self._model = model
        self._names = names
        self._recipe = recipe
        self._wanted: dict[str, Rule] = {}
        self._why: dict[str, str] = {}
        self.problems: list[Problem] = []

    def look_at(self, name: str) -> None:
        layer = self._model.get_submodule(name)
        rule = self._recipe.rule_for(name, kind_of(layer))
        if rule is None:
            self._why[name] = "no rule matches it"
        elif rule.to == KEEP:
            self._why[name] = f"excluded by '{rule.match}'"
        elif isinstance(layer, Reparametrised):
            self._why[name] = f"it has {layer.what} already"
        else:
            target = make_target(rule.to, rule.options)
            if not isinstance(target, WeightNorm):
                return  # the rule is about norms
            if isinstance(layer, nn.Embedding) and not (target.embeddings or _names_it(rule)):
                self._why[name] = "an embedding: only with embeddings=True or a glob that names it"
            elif found := obstacle_to("wn", layer, scale=target.scale, c=target.c):
                self._why[name] = found[0]
                self.problems.append(Problem(name, found[0], f"{found[1]}, or exclude it"))
            else:
                self._wanted[name] = rule

    def step(self, name: str) -> Step | None:
        rule = self._wanted.get(name)
        if rule is None:
            why = self._why.get(name)
            return None if why is None else self._step(name, KEEP, "keep", why)
        layer = self._model.get_submodule(name)
        leader, why = name, ""
        for weight in row_layouts(layer):
            leader, why = self._leader(name, weight)
            if why:
                break
        if why:
            if rule.match != "*":
                self.problems.append(Problem(name, why, "include both or exclude this one"))
            return self._step(name, KEEP, "keep", why)
        weights, shared = list(row_layouts(layer)), leader != name
        what = ", ".join(weights) if len(weights) < 4 else f"its {len(weights)} weights"
        return self._step(
            name,
            rule.to,
            "wrap",
            f"g and v are those of {leader}" if shared else f"each row of {what}",
            fidelity="exact",
            producers=(leader,) if shared else (),
            options=dict(rule.options),
        )

    def _leader(self, name: str, weight: str) -> tuple[str, str]:
        """The layer whose g and v a layer takes, itself mostly; or why it must stay as it is."""
        layer = self._model.get_submodule(name)
        parameter = layer._parameters[weight]
        assert parameter is not None
        owners = list(dict.fromkeys(self._names.owners(parameter)))
        if len(owners) < 2:
            return name, ""
        others = [owner for owner in owners if owner != name]
        for owner in others:
            own = f"its {weight} is also {owner}'s"
            if owner not in self._wanted:
                return name, f"{own}, which stays plain ({self._why.get(owner, 'no such layer')})"
            if self._wanted[owner].options != self._wanted[name].options:
                return name, f"{own}, which another rule with other options is about"
            twin = self._model.get_submodule(owner)
            if row_layouts(twin) != row_layouts(layer) or len(row_layouts(twin)) > 1:
                return name, f"{own}, whose rows are others"
            if twin._parameters["weight"] is not parameter:
                return name, f"{own}, which does not use it as its weight"
        return owners[0], ""

    def _step(self, name: str, target: str, action: Any, reason: str, **more: Any) -> Step:
        layer = self._model.get_submodule(name)
        return Step(
            site=name,
            norm=type(layer).__name__,
            target=target,
            action=action,
            channels=rows_of(layer),
            op=kind_of(layer),
            aliases=self._names.aliases(name),
            reason=reason,
            **more,
        )


def _names_it(rule: Rule) -> bool:
    """Whether a glob speaks of this layer, and not of all that is somewhere."""
    return rule.match.rpartition(".")[2] != "*"


def rows_of(layer: nn.Module) -> int:
    """Return the number of rows of all of a layer's own weights, plain or computed."""
    total = 0
    for name, layout in row_layouts(layer).items():
        held = layer.parts(name)[1] if isinstance(layer, Reparametrised) else name
        weight = layer._parameters.get(held)
        total += 0 if weight is None else layout.channels(weight)
    return total


def ties_problem(model: nn.Module, plan: Plan, step: Step, names: Names) -> Problem | None:
    """Say where a plan and a model do not tie a layer's weight to the same layers."""
    layer = model.get_submodule(step.site)
    group = {
        names.canonical(other.site)
        for other in plan.converted
        if other.action == "wrap" and _leader_of(other) == _leader_of(step)
    }
    for weight_name in row_layouts(layer):
        weight = layer._parameters.get(weight_name)
        if weight is None:
            continue
        owners = set(names.owners(weight))
        if outside := sorted(owners - group):
            what = f"it shares its {weight_name} with {', '.join(outside)}, which stay as they are"
            return Problem(step.site, what, "keep it, or make a new plan")
        if absent := sorted(group - owners):
            what = f"the plan shares its {weight_name} with {', '.join(absent)}, the model does not"
            return Problem(step.site, what, "make a new plan for this model")
    return None


def _leader_of(step: Step) -> str:
    return step.producers[0] if step.producers else step.site
