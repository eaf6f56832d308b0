"""The axes that a file leaves free: how they are asked for, and what they are called in a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir
from torch import Tensor

from normconv.errors import Problem, UsageError

__all__ = [
    "Asked",
    "Axes",
    "Limits",
    "asked_axes",
    "axis_names",
    "name_axes",
    "other_sizes_of",
    "parse_axes",
    "prime_below",
]

#: What a caller writes: names by axis, for all inputs or under the name of one.
Asked = Mapping[int | str, str | Mapping[int, str]]
#: The free axes of every input: {input: {axis: name}}.
Axes = Mapping[str, Mapping[int, str]]
#: From which size to which a capture holds, by axis name; None is without end.
Limits = Mapping[str, tuple[int, int | None]]

_ENTRY = re.compile(r"(?:(?P<input>[^:=]+):)?(?P<axis>\d+)=(?P<name>.+)")


def parse_axes(texts: Sequence[str]) -> dict[int | str, str | dict[int, str]]:
    """Read free axes as the command line writes them.

    Args:
        texts: each ``AXIS=NAME`` or ``INPUT:AXIS=NAME``, several with commas between.

    Raises:
        UsageError: a text is not of that form, or names one axis twice.

    >>> parse_axes(["0=batch,2=frames", "x:1=tracks"])
    {0: 'batch', 2: 'frames', 'x': {1: 'tracks'}}
    """
    found: dict[int | str, str | dict[int, str]] = {}
    problems = []
    for entry in (part.strip() for text in texts for part in text.split(",")):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            what, way_out = "is not an axis and a name", "write 2=frames, or x:2=frames for input x"
            problems.append(Problem(f"dynamic {entry!r}", what, way_out))
            continue
        axis = int(match["axis"])
        place = found.setdefault(match["input"], {}) if match["input"] else found
        assert isinstance(place, dict)
        if axis in place:
            problems.append(Problem(f"dynamic {entry!r}", f"axis {axis} is named twice"))
        place[axis] = match["name"]
    if problems:
        raise UsageError(problems)
    return found


def asked_axes(asked: Asked, inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Find the axes that are meant, input by input.

    An axis without an input is that axis of every input that has the size there which the first
    input with such an axis has. What is said of one input goes before what is said of all.

    Args:
        asked: the names, by axis or by input and axis.
        inputs: the example inputs, by their names in the file.

    Raises:
        UsageError: an input or axis that is not there, a name that is none or that stands for two
            sizes or for two axes of one input. All are listed.

    >>> import torch
    >>> asked_axes({2: "frames"}, {"x": torch.zeros(1, 4, 9), "length": torch.zeros(1)})
    {'x': {2: 'frames'}}
    """
    problems: list[Problem] = []
    found: dict[str, dict[int, str]] = {}
    for axis, name in ((k, v) for k, v in asked.items() if not isinstance(k, str)):
        sizes = {key: x.shape[axis] for key, x in inputs.items() if 0 <= axis < x.ndim}
        if not sizes:
            shapes = ", ".join(f"{key} is {_shape(x)}" for key, x in inputs.items())
            problems.append(Problem(f"dynamic axis {axis}", f"no input has it: {shapes}"))
        first = next(iter(sizes.values()), None)
        for key in (key for key, size in sizes.items() if size == first):
            found.setdefault(key, {})[axis] = str(name)
    for key, axes in ((k, v) for k, v in asked.items() if isinstance(k, str)):
        if key not in inputs:
            own = ", ".join(inputs)
            problems.append(Problem(f"dynamic {key!r}", "there is no such input", f"name {own}"))
            continue
        for axis, name in dict(axes).items() if isinstance(axes, Mapping) else ():
            if not 0 <= axis < inputs[key].ndim:
                what = f"the input is {_shape(inputs[key])}: it has no axis {axis}"
                problems.append(Problem(f"dynamic {key!r}", what, "count axes from 0"))
                continue
            found.setdefault(key, {})[axis] = str(name)
        if not isinstance(axes, Mapping):
            what = f"{axes!r} is not a dict of names by axis"
            problems.append(
                Problem(f"dynamic {key!r}", what, f"write {{{key!r}: {{2: 'frames'}}}}")
            )
    problems += _bad_names(found, inputs)
    if problems:
        raise UsageError(problems)
    return {key: dict(sorted(found[key].items())) for key in inputs if key in found}


def _bad_names(
    found: Mapping[str, Mapping[int, str]], inputs: Mapping[str, Tensor]
) -> list[Problem]:
    problems = []
    places: dict[str, list[tuple[str, int]]] = {}
    for key, axes in found.items():
        for axis, name in axes.items():
            places.setdefault(name, []).append((key, axis))
    for name, where in places.items():
        if not name.isidentifier():
            what = f"{name!r} is not a name of letters, digits and underscores"
            problems.append(Problem("dynamic", what))
        listed = ", ".join(f"{key}:{axis} of size {inputs[key].shape[axis]}" for key, axis in where)
        if len({key for key, _ in where}) < len(where):
            what = f"names two axes of one input: {listed}"
            problems.append(Problem(f"dynamic {name!r}", what, "give each its own name"))
        elif len({inputs[key].shape[axis] for key, axis in where}) > 1:
            what = f"names axes of different sizes: {listed}"
            problems.append(Problem(f"dynamic {name!r}", what, "give each its own name"))
    return problems


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a single number"


def name_axes(model: ir.Model, axes: Axes) -> None:
    """Call the free axes by their names: the exporter calls them by the tracer's symbols (s17).

    A size that is computed from one is written with its name, as in ``2*frames``.

    Args:
        model: the graph.
        axes: the names, in the order of the graph's inputs.
    """
    names: dict[str, str] = {}
    for value, its in zip(model.graph.inputs, axes.values(), strict=False):
        for axis, name in its.items():
            size = (value.shape or ())[axis]
            if not isinstance(size, int):
                names[str(size)] = name
    if not names:
        return
    word = re.compile(
        "|".join(rf"\b{re.escape(s)}\b" for s in names if s.isidentifier()) or r"(?!)"
    )
    for value in [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, int):
                continue
            text = str(size)
            renamed = names.get(text) or word.sub(lambda found: names[found.group()], text)
            if renamed != text:
                value.shape[axis] = ir.SymbolicDim(renamed)


def axis_names(axes: Axes) -> list[str]:
    """Return the different names, in order.

    >>> axis_names({"x": {0: "batch", 2: "frames"}, "mask": {1: "frames"}})
    ['batch', 'frames']
    """
    return list(dict.fromkeys(name for its in axes.values() for name in its.values()))


def other_sizes_of(size: int) -> list[int]:
    """Return sizes to try in place of one, the most telling first.

    The primes around it, then the sizes around it that have its factors of two (what is halved over
    and over takes only those), then its multiples.

    >>> other_sizes_of(224)
    [223, 227, 192, 256, 448, 672]
    >>> other_sizes_of(2)
    [3, 1, 4, 6]
    """
    step = size & -size
    if step == size:
        step = max(size // 2, 1)
    primes = [prime_below(size), next(n for n in range(size + 1, 2 * size + 3) if _is_prime(n))]
    found = [*primes, size - step, size + step, 2 * size, 3 * size]
    return list(dict.fromkeys(n for n in found if n and n != size))


def prime_below(number: int) -> int | None:
    """Return the largest odd prime below a number; None where there is none.

    >>> [prime_below(n) for n in (224, 16, 4, 3)]
    [223, 13, 3, None]
    """
    return next((n for n in range(number - 1, 2, -1) if _is_prime(n)), None)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
