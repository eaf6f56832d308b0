"""Where a candidate first leaves the bound: inner values held against the reference's, module by module.

A conversion moves arithmetic between neighbours (a batch norm into the convolution before it), so a layer
may differ from its namesake and be right. A value counts as right when it equals the namesake's output or
one of the next few outputs of the reference, and as harmless when something that is computed from it is
right again. What is left, first in the order of the run, is where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from normconv.deploy.onnx_graph import MODULE_KEY
from normconv.deploy.runners import FileRunner, ModuleRunner, ProgramRunner, Runner
from normconv.errors import NormconvError
from normconv.numerics.error import noise_bound, relative_l2

__all__ = ["Place", "first_to_leave"]

# How many of the reference's next values of the same shape a value may equal: conv, norm, activation.
_AHEAD = 6

Key = tuple[str, int]  # a module's name, and which of its calls in one run


@dataclass(frozen=True)
class Place:
    """Where the bound is left first.

    Args:
        module: the module's qualified name; empty when no inner value leaves its bound.
        error: rel-L2 of its output against float64.
        bound: what rounding explains there.
        node: the node of a file that gives the output, and its operator.
    """

    module: str
    error: float = 0.0
    bound: float = 0.0
    node: str = ""

    def __str__(self) -> str:
        if not self.module:
            return (
                "no module's output leaves its bound when inner values are looked at: the backend's "
                "fusions, or what is after the last module"
            )
        node = f", node {self.node}" if self.node else ""
        return (
            f"{self.module} is the first to leave the bound: {self.error:.2g} is not <= "
            f"{self.bound:.2g} there{node}"
        )


@dataclass(frozen=True)
class _Truths:
    """The reference's inner values in the order in which they were ready, and their bounds."""

    values: dict[Key, Tensor]
    bounds: dict[Key, float]


@dataclass
class _Found:
    """The candidate's inner values.

    Args:
        values: by key.
        nodes: the node that gives each, of a file.
        later: the keys that are computed from a value, of a file.
    """

    values: dict[Key, Tensor]
    nodes: Mapping[Key, str]
    later: Callable[[Key], set[Key]]


def first_to_leave(
    reference: Runner,
    candidate: Runner,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    eps: float,
) -> Place | None:
    """Find the first module whose output in the candidate is further off than rounding explains.

    Args:
        reference: a module's runner; of others no inner values are known.
        candidate: a module's or a file's runner.
        args: the inputs on which an output missed its bound.
        kwargs: likewise.
        eps: of the dtype that the candidate computes in.

    Returns:
        The place; None where the two cannot be compared module by module.
    """
    if type(reference) is not ModuleRunner or isinstance(candidate, ProgramRunner):
        return None
    try:
        truths = _truths(reference, args, kwargs, eps)
        found = _found(candidate, args, kwargs, set(truths.values))
    except (NormconvError, RuntimeError, ValueError, TypeError):
        return None
    return _first(truths, found) if found is not None and found.values else None


def _truths(
    reference: ModuleRunner, args: tuple[Any, ...], kwargs: Mapping[str, Any], eps: float
) -> _Truths:
    exact: dict[Key, Tensor] = {}
    own: dict[Key, float] = {}

    def measure(key: Key, value: Tensor) -> None:
        if key in exact and exact[key].shape == value.shape:
            own[key] = relative_l2(value, exact[key])

    finer = reference.exact()
    assert isinstance(finer, ModuleRunner)
    with _recorded(finer.model, lambda key, value: exact.update({key: value.clone()})):
        finer.run(args, kwargs)
    with _recorded(reference.model, measure):
        reference.run(args, kwargs)
    bounds = {key: noise_bound(torch.float32, max(eps, error)) for key, error in own.items()}
    # A bound that is NaN proves nothing there.
    kept = {key: value for key, value in exact.items() if bounds.get(key, float("nan")) > 0}
    return _Truths(kept, bounds)


@contextmanager
def _recorded(model: nn.Module, see: Callable[[Key, Tensor], object]) -> Iterator[None]:
    """Show every module's output when it is ready, where that is one floating tensor."""
    calls: dict[str, int] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                see((name, call), output.detach())

        return hook

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _found(
    candidate: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: set[Key]
) -> _Found | None:
    if isinstance(candidate, ModuleRunner):
        values: dict[Key, Tensor] = {}
        with _recorded(candidate.model, lambda key, value: values.update({key: value.clone()})):
            # A compiled module's inner values are those of the module itself.
            ModuleRunner(candidate.model).run(args, kwargs)
        return _Found(values, {}, lambda key: {k for k in values if _holds(k, key)})
    return _of_file(candidate, args, kwargs, wanted) if isinstance(candidate, FileRunner) else None


def _holds(outer: Key, inner: Key) -> bool:
    """Whether a module is inside another: then the other's output is computed from its."""
    return inner[0].startswith(outer[0] + ".")


def _first(truths: _Truths, found: _Found) -> Place | None:
    keys = list(truths.values)
    right: set[Key] = set()
    off: dict[Key, float] = {}
    for place, key in enumerate(keys):
        value = found.values.get(key)
        if value is None or value.shape != truths.values[key].shape:
            continue
        error = relative_l2(value, truths.values[key])
        ahead = (k for k in keys[place + 1 :] if truths.values[k].shape == value.shape)
        near = (k for k, _ in zip(ahead, range(_AHEAD), strict=False))
        if error <= truths.bounds[key] or any(
            relative_l2(value, truths.values[k]) <= truths.bounds[k] for k in near
        ):
            right.add(key)
        else:
            off[key] = error
    if not right and not off:
        return None
    for key, error in off.items():
        if not found.later(key) & right:
            return Place(key[0], error, truths.bounds[key], found.nodes.get(key, ""))
    return Place("")


# --- files --------------------------------------------------------------------------------------


def _of_file(
    runner: FileRunner, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: set[Key]
) -> _Found:
    """Run a file with the outputs of its modules as further outputs."""
    model = onnx.load(runner.path)
    names = {key: name for key, name in _boundaries(model.graph).items() if key in wanted}
    known = {value.name for value in model.graph.output}
    extra = dict.fromkeys(name for name in names.values() if name not in known)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    outputs = runner.run_model(model, args, kwargs)
    values = {key: outputs[name] for key, name in names.items()}
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes = {k: f"{producers[n].name} ({producers[n].op_type})" for k, n in names.items()}

    def later(key: Key) -> set[Key]:
        reached = {names[key]}
        for node in model.graph.node:  # in topological order
            if not reached.isdisjoint(node.input):
                reached.update(node.output)
        return {k for k, name in names.items() if name in reached and name != names[key]}

    return _Found(values, nodes, later)


def _boundaries(graph: onnx.GraphProto) -> dict[Key, str]:
    """Return the values that leave a module, by module and call, in the order of the graph."""
    module_of = {name: _module(node) for node in graph.node for name in node.output}
    users: dict[str, set[str]] = {name: set() for name in module_of}
    for node in graph.node:
        for name in node.input:
            if name in users:
                users[name].add(_module(node))
    for value in graph.output:
        users.setdefault(value.name, set()).add("")
    found: dict[Key, str] = {}
    count: dict[str, int] = {}
    for name, module in module_of.items():
        parts = module.split(".") if module else []
        for depth in range(len(parts), 0, -1):
            outer = ".".join(parts[:depth])
            if any(not (user == outer or user.startswith(outer + ".")) for user in users[name]):
                found[outer, count.setdefault(outer, 0)] = name
                count[outer] += 1
    return found


def _module(node: onnx.NodeProto) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE_KEY), "")
