"""A Q-network that learns to balance a pole; needs the extra `rl`.

Of the paper is Adamax on a replayed Q-learning; the task, the network and all numbers are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adamax, Optimizer

from normconv.errors import MissingDependency
from normconv.sources.datasets import Labelled
from normconv.training.recipe import Budget, Recipe
from normconv.training.recipes.parts import scaled
from normconv.training.tasks import Epoch, Memory, Scores, Task

__all__ = ["RECIPE", "QLearning"]

_FIELDS = ("states", "actions", "rewards", "nexts", "ends")


@dataclass(frozen=True)
class QLearning(Task):
    """Q(s, a) ← r + discount · max Q'(s', ·) of replayed transitions; Q' is Q of a while ago.

    Args:
        environment: of gymnasium, with vectors to see and a few actions to take.
        per_epoch: steps of the environment an epoch; the network learns at each.
        discount: of later rewards.
        reward: what a reward is multiplied by to learn from, so that values stay below 10: one gain a row
            grows to larger ones later than all weights of the row do.
        capacity: transitions that are remembered.
        warm_up: of those drawn at random before anything is learnt.
        renewal: steps after which Q' becomes Q.
        exploring: steps over which the share of random actions falls from 1 to 0.05.
        episodes: of an evaluation, without random actions.

    Source: Mnih et al. 2015, algorithm 1.
    """

    environment: str = "CartPole-v1"
    per_epoch: int = 1000
    discount: float = 0.99
    reward: float = 0.1
    capacity: int = 10_000
    warm_up: int = 500
    renewal: int = 500
    exploring: int = 4000
    episodes: int = 10

    headline = "return"
    higher_is_better = True

    def limited(self, limit: int | None) -> QLearning:
        """Return the task with so many steps an epoch."""
        return self if limit is None else replace(self, per_epoch=limit)

    def steps(self, data: Labelled | None, batch_size: int) -> int:
        """Count the steps of the environment."""
        return self.per_epoch

    def losses(
        self, network: nn.Module, data: Labelled | None, epoch: Epoch, memory: Memory
    ) -> Iterator[Scores]:
        """Act, remember, and give the loss on a batch of what is remembered."""
        generator = epoch.generator()
        device = next(network.parameters()).device
        environment = self._environment()
        seen, _ = environment.reset(seed=epoch.seed * 100_003 + epoch.number)
        if not memory:
            memory |= {"seen": 0, "target": _weights(network)}
        target = copy.deepcopy(network).requires_grad_(False).eval()
        target.load_state_dict(memory["target"])
        learnt = 0
        while learnt < self.per_epoch:
            warm = memory["seen"] >= self.warm_up
            done = epoch.number * self.per_epoch + learnt
            chance = max(0.05, 1 - 0.95 * done / self.exploring) if warm else 1.0
            state = torch.from_numpy(seen).float()
            if torch.rand((), generator=generator) < chance:
                count = environment.action_space.n
                action = int(torch.randint(int(count), (), generator=generator))
            else:
                with torch.no_grad():
                    action = int(network(state[None].to(device)).argmax())
            seen, reward, ended, cut, _ = environment.step(action)
            after = torch.from_numpy(seen).float()
            self._remember(memory, (state, action, self.reward * float(reward), after, bool(ended)))
            if ended or cut:
                seen, _ = environment.reset()
            if not warm:
                continue
            kept = min(memory["seen"], self.capacity)
            chosen = torch.randint(kept, (epoch.batch_size,), generator=generator)
            yield {"loss": self._loss(network, target, memory, chosen, device)}
            learnt += 1
            if (done + 1) % self.renewal == 0:
                memory["target"] = _weights(network)
                target.load_state_dict(memory["target"])
        environment.close()

    def _loss(
        self,
        network: nn.Module,
        target: nn.Module,
        memory: Memory,
        chosen: Tensor,
        device: torch.device,
    ) -> Tensor:
        """The Huber loss of Bellman's equation."""
        fields = (memory[name][chosen].to(device) for name in _FIELDS)
        states, actions, rewards, nexts, ends = fields
        with torch.no_grad():
            wanted = rewards + self.discount * (1 - ends) * target(nexts).float().amax(1)
        values = network(states).float().gather(1, actions.long()[:, None])[:, 0]
        return F.smooth_l1_loss(values, wanted)

    def _remember(self, memory: Memory, transition: tuple[Any, ...]) -> None:
        place = memory["seen"] % self.capacity
        for name, value in zip(_FIELDS, transition, strict=True):
            value = torch.as_tensor(value, dtype=torch.float32)
            if name not in memory:
                memory[name] = torch.zeros(self.capacity, *value.shape)
            memory[name][place] = value.cpu()
        memory["seen"] += 1

    def evaluate(self, network: nn.Module, data: Labelled | None) -> dict[str, float]:
        """Return the mean return of some episodes, the same starts each time."""
        environment = self._environment()
        device = next(network.parameters()).device
        total = 0.0
        for episode in range(self.episodes):
            seen, _ = environment.reset(seed=10_000 + episode)
            over = False
            while not over:
                state = torch.from_numpy(seen).float()[None].to(device)
                seen, reward, ended, cut, _ = environment.step(int(network(state).argmax()))
                total += float(reward)
                over = bool(ended or cut)
        environment.close()
        return {"return": total / self.episodes}

    def _environment(self) -> Any:
        try:
            import gymnasium
        except ImportError:
            raise MissingDependency.needs("gymnasium", "rl") from None
        return gymnasium.make(self.environment)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _network(width: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    units = scaled(128, width)
    hidden = (nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 2))
    return nn.Sequential(nn.Linear(4, units), nn.ReLU(), *hidden)


def _adamax(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return Adamax(parameters, lr=1e-3)


RECIPE = Recipe(
    name="q-network",
    reproduces=(
        "A Q-network learns as well or better with weight norm: Salimans & Kingma 2016, section 5.4 "
        "(here a pole to balance in place of Atari games)."
    ),
    network=_network,
    optimizer=_adamax,
    small=Budget(20, 1000, 1.0, (64,), (0, 1, 2)),
    full=Budget(50, 1000, 1.0, (64,), (0, 1, 2, 3, 4)),
    normalizations=("plain", "wn"),
    task=QLearning(),
)
