"""A model is run no further than the last call of the modules that are looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from normconv.calibration.passes import FarEnough, run_hooked
from normconv.graph.tracing import tensors_in

__all__ = ["Look", "observe"]

Look = Callable[[Tensor, Tensor], None]


def observe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    looks: Mapping[str, Look],
    calls: int = 0,
) -> list[str]:
    """Run a model in eval mode and show what modules get and give, while it is there.

    Args:
        model: not changed.
        args: positional inputs.
        kwargs: keyword inputs.
        looks: by name of the module, what gets the first input and the first output tensor of each call.
        calls: after how many of those the run ends; 0 for "run to the end".

    Returns:
        The names in the order in which their calls returned.

    >>> import torch
    >>> net, sizes = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), []
    >>> look = lambda x, y: sizes.append((len(x[0]), len(y[0])))
    >>> observe(net, (torch.ones(1, 2),), {}, {"0": look}, calls=1), sizes
    (['0'], [(2, 3)])
    """
    returned: list[str] = []

    def hook(name: str) -> Any:
        def look(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            (_, x), (_, y) = next(tensors_in((inputs, named))), next(tensors_in(output))
            looks[name](x.detach(), y.detach())
            returned.append(name)
            if len(returned) == calls:
                raise FarEnough

        return look

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
        for name in looks
    ]
    run_hooked(model, args, kwargs, handles)
    return returned
