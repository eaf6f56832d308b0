"""Code that writes into activations: found by watching, and given copies to write into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.errors import CaptureError, Problem
from normconv.graph import Names, training_branches
from normconv.graph.rewrite import replace_module_
from normconv.graph.running import first_line
from normconv.layers import Cloned, copy_model
from normconv.numerics import evaluating, relative_l2
from normconv.plan import record
from normconv.proof import evaluate
from normconv.report import Check, Report
from normconv.surgery import Result

__all__ = ["without_in_place"]


def without_in_place(
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
) -> Result:
    """Return a copy of a model in which nothing writes into what a trained layer put out.

    Opacus, and anything else that hooks the backward pass of layers, stops at `out += identity`,
    `F.relu(x, True)` or `nn.ReLU(inplace=True)`. Flags named ``inplace`` are set to False. What the
    model's own code writes into is found by running it, in eval and in training mode, and comparing the
    version of each layer's output before and after; such a layer gets a copy after it (`Cloned`, so that
    its names then begin with ``layer``). `nc.fold` and `nc.export_onnx` take the copies out again.

    Args:
        model: not changed.
        example_inputs: positional inputs.
        example_kwargs: keyword inputs.

    Raises:
        CaptureError: the model does not run on the inputs.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return self.fc(x).add_(x)
    >>> type(without_in_place(Net(), example_inputs=(torch.ones(1, 2),)).model.fc).__name__
    'Cloned'
    """
    twin, kwargs = copy_model(model), dict(example_kwargs or {})
    flags = [name for name, module in twin.named_modules() if _writes_in_place(module)]
    for name in flags:
        module: Any = twin.get_submodule(name)
        module.inplace = False
    written = _written_into(twin, example_inputs, kwargs)
    names = Names(twin)
    for name in written:
        every = (name, *names.aliases(name))
        replace_module_(twin, every, Cloned.of(twin.get_submodule(name)))
    record(twin, {"clone": {"layers": written}})
    before, after = (evaluate(each, example_inputs, kwargs) for each in (model, twin))
    off = max((relative_l2(after[name], value) for name, value in before.items()), default=0.0)
    left = _written_into(twin, example_inputs, kwargs)
    checks = (
        Check.at_most("same outputs", off, 1e-6),
        Check("nothing writes into a layer's output", not left, detail=", ".join(left)),
    )
    facts = {"flags set to False": flags, "layers with a copy after them": written}
    return Result(
        twin, Report("without in-place", type(model).__name__, facts=facts, checks=checks)
    )


def _writes_in_place(module: nn.Module) -> bool:
    return getattr(module, "inplace", False) is True


def _written_into(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Layers with trained parameters whose output somebody writes into afterwards."""
    found: dict[str, None] = {}
    for mode in (evaluating, training_branches):
        with mode(model), _outputs_watched(model) as outputs:
            try:
                model(*args, **kwargs)
            except Exception as reason:  # the forward is the user's
                problem = Problem(type(model).__name__, first_line(reason), "check the inputs")
                raise CaptureError(problem) from None
            changed = (name for name, tensor, version in outputs if tensor._version != version)
            found.update(dict.fromkeys(changed))
    return list(found)


@contextmanager
def _outputs_watched(model: nn.Module) -> Iterator[list[tuple[str, Tensor, int]]]:
    """Keep every output of the layers, with its version as they put it out."""
    seen: list[tuple[str, Tensor, int]] = []

    def watch(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            seen.extend((name, tensor, tensor._version) for tensor in tensors)

        return keep

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if any(p is not None and p.requires_grad for p in module._parameters.values())
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
