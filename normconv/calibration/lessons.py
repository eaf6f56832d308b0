"""What a lesson is, and where it is: a checkpoint of it goes on to the same result."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconv.calibration.ranks import of_all_ranks, rank
from normconv.errors import Problem, UsageError
from normconv.files import atomic_path

__all__ = ["Lesson", "State", "digest_of", "is_there", "resume_", "write_state"]


@dataclass(frozen=True)
class Lesson:
    """How a student is taught.

    Args:
        steps: batches it sees.
        lr: largest learning rate of Adam; it rises over the first tenth and falls as a cosine to 0.
        temperature: of both softmaxes, where outputs are class scores.
        every: steps between looks at the agreement.
        patience: looks without a better result before it stops.
        features: weight of the mean over the converted sites of the squared difference of their outputs,
            relative to the teacher's.
        scores: take outputs of shape (N, classes) for class scores, whose common offset says nothing; say
            False for a regression.
        amp: autocast the student to bfloat16.
        seed: of the order of batches.
    """

    steps: int = 400
    lr: float = 3e-4
    temperature: float = 2.0
    every: int = 50
    patience: int = 8
    features: float = 0.0
    scores: bool = True
    amp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 0, "every": 1, "patience": 1, "features": 0.0}
        wrong = [
            f"{n}={getattr(self, n)!r}" for n, low in least.items() if not getattr(self, n) >= low
        ]
        positive = (n for n in ("lr", "temperature") if not 0 < getattr(self, n) < math.inf)
        wrong += [f"{n}={getattr(self, n)!r}" for n in positive]
        if wrong:
            way_out = "steps ≥ 0, every and patience ≥ 1, lr and temperature > 0, features ≥ 0"
            raise UsageError(Problem("lesson", ", ".join(wrong), way_out))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a share of the largest."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass
class State:
    """Where the lesson is, and whose: all that a checkpoint holds besides student and optimizer."""

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    waited: int = 0
    seen: list[tuple[int, float]] = field(default_factory=list)
    subject: str = ""
    scores: list[tuple[int, float]] = field(default_factory=list)
    told: str = ""


def digest_of(*models: nn.Module) -> str:
    """Return a hash of all weights: whose checkpoint is it?"""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            if not isinstance(tensor, Tensor):  # extra state
                continue
            digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_state(
    path: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    best: Mapping[str, Tensor],
    lesson: Lesson,
) -> None:
    """Write a checkpoint, whole or not at all; of several processes the first one does."""
    if rank() != 0:
        return
    document = {
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": asdict(state),
        "best": dict(best),
        "lesson": asdict(lesson),
    }
    with atomic_path(path) as temporary:
        torch.save(document, temporary)


def is_there(path: str | Path) -> bool:
    """Say whether the first process sees such a file: all must go the same way."""
    return of_all_ranks(Path(path).exists())[0]


def resume_(
    path: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    lesson: Lesson,
    subject: str,
) -> tuple[State, dict[str, Tensor]]:
    """Put student and optimizer where a checkpoint has them; return the state and the best weights.

    Raises:
        UsageError: it cannot be read, or is of another lesson, student, teacher or data.
    """
    try:
        read = of_all_ranks(_read(path) if rank() == 0 else {})[0]
        if isinstance(read, Exception):
            raise read
        found: dict[str, Any] = read
        if found["lesson"] != asdict(lesson):
            raise ValueError("it is of another lesson")
        if found["state"]["subject"] != subject:
            raise ValueError("it is of another student, teacher or data")
        student.load_state_dict(found["student"])
        optimizer.load_state_dict(found["optimizer"])
    except Exception as reason:  # torch raises every kind
        what = f"cannot be resumed from ({str(reason).splitlines()[0]})"
        raise UsageError(
            Problem(os.fspath(path), what, "delete it, or give another name")
        ) from None
    return State(**found["state"]), found["best"]


def _read(path: Path) -> Any:
    """The checkpoint, or why not: other processes wait for either."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:
        return reason
