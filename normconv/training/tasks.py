"""What a network learns: the loss of each step, and what an evaluation measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.sources.datasets import Labelled, Samples

__all__ = ["Bound", "Classification", "Epoch", "Memory", "Scores", "Supervised", "Task"]

Scores = dict[str, Tensor]  # "loss" and others, each a mean over the batch
Memory = dict[str, Any]  # what an epoch leaves to the next; goes into checkpoints

_JUDGED = 512  # samples a batch when nothing is learnt


@dataclass(frozen=True)
class Epoch:
    """One pass.

    Args:
        number: from 0.
        batch_size: samples a step.
        seed: of the order of samples, the same for every normalization.
    """

    number: int
    batch_size: int
    seed: int

    def generator(self) -> torch.Generator:
        """Return a source of chance that depends on the seed and the number alone."""
        return torch.Generator().manual_seed(self.seed * 100_003 + self.number)


class Task(ABC):
    """What the engine needs to know of a problem.

    Attributes:
        headline: the measure that the table and the plot end on.
        higher_is_better: of the headline.
    """

    headline: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    def limited(self, limit: int | None) -> Task:
        """Return the task with at most so many samples an epoch, where it makes its own."""
        return self

    @abstractmethod
    def steps(self, data: Labelled | None, batch_size: int) -> int:
        """Return the number of steps an epoch, to show progress and to set the learning rate."""

    def check(self, network: nn.Module, data: Labelled | None) -> None:  # noqa: B027, most have data
        """Say whether a fresh network, in eval mode, takes the data; nothing here.

        Raises:
            UsageError: what it puts out is not what the loss needs. Whatever else the network raises on
                its inputs is told by who calls this.
        """

    @abstractmethod
    def losses(
        self, network: nn.Module, data: Labelled | None, epoch: Epoch, memory: Memory
    ) -> Iterator[Scores]:
        """Give the scores of each step; the network has learnt from them when the next is asked for."""

    @abstractmethod
    def evaluate(self, network: nn.Module, data: Labelled | None) -> dict[str, float]:
        """Return what the network, in eval mode, reaches on data it did not learn from."""


class Supervised(Task):
    """A task whose loss is a mean over samples that do not depend on the network."""

    def check(self, network: nn.Module, data: Labelled | None) -> None:
        """Compute the scores of two training samples."""
        assert data is not None
        self.scores(network, data.train.part(slice(0, 2)))

    @abstractmethod
    def scores(self, network: nn.Module, samples: Samples) -> Scores:
        """Return the means over a batch."""

    def steps(self, data: Labelled | None, batch_size: int) -> int:
        """Count whole batches; a smaller last one is left out."""
        assert data is not None
        return len(data.train.labels) // batch_size

    def losses(
        self, network: nn.Module, data: Labelled | None, epoch: Epoch, memory: Memory
    ) -> Iterator[Scores]:
        """Give the scores of each batch of a mixed pass."""
        assert data is not None
        order = torch.randperm(len(data.train.labels), generator=epoch.generator())
        whole = self.steps(data, epoch.batch_size) * epoch.batch_size
        for chosen in order[:whole].split(epoch.batch_size):
            yield self.scores(network, data.train.part(chosen.to(data.train.labels.device)))

    def evaluate(self, network: nn.Module, data: Labelled | None) -> dict[str, float]:
        """Return the means over all test samples, summed in float64."""
        assert data is not None
        count = len(data.test.labels)
        sums: dict[str, float] = {}
        for chosen in torch.arange(count, device=data.test.labels.device).split(_JUDGED):
            for name, value in self.scores(network, data.test.part(chosen)).items():
                sums[name] = sums.get(name, 0.0) + value.double().item() * len(chosen)
        return {name: value / count for name, value in sums.items()}


class Classification(Supervised):
    """Cross-entropy of the logits (N, classes), and the share of right answers."""

    headline = "accuracy"
    higher_is_better = True

    def check(self, network: nn.Module, data: Labelled | None) -> None:
        """Refuse a network that does not tell the classes apart."""
        assert data is not None
        some = data.train.part(slice(0, 2))
        logits: Any = network(some.inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < data.classes:
            tensor = isinstance(logits, Tensor)
            got = tuple(logits.shape) if tensor else f"a {type(logits).__name__}"
            what = f"it puts out {got} for {len(some.labels)} inputs of {data.classes} classes"
            way_out = f"logits of shape ({len(some.labels)}, {data.classes}) are needed"
            raise UsageError(Problem(type(network).__name__, what, way_out))

    def scores(self, network: nn.Module, samples: Samples) -> Scores:
        """Return the cross-entropy in nats and the accuracy."""
        logits = network(samples.inputs).float()
        right = (logits.detach().argmax(1) == samples.labels).float().mean()
        return {"loss": F.cross_entropy(logits, samples.labels), "accuracy": right}


class Bound(Supervised):
    """The negative evidence lower bound of binary images, in nats an image.

    −log p(x | z) + KL(q(z | x) ‖ p(z)), of a network that returns the logits of p(x | z), shaped like x,
    and the KL of each sample, (N,).

    Source: Kingma & Welling 2014, equation 3.
    """

    def scores(self, network: nn.Module, samples: Samples) -> Scores:
        """Return the bound and its KL part."""
        logits, divergence = network(samples.inputs)
        per_pixel = F.binary_cross_entropy_with_logits(
            logits.float(), samples.inputs, reduction="none"
        )
        kl = divergence.float().mean()
        return {"loss": per_pixel.flatten(1).sum(1).mean() + kl, "kl": kl.detach()}
