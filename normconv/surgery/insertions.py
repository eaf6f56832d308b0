"""Norms for layers that have none: after which layers, and what is in the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from normconv.errors import Problem, UsageError
from normconv.graph import CallGraph, Names, capture, reach, relative_names
from normconv.layers import kind_of, layout_of
from normconv.numerics import evaluating
from normconv.plan import KEEP, Recipe, Rule, Step
from normconv.surgery.layer_steps import LayerSteps, layer_names, rows_of
from normconv.targets import GroupNorm, make_target

__all__ = ["check_insertion", "insertion_steps"]


def check_insertion(globs: str | Iterable[str], recipe: Recipe) -> tuple[str, ...]:
    """Return the globs of layers to put norms after.

    Raises:
        UsageError: no rule of the recipe has a target that makes norms from nothing.
    """
    found = (globs,) if isinstance(globs, str) else tuple(globs)
    if found and not any(_makes_norms(rule) for rule in recipe.rules):
        what = f"{', '.join(recipe.targets) or KEEP} makes no norm where there was none"
        raise UsageError(Problem("insert_after", what, "to='gn' does"))
    return found


def _makes_norms(rule: Rule) -> bool:
    return rule.to != KEEP and "insert" in make_target(rule.to, rule.options).actions


def insertion_steps(
    model: nn.Module,
    recipe: Recipe,
    globs: Sequence[str],
    steps: Sequence[Step],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    at: str = "",
) -> LayerSteps:
    """Decide which layers get a norm after them; nothing is changed.

    Args:
        model: read only.
        recipe: the first rule that makes norms gives the target and its options; layers that are
            excluded stay as they are.
        globs: which layers.
        steps: those of the norms that are there.
        args: positional inputs of the whole model.
        kwargs: keyword inputs of the whole model.
        at: only layers inside that submodule.

    Raises:
        UsageError: a glob matches no layer.
    """
    names = layer_names(model, at)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = get_close_matches(glob.strip("*?."), names, n=1, cutoff=0.0)
            way_out = f"nearest layer: '{near[0]}'" if near else "the model has no layer"
            raise UsageError(Problem(f"insert_after='{glob}'", "matches no layer", way_out))
    wanted = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
    look = _Look.of(model, steps, args, kwargs, at)
    rule = next(rule for rule in recipe.rules if _makes_norms(rule))
    target = make_target(rule.to, rule.options)
    assert isinstance(target, GroupNorm)
    known, made, problems = Names(model), list[Step](), list[Problem]()
    for name in wanted:
        layer = model.get_submodule(name)
        own = recipe.rule_for(name, kind_of(layer))
        if own is not None and own.to == KEEP:
            continue
        shape = look.shape_after(name)
        found: Any = look.obstacle(name, shape) or target.decide_after(name, rows_of(layer), shape)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        made.append(
            Step(
                site=name,
                norm=type(layer).__name__,
                target=rule.to,
                action="insert",
                channels=rows_of(layer),
                op=kind_of(layer),
                aliases=known.aliases(name),
                shape=shape,
                fidelity=found.fidelity,
                reason=found.reason,
                options=dict(found.options or {}),
            )
        )
    return LayerSteps(tuple(made), tuple(problems))


@dataclass(frozen=True)
class _Look:
    """What a capture tells of the layers.

    Args:
        model: the whole model.
        graph: of the model, or of the submodule that is worked on.
        inside: the names in the graph, by those in the model.
        normed: the layers that feed a norm.
    """

    model: nn.Module
    graph: CallGraph
    inside: Mapping[str, str]
    normed: frozenset[str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        steps: Sequence[Step],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        at: str,
    ) -> _Look:
        inner, given, named = model, args, kwargs
        inside = {name: name for name in layer_names(model)}
        if at:
            inside = relative_names(model, at)
            reached = reach(model, at, args, kwargs)
            inner, given, named = model.get_submodule(at), reached.args, reached.kwargs
        with evaluating(inner):
            graph = capture(inner, given, named)
        normed = frozenset(layer for step in steps for layer in step.producers)
        return cls(model, graph, inside, normed)

    def shape_after(self, name: str) -> tuple[int, ...] | None:
        calls = self.graph.calls_of.get(self.inside[name], ())
        return calls[0].shape if calls else None

    def obstacle(self, name: str, shape: tuple[int, ...] | None) -> Problem | None:
        """Say why no norm may stand after a layer; None where one may."""
        layer = self.model.get_submodule(name)
        parent = self.model.get_submodule(name.rpartition(".")[0])
        rank = 2 if isinstance(layer, nn.Linear) else len(getattr(layer, "kernel_size", ())) + 2
        what, way_out = "", "leave it out of insert_after"
        if layout_of(layer) is None:
            what = f"a {type(layer).__name__} does not put out channels along axis 1"
        elif name in self.normed:
            what = "a norm follows it already"
        elif isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            what = f"{type(parent).__name__} reads its weight without calling it"
        elif self.inside[name] in self.graph.outside_reads:
            what = "its tensors are read outside its own forward, by names that they would lose"
        elif shape is None:
            what = "eval mode does not call it on the example inputs"
        elif len(shape) != rank:
            what = (
                f"it puts out {shape}: GroupNorm takes samples along axis 0, channels along axis 1"
            )
        return Problem(name, what, way_out) if what else None
