"""Models that load where normconv is not installed."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from normconv.errors import Problem, UsageError
from normconv.graph import Names
from normconv.graph.rewrite import replace_module_
from normconv.layers import ChannelAffine, MeanOnlyBatchNorm, Normed
from normconv.numerics import evaluating
from normconv.plan import history_of

__all__ = ["check_standalone", "plain_affines", "replace_affines_"]

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (*_CONVS.values(), *_NORMS.values())
}
_AFFINES = (ChannelAffine, MeanOnlyBatchNorm)


def plain_affines(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what each affine map that folded nowhere is to become, as entries of a history.

    The rank of its input decides: that of the example inputs, or else the one in the plan that put it
    there. A `ChannelAffine` becomes a depthwise 1x1 convolution; one of (N, C), one whose dtype is not
    its input's and a `MeanOnlyBatchNorm` become a BatchNorm with the same eval function.

    Raises:
        UsageError: nothing tells the rank, or no layer of torch takes it.
    """
    names = Names(model)
    places = [n for n, module in model.named_modules() if isinstance(module, _AFFINES)]
    if not places:
        return []
    seen = _ranks_in_plans(model) if args is None else _ranks_in_run(model, places, args, kwargs)
    entries, problems = [], []
    for name in places:
        module = model.get_submodule(name)
        became = _became(module, seen.get(name, set()))
        if became is None:
            problems.append(_without_rank(name, module, seen.get(name), args is not None))
        else:
            entries.append({"names": [name, *names.aliases(name)], "became": became})
    if problems:
        raise UsageError(problems)
    return entries


def _without_rank(name: str, module: nn.Module, seen: set[Any] | None, ran: bool) -> Problem:
    kind = type(module).__name__
    if seen:
        ranks = ", ".join(f"{rank}-D" for rank in sorted({rank for rank, _ in seen}))
        return Problem(name, f"no layer of torch takes the place of a {kind} of {ranks} inputs")
    if ran:
        return Problem(name, f"the example inputs do not reach this {kind}", "give others")
    return Problem(name, f"the rank of this {kind}'s input is not known", "give example_inputs")


def _became(module: nn.Module, seen: set[tuple[int, torch.dtype]]) -> str | None:
    """The name of the plain class; None where there is none for all the inputs seen."""
    ranks = {rank for rank, _ in seen}
    dtypes = {dtype for _, dtype in seen}
    if isinstance(module, ChannelAffine) and dtypes == {module.scale.dtype}:
        convs = {_CONVS[rank].__name__ for rank in ranks if rank in _CONVS}
        if len(ranks) == len(convs) == 1:
            return convs.pop()
    found = {_NORMS[rank].__name__ for rank in ranks if rank in _NORMS}
    return found.pop() if len(found) == 1 and ranks <= _NORMS.keys() else None


def _ranks_in_run(
    model: nn.Module, places: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, set[tuple[int, torch.dtype]]]:
    seen: dict[str, set[tuple[int, torch.dtype]]] = {name: set() for name in places}
    handles: list[RemovableHandle] = []
    with evaluating(model):
        for name in places:

            def note(_: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                seen[name].add((given[0].dim(), given[0].dtype))

            handles.append(model.get_submodule(name).register_forward_pre_hook(note))
        try:
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return seen


def _ranks_in_plans(model: nn.Module) -> dict[str, set[tuple[int, torch.dtype]]]:
    """What the plans in a model's history say, by every name that the affine of a site may have."""
    seen: dict[str, set[tuple[int, torch.dtype]]] = {}
    dtypes = {n: m.scale.dtype for n, m in model.named_modules() if isinstance(m, ChannelAffine)}
    steps = (s for entry in history_of(model) if "apply" in entry for s in entry["apply"]["steps"])
    for step in steps:
        if shape := step.get("shape"):
            for site in (step["site"], *step.get("aliases", ())):
                for name in (site, f"{site}.affine", f"{site}.norm"):
                    dtype = dtypes.get(name, torch.get_default_dtype())
                    seen.setdefault(name, set()).add((len(shape), dtype))
    return seen


def replace_affines_(model: nn.Module, entries: list[dict[str, Any]]) -> nn.Module:
    """Carry out the entries of `plain_affines`, in place, and give other containers their plain class.

    Returns:
        The model, or what takes its place where it is an affine map itself.
    """
    for entry in entries:
        layer = _plain(model.get_submodule(entry["names"][0]), _CLASSES[entry["became"]])
        if not entry["names"][0]:
            return layer
        replace_module_(model, entry["names"], layer)
    for module in model.modules():
        if type(module) is Normed:
            container: Any = module
            container.__class__ = nn.Sequential
    _forget_tracers_(model)
    return model


@torch.no_grad()
def _plain(module: Any, kind: type[nn.Module]) -> nn.Module:
    mean_only = isinstance(module, MeanOnlyBatchNorm)
    shift: Tensor = module.bias if mean_only else module.shift
    scale = torch.ones_like(shift) if mean_only else module.scale
    device, dtype, size = shift.device, shift.dtype, shift.numel()
    layer: Any
    if issubclass(kind, nn.modules.conv._ConvNd):
        made: Any = kind
        layer = made(size, size, 1, groups=size, device=device, dtype=dtype)
        layer.weight.copy_(scale.reshape(layer.weight.shape))
    else:
        made = kind
        layer = made(size, device=device, dtype=dtype)
        layer.weight.copy_(scale)
        layer.running_var.fill_(1 - layer.eps)
        if mean_only:
            layer.momentum = module.momentum
            layer.running_mean.copy_(module.running_mean)
            layer.num_batches_tracked.copy_(module.num_batches_tracked)
    layer.bias.copy_(shift)
    layer.bias.requires_grad_(shift.requires_grad)
    layer.weight.requires_grad_(scale.requires_grad)  # mean-only norms have none to train
    trained: nn.Module = layer.train(module.training)
    return trained


def _forget_tracers_(model: nn.Module) -> None:
    """A GraphModule names the tracer that made it; torch's own unpickles as well."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            module._tracer_cls = None
            module.graph._tracer_cls = None


def check_standalone(model: nn.Module) -> None:
    """Raise where a pickle of the model would import normconv.

    Raises:
        UsageError: names the modules, and what of normconv each holds.
    """
    problems = []
    for name, module in model.named_modules():
        found = sorted(set(_of_normconv(module)))
        if found:
            what = f"it holds {', '.join(found)}, which no plain layer stands for"
            problems.append(Problem(name or type(module).__name__, what))
    if problems:
        raise UsageError(problems)


class _Listing(pickle.Pickler):
    """Notes the classes and functions of normconv that a module's pickle names, and writes no tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(io.BytesIO(), protocol=4)
        self.module, self.found = module, list[str]()

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, Tensor):
            return "tensor"
        if isinstance(obj, nn.Module) and obj is not self.module:
            return "module"
        name = getattr(obj, "__qualname__", "")
        if name and _is_ours(obj):
            self.found.append(f"{obj.__module__}.{name}")
        return None


def _is_ours(obj: Any) -> bool:
    home = getattr(obj, "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] == "normconv"


def _of_normconv(module: nn.Module) -> Iterator[str]:
    if _is_ours(type(module)):
        yield f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_function" and _is_ours(node.target):
                yield f"{node.target.__module__}.{node.target.__name__}"
    listing = _Listing(module)
    # What cannot be pickled for another reason is not this check's matter.
    with suppress(Exception):
        listing.dump(module)
    yield from listing.found
