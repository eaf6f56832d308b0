"""Train, convert, fold, export, run: every stage through the public API, measured on test digits."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normconv.api import convert
from normconv.demo.digits import Digits, DigitsResNet, accuracy, load_digits, train
from normconv.deploy import Session, export_onnx, norm_nodes
from normconv.files import write_json
from normconv.folding import fold
from normconv.graph import is_norm
from normconv.numerics import relative_l2, take_turns
from normconv.report import Report
from normconv.sources import save

__all__ = ["Row", "Stages", "run", "steps_of"]

_ROUNDS = 15
_PAUSE = 0.02  # seconds


@dataclass(frozen=True)
class Row:
    """One line of the closing table.

    Args:
        name: the stage.
        accuracy: on the test digits, 0-1.
        error: rel-L2 error of the logits against the original in float64.
        norm_nodes: norms left, as modules or as nodes of the file.
        milliseconds: median for one batch of 64.
        file: what it was written to.
    """

    name: str
    accuracy: float
    error: float
    norm_nodes: int
    milliseconds: float
    file: str


class Stages(NamedTuple):
    """What the demo made: the closing table and the reports of its verbs."""

    rows: tuple[Row, ...]
    converted: Report
    folded: Report
    exported: Report


def steps_of(data: Digits, epochs: int) -> int:
    """Return how many training steps there will be."""
    return len(data.train_labels) // 64 * epochs


def run(
    folder: Path,
    *,
    epochs: int = 12,
    begin: Callable[[int], None] = lambda steps: None,
    step: Callable[[float], None] = lambda loss: None,
    say: Callable[[str], None] = lambda line: None,
) -> Stages:
    """Do the main job on digits and leave all files in `folder`.

    Args:
        folder: made if it is not there.
        epochs: of training.
        begin: called with the number of training steps.
        step: called after each with the loss.
        say: called with a line when a stage begins.

    Raises:
        MissingDependency: scikit-learn or ONNX Runtime is not installed.
        CheckFailed: some stage does not compute what the one before did.
    """
    data = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    example = (data.test_images[:8],)
    torch.manual_seed(0)
    model = DigitsResNet()
    begin(steps_of(data, epochs))
    train(model, data, epochs=epochs, step=step)
    save(model, folder / "model.pt")

    say("convert --to wn")
    converted, convert_report = convert(model, "wn", example_inputs=example)
    save(converted, folder / "model.wn.pt")
    write_json(folder / "model.wn.json", convert_report.to_dict())
    say("fold")
    folded, fold_report = fold(converted)
    save(folded, folder / "model.folded.pt")
    say("export to ONNX and run it in ONNX Runtime")
    export_report = export_onnx(converted, folder / "model.onnx", example_inputs=example)
    session = Session(folder / "model.onnx")

    def in_session(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run({"x": images})["output"])

    say("measure")
    stages: list[tuple[str, Callable[[Tensor], Tensor], int, str]] = [
        ("original", _eager(model), _norms(model), "model.pt"),
        ("converted (wn)", _eager(converted), _norms(converted), "model.wn.pt"),
        ("folded", _eager(folded), _norms(folded), "model.folded.pt"),
        (
            f"ONNX ({session.provider})",
            in_session,
            len(norm_nodes(folder / "model.onnx")),
            "model.onnx",
        ),
    ]
    with torch.no_grad():
        reference = _float64(model)(data.test_images.double())
    times = _interleaved([compute for _, compute, _, _ in stages], data.test_images[:64])
    rows = []
    for (name, compute, norms, file), milliseconds in zip(stages, times, strict=True):
        logits = compute(data.test_images)
        error = relative_l2(logits, reference)
        rows.append(Row(name, accuracy(logits, data.test_labels), error, norms, milliseconds, file))
    return Stages(tuple(rows), convert_report, fold_report, export_report)


def _eager(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def compute(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(images)
        return logits

    return compute


def _float64(model: nn.Module) -> nn.Module:
    twin = DigitsResNet().double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def _norms(model: nn.Module) -> int:
    return sum(is_norm(module) for module in model.modules())


def _interleaved(computes: list[Callable[[Tensor], Tensor]], images: Tensor) -> list[float]:
    """Time one batch in turn, so that the machine's mood falls on all alike; medians in ms."""
    works = [functools.partial(compute, images) for compute in computes]
    times = take_turns(works, seconds=0.0, least=_ROUNDS, unmeasured=1, pause=_PAUSE)
    return [1e3 * statistics.median(turn[0] for turn in turns) for turns in times]
