"""What stood in a norm's slot, as plain data that a history keeps, and made again from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from normconv.errors import PlanError, Problem
from normconv.graph import norm_state, trailing_of
from normconv.layers import layout_of
from normconv.plan import Plan

__all__ = ["STATISTICS", "original_norm", "originals"]

STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_LIBRARIES = ("torch", "torchvision", "timm", "transformers")
_USUAL = frozenset([*nn.Module().__dict__, "_compiled_call_impl"])


def originals(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Describe what a plan is about to take out of a model: its norms, and which layers have no bias.

    Args:
        model: before the plan is carried out; read only.
        plan: as it will be.

    >>> from normconv.surgery import make_plan
    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    >>> found = originals(net, make_plan(net, example_inputs=(torch.zeros(2, 2),)))
    >>> found["without bias"], found["norms"]["1"]["class"], found["norms"]["1"]["eps"]
    (['0'], 'torch.nn.modules.batchnorm:BatchNorm1d', 1e-05)
    """
    sites = [step.site for step in plan.converted if step.action not in ("wrap", "insert")]
    norms = {site: _description(model.get_submodule(site)) for site in sites}
    plain = [
        name
        for name, module in model.named_modules()
        if layout_of(module) is not None and module._parameters.get("bias", 0) is None
    ]
    return {"norms": norms, "without bias": plain} if norms else {}


def _description(norm: nn.Module) -> dict[str, Any]:
    state = norm_state(norm)
    own = {name: value for name, value in vars(norm).items() if name not in _USUAL}
    kind = type(norm)
    stores: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("parameter", norm._parameters),
        ("buffer", norm._buffers),
    )
    held = {name: (store, tensor) for store, of in stores for name, tensor in of.items()}
    tensors = {
        name: {
            "store": store if name not in norm._non_persistent_buffers_set else "transient",
            "dtype": None if tensor is None else str(tensor.dtype).removeprefix("torch."),
            "trained": tensor is not None and tensor.requires_grad,
        }
        for name, (store, tensor) in held.items()
    }
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "eps": None if isinstance(state, str) else state.eps,
        "attributes": {name: value for name, value in own.items() if _is_plain(value)},
        "others": [
            *(name for name, value in own.items() if not _is_plain(value)),
            *(name for name in tensors if name not in STATISTICS),
        ],
        "tensors": tensors,
        "children": list(trailing_of(norm)),
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def original_norm(
    description: Mapping[str, Any],
    site: str,
    channels: int,
    children: Mapping[str, nn.Module],
    kept: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Make a norm of the class, eps, momentum and shapes that were described; runs no constructor.

    Its μ and β are 0, its σ² and γ 1.

    Args:
        description: from `originals`.
        site: its name, for errors.
        channels: C.
        children: what the norm did after normalizing, by name.
        kept: what else hung on the norm, where the slot still has it.
        dtype: of its tensors.
        device: of its tensors.

    Raises:
        PlanError: the class cannot be found, or held what no description keeps.
    """
    kind = _class_named(str(description["class"]), site)
    if lost := [name for name in description["others"] if name not in kept]:
        what = f"its {', '.join(lost)} cannot be made again from the history"
        raise PlanError(Problem(site, what, "pass like=, the original or what makes one"))
    norm: nn.Module = kind.__new__(kind)
    nn.Module.__init__(norm)
    norm.__dict__.update({n: v for n, v in kept.items() if n not in _USUAL})
    norm.__dict__.update({n: v for n, v in description["attributes"].items() if n not in _USUAL})
    for name, of in description["tensors"].items():
        if name not in STATISTICS:
            continue
        tensor = None
        if of["dtype"] is not None:
            shape = () if name == "num_batches_tracked" else (channels,)
            number = 1 if name in ("weight", "running_var") else 0
            whole = torch.int64 if name == "num_batches_tracked" else dtype
            tensor = torch.full(shape, number, dtype=whole, device=device)
        if of["store"] == "parameter":
            made = None if tensor is None else nn.Parameter(tensor, requires_grad=of["trained"])
            norm.register_parameter(name, made)
        else:
            norm.register_buffer(name, tensor, persistent=of["store"] == "buffer")
    for name, child in children.items():
        norm.add_module(name, child)
    return norm


def _class_named(text: str, site: str) -> type[nn.Module]:
    """Find a class by name: in a module that is loaded, or in a library of models.

    The name comes with a file. Nothing is imported that it could choose freely.
    """
    place, _, name = text.partition(":")
    found: Any = sys.modules.get(place)
    if found is None and place.partition(".")[0] in _LIBRARIES:
        try:
            found = import_module(place)
        except ImportError:
            found = None
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    what = f"it was a {text.replace(':', '.')}, which is not loaded and in no known library"
    raise PlanError(Problem(site, what, "import it, or pass like=, the original or what makes one"))
