"""A second run with one sample changed, held against the first, module by module.

Where another sample's part of a tensor differs from the first run it is put back as it was: what comes
after is then judged by itself, and not for what it inherits. A module whose inputs were right and whose
outputs are not is to blame; where the inputs of a module are not right, what the module around it does
between its submodules is.

Where no axis surely holds the samples (tokens flattened, chunks of a batch) there is only a suspicion,
and the next tensor with such an axis decides. A module that calls others on as many rows as the values
want (routing to experts) is judged by its outputs alone: equal sizes would be of other samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normconv.auditing.recording import Key, Moment, Record, judgeable, random_state
from normconv.auditing.slots import Change, bound_of, change_of, heal_, relative_change

__all__ = ["Blame", "Comparison", "Noise"]

Noise = Mapping[tuple[Key, int], float]
"""What a tensor differs by in a run in which nothing was changed, by place."""

_NOISE_FACTOR = 16.0


@dataclass(frozen=True)
class Blame:
    """One thing found wrong with one module.

    Args:
        module: its name.
        kind: ``couples``, or ``random`` where it could not be judged.
        size: the relative change of other samples.
        gathered_by: modules inside it whose outputs have no axis of samples and depend on them.
    """

    module: str
    kind: Literal["couples", "random"]
    size: float
    gathered_by: tuple[str, ...] = ()


@dataclass
class _Frame:
    """One running call."""

    name: str
    number: int
    judged: bool = True
    closed: bool = False
    clean: bool = True
    rows: dict[int, Tensor] = field(default_factory=dict)
    suspects: dict[str, float] = field(default_factory=dict)
    gathered: dict[str, None] = field(default_factory=dict)
    random: bool = False

    def inherit(self, inner: _Frame) -> None:
        self.suspects |= inner.suspects
        self.gathered |= inner.gathered
        self.random |= inner.random

    def settle(self) -> None:
        """Nothing came of what was suspected."""
        self.suspects, self.gathered, self.random = {}, {}, False


class Comparison:
    """Listens to a run and holds it against the record of another.

    Args:
        record: the run before the change.
        samples: how many the batch has.
        sample: which one was changed; None where nothing was, and all must be the same.
        devices: the CUDA devices whose generators count.
        sure: modules that are blamed on suspicion: norms over the batch by their class.
        noise: how far the model is from repeating itself.
        opaque: modules of which only the outputs are judged, and nothing that is called inside.
    """

    def __init__(
        self,
        record: Record,
        samples: int,
        sample: int | None,
        devices: list[int],
        sure: frozenset[str] = frozenset(),
        noise: Noise | None = None,
        opaque: frozenset[str] = frozenset(),
    ) -> None:
        self.blames: list[Blame] = []
        self.reached: dict[str, None] = {}
        self.opaque: dict[str, None] = {}
        self.calls: set[tuple[str, int]] = set()
        self.sizes_vary = False
        self.gathered_outputs = False
        self.responds = False
        self.noise: dict[tuple[Key, int], float] = {}
        self._record = record
        self._samples, self._sample = samples, sample
        self._devices, self._sure = devices, sure
        self._known_noise = noise or {}
        self._known_opaque = opaque
        self._frames: list[_Frame] = []

    def enter(self, name: str, number: int, module: nn.Module, given: Any) -> None:
        """Judge what a module is given: what is wrong there was done by the module around it."""
        frame = _Frame(name, number)
        around = self._frames[-1] if self._frames else frame
        frame.closed = around.closed or (around.name in self._known_opaque and around is not frame)
        frame.judged = not frame.closed
        self.calls.add((name, number))
        self._frames.append(frame)
        pairs = self._pairs((name, number, "in"), given, frame, around)
        for place, (base, now) in enumerate(pairs):
            change = self._change((name, number, "in"), place, base, now)
            if change.kind != "same":
                self.reached[name] = None
            if change.kind == "mixed" and around is not frame:
                self._resolve(_responsible(self._frames[:-1]), change.size)
                frame.clean &= heal_(now, base, change.slot)
            elif change.kind in ("suspect", "gathered"):
                frame.clean = False
                if change.kind == "suspect":
                    around.suspects.setdefault(around.name, change.size)
            _note_rows(frame.rows, base, now)

    def leave(self, name: str, number: int, given: Any, finished: bool) -> None:
        """Judge what it returns."""
        frame = self._frames.pop()
        around = self._frames[-1] if self._frames else None
        if not finished:
            return
        key: Key = (name, number, "out")
        pairs = self._pairs(key, given, frame, frame)
        changes = [self._change(key, place, *pair) for place, pair in enumerate(pairs)]
        self._judge_outputs(frame, pairs, changes)
        settled = bool(pairs) and all(
            change.kind == "same" or self._is_certain(base)
            for change, (base, _) in zip(changes, pairs, strict=True)
        )
        if around is None:
            self._finish(frame, changes, settled)
        elif settled:
            frame.settle()
        else:
            around.inherit(frame)

    def _judge_outputs(
        self,
        frame: _Frame,
        pairs: list[tuple[Tensor, Tensor]],
        changes: list[Change],
    ) -> None:
        for change, (base, now) in zip(changes, pairs, strict=True):
            if change.kind != "same":
                self.reached[frame.name] = None
            sure = change.kind == "suspect" and frame.name in self._sure
            if change.kind == "mixed" or (sure and frame.clean):
                self._resolve(_responsible([*self._frames, frame]), change.size)
                heal_(now, base, change.slot)
            elif change.kind == "suspect" and frame.clean:
                # Nothing is put back on a suspicion: the next certain tensor says whether it was right.
                frame.suspects.setdefault(frame.name, change.size)
            elif change.kind == "gathered" and frame.clean:
                frame.gathered[frame.name] = None
            elif change.kind == "gathered" and _spreads(frame.rows, base, now):
                frame.suspects.setdefault(frame.name, change.size)

    def _resolve(self, frame: _Frame, size: float) -> None:
        """Another sample has changed for certain: blame who is suspected, else the module itself."""
        if frame.random or (frame.name in self._known_opaque and self._draws(frame)):
            self.blames.append(Blame(frame.name, "random", size))
        elif frame.suspects:
            self.blames += [Blame(name, "couples", most) for name, most in frame.suspects.items()]
        else:
            self.blames.append(Blame(frame.name, "couples", size, tuple(frame.gathered)))
        frame.settle()

    def _draws(self, frame: _Frame) -> bool:
        """Whether a call draws random numbers; in an opaque one their order depends on the values."""
        given = self._record.moments.get((frame.name, frame.number, "in"))
        after = self._record.moments.get((frame.name, frame.number, "out"))
        if given is None or after is None:
            return False
        return not all(torch.equal(a, b) for a, b in zip(given.random, after.random, strict=True))

    def _finish(self, frame: _Frame, changes: list[Change], settled: bool) -> None:
        """The model has returned; what is still suspected will not be settled any more."""
        self.responds = any(change.kind != "same" for change in changes)
        self.gathered_outputs = any(change.kind == "gathered" for change in changes)
        if not settled and frame.suspects:
            self._resolve(frame, max(frame.suspects.values()))
        elif not settled and frame.random:
            self._resolve(frame, float("nan"))

    def _pairs(
        self, key: Key, given: Any, frame: _Frame, around: _Frame
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair the tensors of both runs; a call whose sizes depend on the values is left to others."""
        if not frame.judged:
            return []
        moment = self._record.moments.get(key)
        tensors = judgeable(given)
        if moment is None or _shapes(moment.tensors) != _shapes(tensors):
            # What is called in here is not known to be of the same rows either.
            frame.judged, frame.closed = False, True
            outer = next((other for other in reversed(self._frames) if other is not frame), frame)
            self.opaque[outer.name] = None
            self.sizes_vary |= outer is frame
            return []
        self._align(moment, around)
        return list(zip(moment.tensors, tensors, strict=True))

    def _align(self, moment: Moment, frame: _Frame) -> None:
        """Let both runs draw the same numbers from here on, and remember where they did not."""
        now = random_state(self._devices)
        if all(torch.equal(a, b) for a, b in zip(moment.random, now, strict=True)):
            return
        frame.random = True
        torch.set_rng_state(moment.random[0])
        for device, state in zip(self._devices, moment.random[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def missing(self) -> set[str]:
        """Return the modules that made calls in the first run that this one did not make."""
        return {self._record.around[call] for call in self._record.around.keys() - self.calls}

    def _change(self, key: Key, place: int, base: Tensor, now: Tensor) -> Change:
        if self._sample is None:
            size = relative_change(base, now)
            if size:
                self.noise[key, place] = size
            return Change("mixed" if size else "same", size)
        bound = max(bound_of(base), _NOISE_FACTOR * self._known_noise.get((key, place), 0.0))
        return change_of(base, now, self._samples, self._sample, bound)

    def _is_certain(self, tensor: Tensor) -> bool:
        return self._samples in tensor.shape


def _shapes(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def _responsible(running: list[_Frame]) -> _Frame:
    """The innermost call whose inputs were right: others have only handed on what they were given."""
    return next((frame for frame in reversed(running) if frame.clean), running[0])


def _note_rows(rows: dict[int, Tensor], base: Tensor, now: Tensor) -> None:
    """Remember which rows of a call's inputs have changed, by how many there are."""
    if base.dim():
        changed = _changed_rows(base, now)
        known = rows.get(len(changed))
        rows[len(changed)] = changed if known is None else known | changed


def _spreads(rows: Mapping[int, Tensor], base: Tensor, now: Tensor) -> bool:
    """Whether a row of an output has changed of which every input is as it was."""
    inputs = rows.get(base.shape[0]) if base.dim() else None
    return inputs is not None and bool((_changed_rows(base, now) & ~inputs).any())


def _changed_rows(base: Tensor, now: Tensor) -> Tensor:
    return (
        (base != now).reshape(len(base), -1).any(1) if base.numel() else torch.zeros(len(base)) > 0
    )
