"""How a parameter is stepped by its gradient: torch's own rules, and the same as arithmetic to compile.

Outside of a compiled step torch's functions do it, with all of their options. Compiled code takes what
may change from step to step as numbers in a tensor: a scheduled learning rate must not compile anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

__all__ = ["ADAM", "SGD", "Rule"]

Group = Mapping[str, Any]


class Rule(ABC):
    """A rule of torch for parameters and what it remembers of each."""

    @abstractmethod
    def buffers(self, group: Group) -> dict[str, int]:
        """Return the names of what is remembered, and by which power of α it goes where v goes by α."""

    @abstractmethod
    def step_(
        self,
        group: Group,
        decay: float,
        count: int,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: Mapping[str, list[Tensor]],
        foreach: bool,
    ) -> None:
        """Step parameters, in place.

        Args:
            group: options, as torch names them.
            decay: weight decay.
            count: the number of this step, from 1.
            params: what is stepped.
            grads: their gradients; may be written over.
            buffers: for each name what is remembered of each parameter, zeros at first.
            foreach: all at once.
        """

    @abstractmethod
    def numbers(self, group: Group, count: int) -> list[float]:
        """Return what a compiled step reads from a tensor, weight decay aside."""

    @abstractmethod
    def flags(self, group: Group) -> tuple[bool, ...]:
        """Return what a compiled step is compiled for."""

    @abstractmethod
    def arithmetic_(
        self,
        flags: tuple[bool, ...],
        numbers: Sequence[Tensor],
        decay: Tensor,
        param: Tensor,
        grad: Tensor,
        buffers: Sequence[Tensor],
    ) -> None:
        """Step one parameter, in place, as `step_` does."""


class _Sgd(Rule):
    """Stochastic gradient descent, `torch.optim.SGD`."""

    def buffers(self, group: Group) -> dict[str, int]:
        return {"momentum_buffer": -1} if group["momentum"] else {}

    def step_(
        self,
        group: Group,
        decay: float,
        count: int,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: Mapping[str, list[Tensor]],
        foreach: bool,
    ) -> None:
        remembered: list[Tensor | None] = [*buffers.get("momentum_buffer", ())]
        sgd(
            params,
            grads,
            remembered or [None] * len(params),
            weight_decay=decay,
            momentum=group["momentum"],
            lr=float(group["lr"]),
            dampening=0.0 if count == 1 else group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            foreach=foreach,
            fused=False,
        )

    def numbers(self, group: Group, count: int) -> list[float]:
        fresh = 1.0 if count == 1 else 1.0 - group["dampening"]
        return [float(group["lr"]), float(group["momentum"]), fresh]

    def flags(self, group: Group) -> tuple[bool, ...]:
        return bool(group["maximize"]), bool(group["nesterov"])

    def arithmetic_(
        self,
        flags: tuple[bool, ...],
        numbers: Sequence[Tensor],
        decay: Tensor,
        param: Tensor,
        grad: Tensor,
        buffers: Sequence[Tensor],
    ) -> None:
        (maximize, nesterov), (lr, momentum, fresh) = flags, numbers
        grad = (-grad if maximize else grad) + decay * param
        for buffer in buffers:
            buffer.copy_(momentum * buffer + fresh * grad)
            grad = grad + momentum * buffer if nesterov else buffer
        param.copy_(param - lr * grad)


class _Adam(Rule):
    """Adam and AdamW, `torch.optim.Adam`."""

    def buffers(self, group: Group) -> dict[str, int]:
        largest = {"max_exp_avg_sq": -2} if group["amsgrad"] else {}
        return {"exp_avg": -1, "exp_avg_sq": -2, **largest}

    def step_(
        self,
        group: Group,
        decay: float,
        count: int,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: Mapping[str, list[Tensor]],
        foreach: bool,
    ) -> None:
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            buffers["exp_avg"],
            buffers["exp_avg_sq"],
            buffers.get("max_exp_avg_sq", []),
            [torch.tensor(count - 1.0) for _ in params],
            foreach=foreach,
            fused=False,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            beta1=float(beta1),
            beta2=float(beta2),
            lr=float(group["lr"]),
            weight_decay=decay,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def numbers(self, group: Group, count: int) -> list[float]:
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        step, root = lr / (1 - beta1**count), (1 - beta2**count) ** 0.5
        return [lr, 1 - beta1, beta2, 1 - beta2, step, 1 / root, float(group["eps"])]

    def flags(self, group: Group) -> tuple[bool, ...]:
        return bool(group["maximize"]), bool(group["decoupled_weight_decay"])

    def arithmetic_(
        self,
        flags: tuple[bool, ...],
        numbers: Sequence[Tensor],
        decay: Tensor,
        param: Tensor,
        grad: Tensor,
        buffers: Sequence[Tensor],
    ) -> None:
        (maximize, decoupled), (lr, new1, old2, new2, step, inverse_root, eps) = flags, numbers
        grad = -grad if maximize else grad
        if decoupled:
            param.mul_(1 - lr * decay)
        else:
            grad = grad + decay * param
        first, second, *largest = buffers
        first.copy_(first + new1 * (grad - first))
        second.copy_(old2 * second + new2 * grad * grad)
        for most in largest:
            second = most.copy_(torch.maximum(most, second))
        param.copy_(param - step * first / (second.sqrt() * inverse_root + eps))


SGD: Rule = _Sgd()
ADAM: Rule = _Adam()
