"""How checkpoints name the parts of a weight, and which convention a checkpoint keeps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from normconv.errors import LoadError, Problem
from normconv.numerics import DIALECTS

__all__ = [
    "AUTO",
    "CONVENTIONS",
    "WEIGHT_NORMED",
    "Held",
    "computed_otherwise",
    "dialect_of",
    "part_keys",
    "recognised",
]

AUTO = "auto"
WEIGHT_NORMED = ("normconv-wn", "legacy-wn", "torch-wn")
CONVENTIONS = ("plain", *WEIGHT_NORMED, *(f"ws-{dialect}" for dialect in DIALECTS))

# g, s: a gain and its logarithm, beside v; gain: that of a standardized v.
_SUFFIXED = re.compile(r"((?:.*\.)?(?:weight\w*?|\w+_weight))_(g|s|gain|v)")
_PARAMETRIZED = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\.(.+)")
_LISTED = 3

Form = Literal["wn", "log", "standardized"]


@dataclass(frozen=True)
class Held:
    """A weight that a checkpoint holds in parts.

    Args:
        weight: the name that the weight has where it is plain.
        form: ``wn`` for g · v / ‖v‖, ``log`` for e^(c·s) · v / ‖v‖, ``standardized`` otherwise.
        gain: the key of g, s or the gain; empty where a weight is standardized without one.
        v: the key of v.
        family: what the keys look like, for the reader.
    """

    weight: str
    form: Form
    gain: str
    v: str
    family: str


_LEGACY, _TORCH, _OWN = "weight_g and weight_v", "parametrizations", "weight_gain and weight_v"


def part_keys(weight: str, convention: str, *, log: bool = False) -> tuple[str, str]:
    """Return the keys of gain and v under a weight-normed convention.

    >>> part_keys("up.0.weight", "torch-wn")
    ('up.0.parametrizations.weight.original0', 'up.0.parametrizations.weight.original1')
    >>> part_keys("rnn.weight_hh_l0", "legacy-wn")
    ('rnn.weight_hh_l0_g', 'rnn.weight_hh_l0_v')
    """
    if convention == "torch-wn":
        layer, dot, name = weight.rpartition(".")
        stem = f"{layer}{dot}parametrizations.{name}.original"
        return f"{stem}0", f"{stem}1"
    return f"{weight}_{'s' if log else 'g'}", f"{weight}_v"


def dialect_of(convention: str) -> str | None:
    """Return the dialect of a weight-standardized convention; None for another.

    >>> dialect_of("ws-bit"), dialect_of("plain")
    ('bit', None)
    """
    start, _, dialect = convention.partition("-")
    return dialect if start == "ws" and dialect else None


def recognised(
    shapes: Mapping[str, tuple[int, ...]], convention: str
) -> tuple[dict[str, Held], str]:
    """Find the weights that are held in parts, by their plain names, and the convention they are in.

    Args:
        shapes: of the tensors, by key.
        convention: what the user says it is; ``auto`` for what the keys say.

    Raises:
        LoadError: names every key that lacks its other part, the conventions that are mixed, and keys
            of another convention than the one that was said.

    >>> held, convention = recognised({"0.weight_g": (2, 1), "0.weight_v": (2, 3)}, "auto")
    >>> list(held), convention
    (['0.weight'], 'legacy-wn')
    """
    problems: list[Problem] = []
    held = [*_suffixed(shapes, problems), *_parametrized(shapes, problems)]
    families: dict[str, list[str]] = defaultdict(list)
    for one in held:
        families[one.family].append(one.v)
    if len(families) > 1:
        problems += [
            Problem(_few(keys), f"has the names of {family}; the file mixes conventions")
            for family, keys in families.items()
        ]
    if not held and convention in (AUTO, "ws-nf"):
        held = list(_scaled(shapes))
    elif not held and dialect_of(convention):
        held = list(_parametrized_alone(shapes))
    problems += [
        Problem(one.weight, f"is there beside {one.v}, from which it is computed")
        for one in held
        if one.v != one.weight and one.weight in shapes
    ]
    found = _named(held)
    if convention != AUTO and held and not problems and not _agrees(held, convention):
        what = f"has the names of {found}, not of {convention}"
        problems.append(Problem(_few([one.v for one in held]), what, "leave out --from"))
    if problems:
        raise LoadError(problems)
    return {one.weight: one for one in held}, found if convention == AUTO else convention


def computed_otherwise(keys: Iterable[str]) -> list[str]:
    """Return the weights that something else than a weight norm computes, by their plain names.

    >>> computed_otherwise(["0.weight_orig", "0.weight_u", "1.parametrizations.weight.original"])
    ['0.weight', '1.weight']
    """
    found = []
    for key in keys:
        if key.endswith("_orig"):  # torch's spectral norm and pruning
            found.append(key.removesuffix("_orig"))
        elif (match := _PARAMETRIZED.fullmatch(key)) and match[3] == "original":
            found.append(match[1] + match[2])
    return found


def _suffixed(shapes: Collection[str], problems: list[Problem]) -> Iterable[Held]:
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for key in shapes:
        if match := _SUFFIXED.fullmatch(key):
            parts[match[1]][match[2]] = key
    forms: dict[str, tuple[Form, str]] = {
        "g": ("wn", _LEGACY),
        "s": ("log", _LEGACY),
        "gain": ("standardized", _OWN),
    }
    for weight, found in parts.items():
        if f"{weight}_orig" in shapes:
            continue  # torch.nn.utils.spectral_norm, whose v is a singular vector
        v, gains = found.get("v"), [part for part in found if part != "v"]
        if v is None:
            if "g" in found:
                problems.append(Problem(found["g"], f"its v is missing: no {weight}_v"))
        elif len(gains) > 1:
            problems.append(Problem(v, f"has several gains: {', '.join(found[p] for p in gains)}"))
        elif not gains:
            problems.append(Problem(v, f"its g is missing: no {weight}_g"))
        else:
            form, family = forms[gains[0]]
            yield Held(weight, form, found[gains[0]], v, family)


def _parametrized(shapes: Iterable[str], problems: list[Problem]) -> Iterable[Held]:
    chains: dict[str, dict[str, str]] = defaultdict(dict)
    for key in shapes:
        if match := _PARAMETRIZED.fullmatch(key):
            chains[match[1] + match[2]][match[3]] = key
    pair = ("original0", "original1")
    for weight, chain in chains.items():
        if not set(pair) & set(chain):
            continue  # another parametrization, which is no weight norm
        lacking = [part for part in pair if part not in chain]
        others = [key for part, key in chain.items() if part not in pair]
        if lacking:
            there = next(iter(chain.values()))
            problems.append(Problem(there, f"its other part, {lacking[0]}, is missing"))
        elif others:
            what = "another parametrization than weight norm, or one of several, holds the weight"
            problems.append(Problem(others[0], what, "fold the model: normconv fold"))
        else:
            yield Held(weight, "wn", chain["original0"], chain["original1"], _TORCH)


def _parametrized_alone(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Held]:
    """Filters under one parametrization without parameters: Composer's weight standardization."""
    chains: dict[str, list[str]] = defaultdict(list)
    for key in shapes:
        if match := _PARAMETRIZED.fullmatch(key):
            chains[match[1] + match[2]].append(key)
    for weight, keys in chains.items():
        if len(keys) == 1 and keys[0].endswith(".original") and len(shapes[keys[0]]) > 2:
            yield Held(weight, "standardized", "", keys[0], _TORCH)


def _scaled(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Held]:
    """Weights with a `gain` beside them, one number a filter."""
    for key, shape in shapes.items():
        layer, dot, name = key.rpartition(".")
        weight = shapes.get(f"{layer}{dot}weight", ())
        if name == "gain" and len(weight) > 2 and shape == (weight[0], *(1,) * (len(weight) - 1)):
            at = f"{layer}{dot}weight"
            yield Held(at, "standardized", key, at, "gain beside weight")


def _named(held: list[Held]) -> str:
    if not held:
        return "plain"
    if any(one.form == "log" for one in held):
        return "normconv-wn"
    return {_LEGACY: "legacy-wn", _TORCH: "torch-wn", _OWN: "ws"}.get(held[0].family, "ws-nf")


def _agrees(held: list[Held], convention: str) -> bool:
    if dialect_of(convention):
        return all(one.form == "standardized" for one in held)
    found = _named(held)
    return found == convention or (found, convention) == ("legacy-wn", "normconv-wn")


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
