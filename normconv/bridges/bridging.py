"""Decide, from keys and shapes alone, what every tensor of a checkpoint becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from normconv.bridges.conventions import (
    AUTO,
    WEIGHT_NORMED,
    Held,
    computed_otherwise,
    dialect_of,
    part_keys,
    recognised,
)
from normconv.bridges.gains import GainRows
from normconv.bridges.history import history_in, option_of
from normconv.bridges.jobs import Job, Origin, Parts, copied, reformed
from normconv.bridges.planned import planned_jobs
from normconv.bridges.request import Request
from normconv.bridges.standardized import StandardizedBy
from normconv.bridges.tensors import Tensors
from normconv.errors import LoadError, Problem, UsageError
from normconv.numerics import RowLayout, dialect_named
from normconv.report import SiteRow

__all__ = ["Bridge", "bridged"]


class Bridge(NamedTuple):
    """What comes out, in order.

    Args:
        jobs: everything that is written.
        from_: the convention that the checkpoint is in.
        passed: the keys that pass through.
        dropped: the keys of norms that are folded away.
    """

    jobs: tuple[Job, ...]
    from_: str
    passed: tuple[str, ...]
    dropped: tuple[str, ...]


def bridged(tensors: Tensors, request: Request) -> Bridge:
    """Plan the conversion of one state dict; no number is read but those of norms.

    Raises:
        LoadError: lists every key that does not fit.
        UsageError: something is to be said that the keys do not tell.
    """
    shapes = {name: spec.shape for name, spec in tensors.specs.items()}
    held, convention = recognised(shapes, request.from_)
    if convention == "legacy-wn" and request.from_ != convention and history_in(tensors.metadata):
        convention = "normconv-wn"
    if request.plan is not None:
        if held:
            what = f"holds {convention} weights, and the plan is for a model with plain ones"
            raise LoadError(Problem(tensors.where, what, "convert it to plain first"))
        made, dropped = planned_jobs(tensors, request)
    else:
        made, dropped = _Weights(tensors, request, held, convention).jobs(), ()
    return _whole(tensors, made, dropped, convention)


def _whole(tensors: Tensors, made: list[Job], dropped: tuple[str, ...], convention: str) -> Bridge:
    """Put what passes through between the conversions, in the checkpoint's order."""
    by_first: dict[str, list[Job]] = {}
    for job in made:
        by_first.setdefault(job.inputs[0], []).append(job)
    used = {name for job in made for name in job.inputs} | set(dropped)
    jobs: list[Job] = []
    for name in tensors.specs:
        jobs += by_first.get(name, ())
        if name not in used:
            jobs.append(copied(name, tensors))
    owners: dict[str, str] = {}
    problems = []
    for job in jobs:
        for output in job.outputs:
            if output in owners:
                what = f"would be made from {owners[output]} and from {job.inputs[0]}"
                problems.append(Problem(output, what))
            owners[output] = job.inputs[0]
    if problems:
        raise LoadError(problems)
    passed = tuple(name for name in tensors.specs if name not in used)
    return Bridge(tuple(jobs), convention, passed, dropped)


@dataclass
class _Weights:
    """The conversion of weights one by one, without a plan."""

    tensors: Tensors
    request: Request
    held: dict[str, Held]
    convention: str

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.unsaid: list[Problem] = []

    def jobs(self) -> list[Job]:
        to, dialect = self.request.to, dialect_of(self.convention)
        origins = {weight: self._origin(held) for weight, held in self.held.items()}
        if dialect and not self.held:
            origins = {weight: self._standardized(weight) for weight in self._named(dialect)}
        wanted = dict(self._wanted(origins)) if to in WEIGHT_NORMED else dict.fromkeys(origins)
        for weight in wanted:
            spec = self.tensors.specs[self.held[weight].v if weight in self.held else weight]
            if not spec.dtype.is_floating_point:
                what = f"its numbers are {str(spec.dtype)[6:]}: quantised weights have no norm"
                self.problems.append(Problem(weight, what))
        if self.problems:
            raise LoadError([*self.problems, *self.unsaid])
        if self.unsaid:
            raise UsageError(self.unsaid)
        if not wanted:
            raise LoadError(self._nothing_to_do())
        return [
            reformed(weight, origins.get(weight), parts, self.tensors, self._row(weight))
            for weight, parts in wanted.items()
        ]

    def _nothing_to_do(self) -> Problem:
        where = self.tensors.where or "the checkpoint"
        if self.held:
            return Problem(where, "nothing changes")
        if other := computed_otherwise(self.tensors.specs):
            what = f"of its weights {other[0]} is computed, and not by a weight norm"
            return Problem(where, what, "fold the model: normconv fold")
        return Problem(where, "all its weights are plain already")

    def _row(self, weight: str) -> SiteRow:
        was = self.convention if weight in self.held or dialect_of(self.convention) else "plain"
        return SiteRow(weight, was, "", self.request.to, "exact", "")

    # What the file has.

    def _origin(self, held: Held) -> Origin:
        if not held.gain:
            return self._standardized(held.weight, held)
        gain = self.tensors.specs[held.gain].shape
        v = self.tensors.specs[held.v].shape
        rows = GainRows.between(gain, v)
        if rows is None:
            what = f"is {gain} and {held.v} is {v}: that is not one number a row"
            self.problems.append(Problem(held.gain, what))
            return None
        if held.form == "standardized":
            return self._standardized(held.weight, held, rows)
        c = self._c(held.weight, self.tensors.metadata) if held.form == "log" else None
        return Parts(held.gain, held.v, rows, c)

    def _c(self, weight: str, metadata: Mapping[str, str]) -> float:
        recorded = option_of(metadata, weight.rpartition(".")[0], "c", 1.0)
        c = self.request.c if self.request.c is not None else recorded
        if c is None:
            what = "its gain is e^(c·s), and the file does not say c"
            self.unsaid.append(Problem(weight, what, "give it: --c 1 is the default of layers"))
        return 1.0 if c is None else float(c)

    def _standardized(
        self, weight: str, held: Held | None = None, rows: GainRows | None = None
    ) -> StandardizedBy:
        own = (
            held is not None and held.v != weight
        )  # normconv's layer, with its record of the dialect
        dialect = dialect_of(self.convention)
        if dialect is None:
            layer = weight.rpartition(".")[0]
            dialect = option_of(self.tensors.metadata, layer, "dialect", "timm") if own else "nf"
        if dialect is None:
            what = "is standardized, and the file does not say how"
            self.unsaid.append(Problem(weight, what, "say --from ws-timm, -qiao, -bit or -nf"))
        gamma = self.request.gamma
        if dialect == "nf" and not own and gamma is None:
            what = "the file does not say by which constant γ its activation multiplies weights"
            way_out = "give it: --gamma 1 for dm_nfnet; 1.7139588594436646 for nf_ with ReLU"
            self.unsaid.append(Problem(weight, what, way_out))
        way, eps = dialect_named(dialect or "timm"), self.request.eps_of(weight)
        if dialect == "nf" and not own and eps is None and self.request.from_ == AUTO:
            what = f"the file does not say its eps; {way.eps} is the dialect's"
            self.unsaid.append(
                Problem(weight, what, "give it: --eps 1e-5 is that of timm's models")
            )
        way = way if eps is None else way._replace(eps=eps)
        shape = self.tensors.specs[held.v if held else weight].shape
        along = rows or GainRows.of(RowLayout(), shape)
        return StandardizedBy(
            held.gain if held else "",
            held.v if held else weight,
            along,
            way,
            1.0 if gamma is None else gamma,
        )

    def _named(self, dialect: str) -> list[str]:
        if not self.request.layers:
            what = f"which weights are standardized ({dialect}) does not show in the keys"
            way_out = "name them: --layers 'GLOB', e.g. 'stages.*conv*'"
            raise UsageError(Problem("--layers", what, way_out))
        return [weight for weight, _ in self._matching()]

    # What is asked for.

    def _wanted(self, origins: dict[str, Origin]) -> Iterator[tuple[str, Parts | None]]:
        if self.request.like is not None:
            yield from self._as_in_like(origins)
            return
        if not self.request.layers and not origins:
            what = f"which weights get a gain in {self.request.to} does not show in plain keys"
            way_out = (
                "give --like FILE (a checkpoint in that form), --plan plan.json, or --layers GLOB "
                "with --dim N (1 for transposed convolutions)"
            )
            raise UsageError(Problem("--to", what, way_out))
        for weight, origin in origins.items():
            if isinstance(origin, Parts):
                yield weight, self._parts(weight, origin.rows, self.tensors.specs[origin.v].shape)
            elif origin is not None:
                what = f"is {self.convention}: such weights become plain ones first"
                self.problems.append(Problem(weight, what, "convert with --to plain"))
        for weight, dim in self._matching():
            shape = self.tensors.specs[weight].shape
            rows = GainRows.along(dim, shape)
            if rows is None:
                self.problems.append(Problem(weight, f"is {shape}: it has no dim {dim}"))
            else:
                yield weight, self._parts(weight, rows, shape)

    def _matching(self) -> Iterator[tuple[str, int]]:
        """Plain weights of at least two axes that a glob speaks of; the last such glob counts."""
        found: dict[str, int] = {}
        parts = {key for held in self.held.values() for key in (held.gain, held.v)}
        weights = {
            name: name.rpartition(".")[0]
            for name, spec in self.tensors.specs.items()
            if len(spec.shape) > 1 and is_weight(name) and name not in parts
        }
        for glob, dim in self.request.layers.items():
            hit = [n for n, layer in weights.items() if _either(n, layer, glob)]
            found |= dict.fromkeys(hit, dim)
            if not hit:
                what = "matches no layer with a plain weight"
                self.unsaid.append(Problem(f"--layers '{glob}'", what))
        yield from found.items()

    def _parts(self, weight: str, rows: GainRows, shape: tuple[int, ...]) -> Parts:
        if self.request.to == "normconv-wn" and not rows.is_of_layer(shape):
            what = f"its gains {rows.shape} are not one a row: no layer of normconv has such"
            self.problems.append(Problem(weight, what, "convert to legacy-wn, torch-wn or plain"))
        log = self.request.log
        gain, v = part_keys(weight, self.request.to, log=log)
        return Parts(gain, v, rows, (self.request.c or 1.0) if log else None)

    def _as_in_like(self, origins: dict[str, Origin]) -> Iterator[tuple[str, Parts | None]]:
        assert self.request.like is not None
        shapes, metadata = self.request.like
        to = self.request.to
        try:
            wanted, _ = recognised(shapes, to)
        except LoadError as error:
            its = [Problem(f"--like: {p.where}", p.what, p.way_out) for p in error.problems]
            raise LoadError(its) from None
        if not wanted:
            raise UsageError(Problem("--like", f"it holds no weight in the form {to}"))
        for weight, held in wanted.items():
            own = self.held[weight].v if weight in self.held else weight
            if own not in self.tensors.specs:
                what = f"--like has it as {held.v}, and the file has no such weight"
                self.problems.append(Problem(weight, what))
                continue
            shape, v = self.tensors.specs[own].shape, shapes[held.v]
            rows = GainRows.between(shapes[held.gain], v)
            if shape != v:
                self.problems.append(Problem(own, f"is {shape}, and {held.v} of --like is {v}"))
            elif rows is None:
                what = f"of --like is {shapes[held.gain]} and {held.v} {v}"
                self.problems.append(Problem(held.gain, what))
            else:
                c = self._c(weight, metadata) if held.form == "log" else None
                yield weight, Parts(held.gain, held.v, rows, c)
        for weight in origins:
            if weight not in wanted:
                if weight in shapes:
                    yield weight, None
                else:
                    self.problems.append(Problem(weight, "--like has no such weight"))


def is_weight(name: str) -> bool:
    """Whether a tensor's name is that of a weight.

    >>> is_weight("rnn.weight_hh_l0"), is_weight("attn.in_proj_weight"), is_weight("fc.bias")
    (True, True, False)
    """
    last = name.rpartition(".")[2]
    # What torch's spectral norm and pruning compute from.
    part = last.endswith(("_orig", "_mask"))
    return not part and (last.startswith("weight") or last.endswith("_weight"))


def _either(weight: str, layer: str, glob: str) -> bool:
    return fnmatchcase(weight, glob) or fnmatchcase(layer, glob)
