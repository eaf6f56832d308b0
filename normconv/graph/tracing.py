"""The record of one real forward pass, as calls: what was entered, what it read, what it wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.graph.calls import Call, CallGraph, CallKind, first_shape
from normconv.graph.families import is_leaf
from normconv.graph.names import Names
from normconv.graph.tensor_identity import Key, Memory, View, view_of

__all__ = ["Group", "Trace", "copied", "shapes_of", "tensors_in"]

_DEEPEST = 8


@dataclass(eq=False)
class Group:
    """One call while it runs: a norm or linear operator, a function of torch, or a single operator.

    Args:
        kind: of the call it becomes.
        target: of the call it becomes.
        reads: the calls whose values it has read, in order.
        created: memory that was first seen inside it.
        views: views that it took of other memory: reading one again is nothing new.
        written: memory from outside that it wrote to.
        operators: how many operators ran inside.
    """

    kind: CallKind
    target: str
    reads: dict[int, None] = field(default_factory=dict)
    created: set[Key] = field(default_factory=set)
    views: set[tuple[Key, View]] = field(default_factory=set)
    written: set[Key] = field(default_factory=set)
    operators: int = 0


class Trace:
    """Turns what is seen of a running model into calls.

    Args:
        model: the model that runs.
        names: of the model.
    """

    def __init__(self, model: nn.Module, names: Names) -> None:
        self.calls: list[Call] = []
        self.extents: list[int] = []
        self.extent = 0
        self._names = names
        self._memory = Memory()
        self._reads: set[str] = set()
        self._functional: list[str] = []
        self._groups: list[Group] = []
        self._owners: dict[Key, tuple[str, ...]] = {}
        self._attributes: dict[Key, int] = {}
        leaves = [name for name, module in model.named_modules() if is_leaf(module)]
        for module in model.modules():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    owners = [_leaf_around(name, leaves) for name in names.owners(tensor)]
                    key = self._memory.hold(tensor)
                    self._owners[key] = (*self._owners.get(key, ()), *owners)

    @property
    def innermost(self) -> Group | None:
        """The call that runs now."""
        return self._groups[-1] if self._groups else None

    def add_input(self, name: str, tensor: Tensor) -> None:
        """Note an input of the model."""
        key = self._memory.hold(tensor)
        if key in self._owners:
            return
        index = self._add("input", name, (), first_shape(tensor))
        if not self._memory.knows(key):
            self._memory.write(key, index)
        self._memory.put(tensor, index)

    def enter(self, kind: CallKind, target: str) -> Group:
        """Begin a call."""
        group = Group(kind, target)
        self._groups.append(group)
        return group

    def read(self, tensor: Tensor) -> None:
        """Note that the running call reads a tensor."""
        group = self._groups[-1]
        key = self._memory.hold(tensor)
        if key in group.created or (key, view_of(tensor)) in group.views:
            return
        if key in self._owners:
            if not self._is_own(group, key):
                self._reads.update(self._owners[key])
                group.reads[self._attribute(key)] = None
            return
        group.reads[self._resolve(tensor, key)] = None

    def wrote(self, tensor: Tensor) -> None:
        """Note that the running call has written to a tensor."""
        group = self._groups[-1]
        key = self._memory.hold(tensor)
        if key not in group.created and key not in self._owners:
            group.written.add(key)

    def made(self, tensor: Tensor) -> None:
        """Note that an operator inside the running call has returned a tensor, new or a view."""
        group = self._groups[-1]
        key = self._memory.hold(tensor)
        if key in self._owners or self._memory.knows(key) or key in group.written:
            group.views.add((key, view_of(tensor)))
        else:
            group.created.add(key)

    def peek(self, tensor: Tensor) -> int | None:
        """Return the call whose output this very tensor is, if it is known and is one whole output."""
        place = self._memory.maker(tensor)
        return place if isinstance(place, int) else None

    def leave(self, output: Any, compute: Callable[[Mapping[int, Any]], Any] | None = None) -> None:
        """End the running call; what it returned and wrote is from now on its own."""
        group = self._groups.pop()
        found = list(tensors_in(output))
        if group.written or group.kind == "module":
            compute = None
        inputs = tuple(group.reads)
        index = self._add(group.kind, group.target, inputs, first_shape(output), compute)
        outer = self.innermost
        for key in group.created | group.written:
            self._memory.write(key, index)
            if outer is not None and key in group.written and key not in outer.created:
                outer.written.add(key)
        if outer is not None:
            outer.reads[index] = None
        for path, tensor in found:
            self._place(group, index, path, tensor)

    def drop(self) -> None:
        """End the running call as if it had not been: it touched nothing."""
        self._groups.pop()

    def functional_norm(self) -> None:
        """Note a norm with fixed statistics that is called as a function."""
        number = len(self._functional)
        self._functional.append("batch_norm" + (f"_{number}" if number else ""))

    def finish(self, output: Any) -> None:
        """Note what the model returns."""
        group = self.enter("output", "output")
        for _, tensor in tensors_in(output):
            self.read(tensor)
        self._groups.pop()
        self._add("output", "output", tuple(group.reads), first_shape(output))

    def keep(self, output: Any) -> None:
        """Note what somebody still holds: the model keeps it, or returns it in what nobody knows."""
        known = {*self._owners, *(self._memory.hold(tensor) for _, tensor in tensors_in(output))}
        held = [self._memory.writer(key) for key in self._memory.alive() if key not in known]
        made = tuple(dict.fromkeys(i for i in held if self.calls[i].kind != "input"))
        if made:
            self._add("function", "what is kept after the forward", made, None)

    def graph(self) -> CallGraph:
        """Return the calls as a graph."""
        reads, norms = frozenset(self._reads), tuple(self._functional)
        return CallGraph(tuple(self.calls), "hooks", reads, norms)

    def _add(
        self,
        kind: CallKind,
        target: str,
        inputs: tuple[int, ...],
        shape: tuple[int, ...] | None,
        compute: Callable[[Mapping[int, Any]], Any] | None = None,
    ) -> int:
        index = len(self.calls)
        self.calls.append(Call(index, kind, target, inputs, shape, compute=compute))
        self.extents.append(self.extent)
        return index

    def _is_own(self, group: Group, key: Key) -> bool:
        return group.kind == "module" and group.target in self._owners[key]

    def _attribute(self, key: Key) -> int:
        if key not in self._attributes:
            owner = self._owners[key][0]
            self._attributes[key] = self._add("attribute", f"{owner} (a tensor of it)", (), None)
        return self._attributes[key]

    def _resolve(self, tensor: Tensor, key: Key) -> int:
        """Return the call that made what is read; a stale view or an unknown part gets one of its own."""
        if not self._memory.knows(key):
            made = self._add("function", "a tensor that no traced operation made", (), None)
            self._memory.write(key, made)
            return made
        place = self._memory.maker(tensor)
        if isinstance(place, int):
            return place
        writer = self._memory.writer(key)
        shape = first_shape(tensor)
        if place is not None:
            whole, path = place
            item = self._add("function", "getitem", (whole,), shape, _item(whole, path))
            self._memory.put(tensor, item)
            return item
        last = self.calls[writer]
        if last.kind == "function" and last.compute is None and last.shape == shape:
            return writer
        alias = self._add("function", "another view", (writer,), shape)
        self._memory.put(tensor, alias)
        return alias

    def _place(self, group: Group, index: int, path: tuple[int, ...], tensor: Tensor) -> None:
        key = self._memory.hold(tensor)
        if key in self._owners:
            return
        if not self._memory.knows(key):
            self._memory.write(key, index)
        ours = key in group.created or key in group.written
        if group.kind == "module" and not ours and (before := self.peek(tensor)) != index:
            # It hands on what it was given: whoever reads that reads both.
            both = (index, self._memory.writer(key) if before is None else before)
            index, path = self._add("function", "another view", both, first_shape(tensor)), ()
        self._memory.put(tensor, (index, path) if path else index)


def _leaf_around(name: str, leaves: Sequence[str]) -> str:
    """The outermost norm or linear operator that a module is part of; else itself."""
    around = (leaf for leaf in leaves if name == leaf or name.startswith(f"{leaf}.") or not leaf)
    return next(around, name)


def _item(whole: int, path: tuple[int, ...]) -> Callable[[Mapping[int, Any]], Any]:
    def compute(values: Mapping[int, Any]) -> Any:
        value = values[whole]
        for place in path:
            value = value[place]
        return value

    return compute


def tensors_in(value: Any) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield every tensor of a nested value with its path: containers, dataclasses, plain objects.

    >>> import torch
    >>> [path for path, _ in tensors_in({"a": torch.zeros(1), "b": [torch.zeros(1)]})]
    [(0,), (1, 0)]
    """
    seen: set[int] = set()
    waiting: list[tuple[tuple[int, ...], Any]] = [((), value)]
    while waiting:
        path, item = waiting.pop(0)
        if isinstance(item, Tensor):
            yield path, item
        elif id(item) not in seen and len(path) < _DEEPEST:
            seen.add(id(item))
            waiting += [((*path, place), inner) for place, inner in enumerate(_inside(item))]


def _inside(value: Any) -> Sequence[Any]:
    if isinstance(value, (str, bytes, int, float, nn.Module, type)):
        return ()
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, entry.name, None) for entry in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).values())


def copied(value: Any) -> Any:
    """Copy the tensors of nested inputs: a forward may write into them; one given twice stays one."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return pytree.tree_map_only(Tensor, copy, value)


def shapes_of(given: Any) -> str:
    """List the shapes of all tensors in nested inputs."""
    shapes = [str(tuple(tensor.shape)) for _, tensor in tensors_in(given)]
    return ", ".join(shapes) or "no tensors"
