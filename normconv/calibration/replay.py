"""Passes over the same batches again, without running again what cannot have changed since.

Calibration goes through a model from front to back, a pass for each group of norms. Without this its
cost grows with the square of the depth: each pass would run all that is in front. What a module puts out
before anything that may still change was called is kept, and stands in for it in the passes after.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.calibration.batches import Batches
from normconv.calibration.ranks import of_all_ranks
from normconv.errors import Problem, UsageError
from normconv.layers import copy_model
from normconv.numerics import evaluating, relative_l2
from normconv.proof import flat_outputs

__all__ = ["Cache", "Replay", "Shelf", "replayed", "shelf_of"]

Found = TypeVar("Found")

Cache = Literal["memory", "disk", "none"]
_ROOM = 2**31  # bytes of memory
_SAME = 1e-5  # rel-L2: a kernel may choose another order of sums


class Shelf:
    """Where outputs are kept, with the room that is left.

    Args:
        folder: on disk; None for memory.
        room: in bytes.
    """

    def __init__(self, folder: Path | None, room: float) -> None:
        self.folder, self.room = folder, room
        self._files = 0

    def put(self, value: Any) -> _Kept | None:
        """Keep a copy of a value; None where there is no room."""
        size = _bytes_of(value)
        if size > self.room:
            return None
        self.room -= size
        if self.folder is None:
            kept = _copied(value)
            return _Kept(lambda: _copied(kept), size)
        path, self._files = self.folder / f"{self._files}.pt", self._files + 1
        # Only tensors are written: what holds them is the user's class, which no safe load knows.
        leaves, form = pytree.tree_flatten(value)
        torch.save([leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)], path)
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def load() -> Any:
            back = dict(zip(places, torch.load(path), strict=True))
            return pytree.tree_unflatten([back.get(i, o) for i, o in enumerate(others)], form)

        return _Kept(load, size, path)

    def drop(self, kept: _Kept) -> None:
        """Make room again."""
        self.room += kept.size
        if kept.path is not None:
            kept.path.unlink()


@contextmanager
def shelf_of(cache: Cache) -> Iterator[Shelf]:
    """Give a shelf in memory, in a temporary folder, or without room.

    Raises:
        UsageError: an unknown cache.
    """
    if cache not in get_args(Cache):
        what = f"{cache!r} is unknown"
        raise UsageError(Problem("cache", what, f"take one of {', '.join(get_args(Cache))}"))
    if cache == "disk":
        with tempfile.TemporaryDirectory(prefix="normconv-") as folder:
            yield Shelf(Path(folder), float("inf"))
    else:
        yield Shelf(None, _ROOM if cache == "memory" else 0)


class _Kept(NamedTuple):
    """A value on a shelf: what gives a copy of it, how large it is, and the file that it is in."""

    load: Callable[[], Any]
    size: int
    path: Path | None = None


class Replay:
    """A model, and what its modules put out on each batch.

    A module is left alone where its output shares memory with its input, where it writes into its input,
    or where it has hooks of its own. What modules do besides putting something out is not seen:
    `repeats_itself` tells.

    Args:
        model: run in eval mode; hooks and forwards are put on its modules and taken off again.
        shelf: where outputs are kept.
    """

    def __init__(self, model: nn.Module, shelf: Shelf) -> None:
        self.model, self.shelf = model, shelf
        self._calls: Counter[nn.Module] | None = None
        self._inputs: dict[int, _Kept] = {}
        self._outputs: dict[int, dict[nn.Module, list[_Kept]]] = {}

    def calls(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Counter[nn.Module]:
        """Return how often each module is called, from one whole run on the first inputs asked with."""
        if self._calls is None:
            counted: Counter[nn.Module] = Counter()
            with ExitStack() as stack:
                for module in self.model.modules():
                    handle = module.register_forward_pre_hook(lambda m, _: counted.update([m]))
                    stack.callback(handle.remove)
                with evaluating(self.model):
                    self.model(*args, **kwargs)
            self._calls = counted
        return self._calls

    @contextmanager
    def passing(self, batch: int, inputs: Any, moving: Set[nn.Module]) -> Iterator[None]:
        """Let what is kept of a batch stand in while the block runs the model on it, and keep more.

        Args:
            batch: its number.
            inputs: what the model is called with; where they are others than the last time nothing that
                was kept is used.
            moving: modules that may change between passes, or that are looked at.
        """
        if not self.shelf.room and not self._outputs:
            yield
            return
        if batch in self._inputs and not _equal(self._inputs[batch].load(), inputs):
            self._forget(batch)
        if batch not in self._inputs:
            if (mine := self.shelf.put(inputs)) is None:
                yield
                return
            self._inputs[batch] = mine
        kept = self._outputs.setdefault(batch, {})
        with ExitStack() as stack:
            _Pass(self, kept, moving).watch(stack)
            yield

    def repeats_itself(self, batches: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> bool:
        """Say whether the model puts out the same with what is kept and without.

        Args:
            batches: the first ones. All are run without what is kept before any is run with it: what a
                module leaves behind for another one is then that of another batch.
        """
        if not any(self._outputs.values()):
            return True
        with torch.no_grad(), evaluating(self.model):
            plain = [_copied(flat_outputs(self.model(*a, **k))) for a, k in batches]
            for batch, (args, kwargs) in enumerate(batches):
                with self.passing(batch, (args, kwargs), set()):
                    replayed = flat_outputs(self.model(*args, **kwargs))
                for name, value in plain[batch].items():
                    if not relative_l2(replayed[name], value) <= _SAME:
                        return False
        return True

    def keep(self, kept: dict[nn.Module, list[_Kept]], module: nn.Module, output: Any) -> None:
        """Keep an output; what was kept of the modules inside is not needed any more."""
        if (mine := self.shelf.put(output)) is None:
            return
        kept.setdefault(module, []).append(mine)
        for inside in module.modules():
            if inside is not module:
                self._drop(kept.pop(inside, []))

    def _forget(self, batch: int) -> None:
        for outputs in self._outputs.pop(batch).values():
            self._drop(outputs)
        self.shelf.drop(self._inputs.pop(batch))

    def _drop(self, outputs: list[_Kept]) -> None:
        for each in outputs:
            self.shelf.drop(each)


class _Pass:
    """One pass: which call of which module it is, and whether anything moving has been called."""

    def __init__(
        self, replay: Replay, kept: dict[nn.Module, list[_Kept]], moving: Set[nn.Module]
    ) -> None:
        self.replay, self.kept, self.moving = replay, kept, moving
        self.moved = False
        self.calls: Counter[nn.Module] = Counter()
        self.inputs: dict[nn.Module, list[list[tuple[Tensor, int]]]] = {}

    def watch(self, stack: ExitStack) -> None:
        able = {m for m in self.replay.model.modules() if _can_stand_in(m)}
        for module in self.replay.model.modules():
            if module in self.moving:
                handle = module.register_forward_pre_hook(self._move, prepend=True)
                stack.callback(handle.remove)
            elif module is not self.replay.model and module in able:
                if self.kept.get(module):
                    stack.enter_context(_forward(module, self._replayed(module)))
                before = module.register_forward_pre_hook(self._before, with_kwargs=True)
                after = module.register_forward_hook(self._after, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)

    def _move(self, module: nn.Module, args: Any) -> None:
        self.moved = True

    def _replayed(self, module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call, outputs = self.calls[module], self.kept.get(module, ())
            return outputs[call].load() if call < len(outputs) else own(*args, **kwargs)

        return forward

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        versions = [(t, -1 if t.is_inference() else t._version) for t in tensors]
        self.inputs.setdefault(module, []).append(versions)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, inputs = self.calls[module], self.inputs[module].pop()
        self.calls[module] += 1
        if self.moved or call != len(self.kept.get(module, ())):
            return
        # Inference tensors do not count what is written into them.
        untouched = all(not t.is_inference() and t._version == version for t, version in inputs)
        if untouched and _is_its_own(output, inputs):
            self.replay.keep(self.kept, module, output)


def _can_stand_in(module: nn.Module) -> bool:
    """Whether nothing but its output would be missed: no hook of its own or of a module inside."""
    plain = not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module)
    return plain and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _is_its_own(output: Any, inputs: list[tuple[Tensor, int]]) -> bool:
    """Tensors, and plain values, in memory that no input has."""
    leaves = pytree.tree_leaves(output)
    taken = {t.untyped_storage().data_ptr() for t, _ in inputs}
    return all(
        leaf.untyped_storage().data_ptr() not in taken
        if isinstance(leaf, Tensor)
        else leaf is None or isinstance(leaf, (bool, int, float, str))
        for leaf in leaves
    ) and any(isinstance(leaf, Tensor) for leaf in leaves)


def _bytes_of(value: Any) -> int:
    tensors = (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, value)


def _equal(one: Any, other: Any) -> bool:
    (mine, form), (theirs, other_form) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return form == other_form and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(mine, theirs, strict=True)
    )


def replayed(
    model: nn.Module,
    other: nn.Module,
    data: Batches,
    cache: Cache,
    work: Callable[[nn.Module, tuple[Replay, Replay]], Found],
) -> Found:
    """Do work on a copy of a model, with replays of the copy and of another.

    Where a model does more than put something out, which shows by the end at the latest, the work is done
    again on a new copy, without a shelf.

    Args:
        model: copied.
        other: not changed by the work.
        data: what the passes go over.
        cache: where outputs are kept.
        work: takes the copy and both replays.
    """

    def once(cache: Cache) -> tuple[Found | None, bool]:
        twin = copy_model(model)
        with shelf_of(cache) as shelf:
            replays = Replay(twin, shelf), Replay(other, shelf)
            try:
                found = work(twin, replays)
                first = list(islice(data, 2))
                return found, all(replay.repeats_itself(first) for replay in replays)
            except (AttributeError, KeyError, TypeError):  # what was left behind is not there
                if cache == "none":
                    raise
                return None, False

    found, steady = once(cache)
    if not all(of_all_ranks(steady)) or found is None:
        found, _ = once("none")
    assert found is not None
    return found
