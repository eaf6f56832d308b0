"""Find the weights in a checkpoint, make their names those of the model, load them strictly."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normconv.errors import LoadError, Problem, UsageError

__all__ = ["Found", "candidates", "choose", "load_strictly", "modules_in"]

_WRAPPERS = ("module", "_module", "_orig_mod")
_AVERAGES = "n_averaged"  # what torch's AveragedModel has beside its `module`
_CONVENTIONAL = (
    "state_dict", "model_state_dict", "model", "net", "network", "generator", "weights", "params",
    "module", "model_state", "student", "G", "netG",
)  # fmt: skip
_NOT_WEIGHTS = ("optim", "scheduler", "scaler", "amp", "criterion", "loss", "rng", "hyper")
_DEPTH = 4
_LISTED = 10


class Found(NamedTuple):
    """Weights in a checkpoint: where they stand, and by which names."""

    key: str
    tensors: dict[str, Any]


def candidates(document: Any) -> list[Found]:
    """List every dict of tensors in a checkpoint, the outermost first.

    >>> [found.key for found in candidates({"model": {"w": torch.ones(1)}, "epoch": 3})]
    ['model']
    """
    return [Found(key, dict(value)) for key, value in _walk(document) if _is_state_dict(value)]


def modules_in(document: Any) -> dict[str, nn.Module]:
    """List the whole modules in a checkpoint (some trainers save them so)."""
    return {key: value for key, value in _walk(document) if isinstance(value, nn.Module)}


def _walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    yield ".".join(path), value
    if isinstance(value, Mapping) and not _is_state_dict(value) and len(path) < _DEPTH:
        for key, item in value.items():
            if isinstance(key, str) and not any(word in key.lower() for word in _NOT_WEIGHTS):
                yield from _walk(item, (*path, key))


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return any(isinstance(item, Tensor) for item in value.values()) and all(
        isinstance(key, str) and (isinstance(item, Tensor) or key.endswith("_extra_state"))
        for key, item in value.items()
    )


def choose(document: Any, model: nn.Module, key: str | None, where: str) -> tuple[Found, str]:
    """Choose the weights for a model.

    Args:
        document: what the file holds.
        model: the model they are for.
        key: where they stand, dotted; None looks for them.
        where: the file, for errors.

    Returns:
        The weights, and a sentence where a choice was made (else empty).

    Raises:
        UsageError: there is nothing at `key`.
        LoadError: there are no weights, or several that fit.
    """
    if key is not None:
        return _at(document, key, where), ""
    found = candidates(document)
    if not found:
        what = f"holds no weights ({_describe(document)})"
        raise LoadError(Problem(where, what, "pass a file with a state dict"))
    if len(found) == 1:
        return found[0], ""
    fitting = [one for one in found if _fits(model, one.tensors)] or found
    if len(fitting) == 1:
        names = ", ".join(one.key for one in found)
        return fitting[0], f"took the weights under {fitting[0].key!r}: of {names} they alone fit"
    usual = [one for one in fitting if one.key.rpartition(".")[2] in _CONVENTIONAL]
    averaged = any("ema" in one.key.lower() or "averag" in one.key.lower() for one in fitting)
    if len(usual) == 1 and not averaged:
        rest = ", ".join(one.key for one in fitting if one is not usual[0])
        return usual[0], f"took the weights under {usual[0].key!r}, and not {rest}"
    listed = ", ".join(f"{one.key!r} ({len(one.tensors)} tensors)" for one in fitting)
    what = f"holds weights more than once: {listed}"
    raise LoadError(Problem(where, what, f"choose with --key, e.g. --key {fitting[0].key}"))


def _at(document: Any, key: str, where: str) -> Found:
    """Follow a dotted key through nested dicts; a last part may be a prefix of tensor names."""
    value, rest = document, key
    while rest:
        if not isinstance(value, Mapping):
            break
        if rest in value:
            value, rest = value[rest], ""
            continue
        head = next((k for k in value if isinstance(k, str) and rest.startswith(k + ".")), None)
        if head is not None and isinstance(value[head], Mapping):
            value, rest = value[head], rest[len(head) + 1 :]
            continue
        start = rest + "."
        below = {k[len(start) :]: v for k, v in value.items() if str(k).startswith(start)}
        if not below:
            break
        value, rest = below, ""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if rest or not _is_state_dict(value):
        names = [one.key for one in candidates(document) if one.key]
        close = f"there are weights under {', '.join(names)}" if names else _describe(document)
        raise UsageError(Problem(where, f"there are no weights under the key {key!r}", close))
    return Found(key, dict(value))


def _describe(document: Any) -> str:
    if isinstance(document, Mapping):
        keys = ", ".join(str(key) for key in list(document)[:8])
        return f"a dict with {keys}" if keys else "an empty dict"
    return f"an object of class {type(document).__name__}"


def _fits(model: nn.Module, tensors: Mapping[str, Any]) -> bool:
    expected = model.state_dict()
    renamed, _ = rename(tensors, expected)
    missing = [key for key in expected if key not in renamed and not _is_counter(key)]
    return not missing and all(key in expected for key in renamed)


def rename(
    tensors: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take the marks of wrappers (DataParallel, torch.compile, Opacus) out of the names.

    A name that the model has as it stands is left alone; a model that is wrapped itself gets its
    own marks. The count of an `AveragedModel` goes with its mark.

    Returns:
        The tensors by the model's names, and the marks taken out.

    >>> rename({"module._orig_mod.fc.weight": 1}, {"fc.weight": 0})
    ({'fc.weight': 1}, ('module.', '_orig_mod.'))
    """
    bare = {_bare(key)[0]: key for key in expected}
    renamed: dict[str, Any] = {}
    marks: dict[str, None] = {}
    for key, value in tensors.items():
        name = key
        if key not in expected:
            stripped, found = _bare(key)
            name = bare.get(stripped, stripped)
            marks |= dict.fromkeys(found)
        renamed[name if name not in renamed else key] = value
    if "module." in marks and _AVERAGES not in expected:
        renamed.pop(_AVERAGES, None)
    return renamed, tuple(marks)


def _bare(key: str) -> tuple[str, list[str]]:
    parts = key.split(".")
    # The last part is the tensor's own name.
    kept = [part for part in parts[:-1] if part not in _WRAPPERS]
    found = [f"{part}." for part in parts[:-1] if part in _WRAPPERS]
    return ".".join([*kept, parts[-1]]), found


def load_strictly(
    model: nn.Module, tensors: Mapping[str, Any], where: str, shared: Mapping[str, str]
) -> tuple[str, ...]:
    """Load weights in place, all or nothing; every name and shape must fit.

    Args:
        model: the model; untouched when something does not fit.
        tensors: the weights as the file names them.
        where: the file, for errors.
        shared: names that the file left out, with the name whose tensor they share.

    Returns:
        The marks of wrappers that were taken out of the names.

    Raises:
        LoadError: with the names that are missing or not known, and both shapes where they differ.
    """
    expected = model.state_dict(keep_vars=True)
    given, marks = rename(tensors, expected)
    _fill(given, expected, shared)
    problems = _misfits(given, expected, where)
    if problems and not _model_takes_it(model, given):
        raise LoadError(_shortened(problems, where))
    try:
        model.load_state_dict(given, strict=True, assign=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        what = f"the weights do not load ({str(error).strip().splitlines()[-1].strip()})"
        raise LoadError(Problem(where, what)) from None
    return marks


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _fill(given: dict[str, Any], expected: Mapping[str, Any], shared: Mapping[str, str]) -> None:
    """Add what files leave out for good reason: tied tensors, and BatchNorm's batch counter."""
    owners: dict[int, str] = {}
    for key, value in expected.items():
        if key in given:
            owners[id(value)] = key
    for key, value in expected.items():
        if key in given:
            continue
        source = shared.get(key) or owners.get(id(value))
        if source in given:
            given[key] = given[source]
        elif _is_counter(key) and isinstance(value, Tensor):
            given[key] = value.detach().clone()


def _misfits(given: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> list[Problem]:
    problems = []
    unknown = [key for key in given if key not in expected]
    for key, value in expected.items():
        if key not in given:
            close = difflib.get_close_matches(key, unknown, n=1, cutoff=0.8)
            hint = f"the file has {close[0]}" if close else ""
            problems.append(Problem(key, "the model has it and the file does not", hint))
        elif isinstance(value, Tensor) and isinstance(given[key], Tensor):
            have, want = tuple(given[key].shape), tuple(value.shape)
            if have != want and not torch.nn.parameter.is_lazy(value):
                problems.append(Problem(key, f"is {have} in the file and {want} in the model"))
    problems += [Problem(key, "the file has it and the model does not") for key in unknown]
    return problems


def _shortened(problems: list[Problem], where: str) -> list[Problem]:
    shown = problems[:_LISTED]
    if len(problems) > _LISTED:
        shown.append(Problem(where, f"and {len(problems) - _LISTED} more names do not fit"))
    way_out = "check --model and its --model-arg (num_classes=...), or choose with --key"
    head = Problem(where, f"{len(problems)} names of weights do not fit the model", way_out)
    return [head, *shown]


def _model_takes_it(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Try on a copy without numbers: a model may rename old keys itself while it loads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy.deepcopy(model).to("meta").load_state_dict(dict(given), strict=True)
    except Exception:
        return False
    return True
