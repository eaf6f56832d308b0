"""What a module consists of: its tensors by name, one digest over them, its norms."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from normconv.deploy.fingerprints import tensor_record
from normconv.graph import is_norm
from normconv.layers import Reparametrised

__all__ = ["class_name", "module_structure", "state_records", "weights_record"]

Record = dict[str, Any]


def class_name(model: nn.Module | None) -> str | None:
    """Return the qualified name of a model's class."""
    return None if model is None else f"{type(model).__module__}.{type(model).__qualname__}"


def state_records(model: nn.Module) -> dict[str, Record]:
    """Return a record of every tensor of a state that has values."""
    found = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            continue
        if torch.nn.parameter.is_lazy(value):
            continue
        if value.is_quantized:
            value = value.int_repr()
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        dtype = str(value.dtype).removeprefix("torch.")
        found[name] = tensor_record(dtype, tuple(value.shape), data)
    return found


def weights_record(model: nn.Module | None) -> Record | None:
    """Return one digest over a model's state: names, dtypes, shapes and bytes."""
    if model is None:
        return None
    digest, records = hashlib.sha256(), state_records(model)
    for name, record in sorted(records.items()):
        line = f"{name}\0{record['dtype']}\0{record['shape']}\0{record['sha256']}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    state = model.state_dict()
    size = sum(state[name].numel() * state[name].element_size() for name in records)
    return {"sha256": digest.hexdigest(), "tensors": len(records), "bytes": size}


_OTHER_NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def module_structure(model: nn.Module) -> Record:
    """Count the norm layers of a model, and the layers whose weight is computed."""
    norms = [m for m in model.modules() if is_norm(m) or isinstance(m, _OTHER_NORMS)]
    return {
        "batch_norm_nodes": sum(is_norm(norm) for norm in norms),
        "norm_nodes": len(norms),
        "norm_kinds": dict(Counter(type(norm).__name__ for norm in norms)),
        "weight_arithmetic": sum(_computes_weight(module) for module in model.modules()),
    }


def _computes_weight(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._state_dict_hooks.values())
    return (
        isinstance(module, Reparametrised)
        or nn.utils.parametrize.is_parametrized(module)
        or any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in hooks)
    )
