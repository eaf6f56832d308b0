"""What two processes train, started by `torchrun -m tests.training.scaling_cases FOLDER`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from normconv.errors import UsageError
from normconv.layers import weight_norm_, weight_standardize_
from normconv.training import cached_weights, reparametrise
from normconv.training.optimizers import WNSGD

STEPS, PROCESSES = 6, 2


class Case(NamedTuple):
    """One way to train.

    Args:
        wrapper: ``ddp`` or ``fsdp``.
        side: ``optimizer``, or ``graph`` with (g, v) in the model.
        form: ``wn`` or ``ws``.
        rule: which optimizer.
        extra: ``amp``, ``compile``, ``accumulate``, ``resume``, or nothing.
    """

    wrapper: str
    side: str
    form: str
    rule: str
    extra: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in self if part)


CASES = [
    Case(wrapper, side, form, rule, extra)
    for wrapper in ("ddp", "fsdp")
    for side in ("optimizer", "graph")
    for form, rule, extra in (
        ("wn", "SGD", ""),
        ("ws", "SGD", ""),
        ("wn", "AdamW", "amp"),
        ("wn", "SGD", "compile"),
        ("ws", "AdamW", "accumulate"),
    )
] + [Case("fsdp", "optimizer", "ws", "AdamW", "resume")]


def made(case: Case) -> nn.Sequential:
    """A convolution, grouped and transposed ones, and rows that two processes cannot share evenly."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, 3),
    )
    if case.side == "graph":
        wrap_: Any = weight_norm_ if case.form == "wn" else weight_standardize_
        for layer in weighted(net):
            wrap_(layer)
    return net


def weighted(net: nn.Module) -> list[nn.Module]:
    return [
        layer
        for layer in net.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)
    ]


def optimizer_of(case: Case, net: nn.Module) -> torch.optim.Optimizer:
    if case.rule == "SGD":
        plain: torch.optim.Optimizer = torch.optim.SGD(
            net.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01
        )
    else:
        # eps large enough that rounding of a gradient near 0 stays rounding
        plain = torch.optim.AdamW(net.parameters(), lr=0.005, weight_decay=0.1, eps=1e-3)
    if case.side == "graph":
        return plain
    to: Any = case.form
    return reparametrise(plain, net, to, fused="loop")


def parts(step: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a step; every second one is of one process."""
    rng = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 3, 8, 8, generator=rng), torch.randn(8, 3, generator=rng)
    return list(zip(x.chunk(4), y.chunk(4), strict=True))


def loss_of(case: Case, net: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.extra == "amp"):
        out = net(part[0])
    return (out.float() - part[1]).square().mean()


def alone(case: Case) -> dict[str, Tensor]:
    """One process, which goes through the micro-batches one after the other."""
    net = made(case)
    optimizer = optimizer_of(case, net)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in parts(step):
            (loss_of(case, net, part) / 4).backward()
        optimizer.step()
    return {name: value.detach() for name, value in net.state_dict().items()}


def together(case: Case, rank: int, exchange: bool = True) -> dict[str, Tensor]:
    """One of two processes."""
    net = made(case)
    model: Any = sharded(net) if case.wrapper == "fsdp" else net
    if case.wrapper == "ddp" and exchange:
        model = DistributedDataParallel(net)
    if case.extra == "compile":
        model = torch.compile(model, backend="aot_eager")
    optimizer = optimizer_of(case, net)
    for step in range(STEPS):
        if case.extra == "resume" and step == STEPS // 2:
            optimizer = resumed(case, net, optimizer)
        mine = parts(step)[rank::PROCESSES]
        optimizer.zero_grad()
        caching = case.extra == "accumulate" and case.side == "graph" and case.wrapper == "ddp"
        with cached_weights(net) if caching else contextlib.nullcontext():
            for index, part in enumerate(mine):
                with last_alone(case, model, index == len(mine) - 1):
                    (loss_of(case, model, part) / len(mine)).backward()
        optimizer.step()
    options = StateDictOptions(full_state_dict=True)
    return {k: v.clone() for k, v in get_model_state_dict(net, options=options).items()}


def sharded(net: nn.Sequential) -> nn.Module:
    """Each layer a unit; rows of a transposed convolution lie along axis 1."""
    for layer in weighted(net):
        if isinstance(layer, nn.ConvTranspose2d):
            fully_shard(layer, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None)
        else:
            fully_shard(layer)
    return fully_shard(net)


def resumed(case: Case, net: nn.Module, before: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer that got its state by way of a checkpoint of whole tensors."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(net, before, options=options)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    before.zero_grad()  # torch makes the state that it fills only where there are no gradients
    optimizer = optimizer_of(case, net)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(net, optimizer, saved, options=whole)
    with torch.no_grad():  # a new optimizer of standardized weights takes their means off
        for name, p in net.named_parameters():
            p.copy_(weights[name])
    return optimizer


@contextlib.contextmanager
def last_alone(case: Case, model: Any, last: bool) -> Iterator[None]:
    """Exchange gradients after the last micro-batch only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if case.wrapper == "fsdp" and case.extra == "accumulate":
        model.set_requires_gradient_sync(last)
    yield


def refusals() -> dict[str, Tensor]:
    """Check what is refused; an error of a check ends the processes."""
    told = {
        "transposed": (nn.ConvTranspose2d(4, 4, 3), "shard_placement_fn"),
        "grouped transposed": (nn.ConvTranspose2d(4, 4, 3, groups=2), "on no one axis"),
    }
    for layer, words in told.values():
        fully_shard(layer)
        with pytest.raises(UsageError, match=words):
            WNSGD(layer.parameters(), layer)
    layer = weight_norm_(nn.Linear(4, 4))
    fully_shard(layer)
    with pytest.raises(UsageError, match="sharded"), cached_weights(layer):
        pass
    return {name: torch.ones(()) for name in (*told, "cached weights")}


def main() -> None:
    """Train every case, and let the first process write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {str(case): together(case, rank) for case in CASES}
    found["lonely"] = together(CASES[0], rank, exchange=False)
    found["refused"] = refusals()
    if rank == 0:
        torch.save(found, Path(sys.argv[1]) / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
