"""Calling `torch.export` so that it takes the model: as it is, else with plain tensors in and out.

`torch.export` knows only registered containers. Where a model takes or returns a class of its own, a
wrapper puts the traced tensors into a copy of the given arguments and returns the tensors it finds.

Dynamic batch sizes, a doubled batch and `strict=True` were tried and left out: of the torchvision and
transformers models that stop `strict=False`, none got through by any of these.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normconv.graph.quiet import quiet
from normconv.graph.tracing import tensors_in

__all__ = ["Exported", "export_program"]

_INSIDE = "model"
# Words of the messages in which torch.export refuses a class among inputs or outputs (the last: 2.11).
_ABOUT_CONTAINERS = ("output", "input type", "pytree", "known type", "unhashable")


class Exported:
    """A program, named as the model names its modules.

    Args:
        program: what `torch.export` returned.
        prefix: what a wrapper put before every name; empty without one.
    """

    def __init__(self, program: ExportedProgram, prefix: str = "") -> None:
        self.graph = program.graph
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.tensor_names = {node: name.removeprefix(prefix) for node, name in named.items()}
        if prefix:
            for node in program.graph.nodes:
                stack = node.meta.get("nn_module_stack") or {}
                node.meta["nn_module_stack"] = {
                    key: (path.removeprefix(prefix), kind)
                    for key, (path, kind) in stack.items()
                    if path.startswith(prefix)
                }


def export_program(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Exported:
    """Export a forward pass of the model in its present mode.

    Raises:
        Exception: whatever `torch.export` meets.
    """
    # What it cannot export it prints as well as raises.
    with torch.no_grad(), quiet(), redirect_stderr(io.StringIO()):
        try:
            return Exported(torch.export.export(model, args, dict(kwargs), strict=False))
        except Exception as reason:  # the model is the user's
            if not any(word in str(reason).lower() for word in _ABOUT_CONTAINERS):
                raise
        wrapper = _TensorsInAndOut(model, (args, dict(kwargs)))
        program = torch.export.export(wrapper, wrapper.tensors(), strict=False)
        return Exported(program, f"{_INSIDE}.")


class _TensorsInAndOut(nn.Module):
    def __init__(self, model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__()
        self.add_module(_INSIDE, model)
        self._given = given
        self.training = model.training

    def tensors(self) -> tuple[Tensor, ...]:
        """What `forward` takes."""
        return tuple({id(tensor): tensor for _, tensor in tensors_in(self._given)}.values())

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Call the model with these tensors in the place of the given ones."""
        places = zip(self.tensors(), tensors, strict=True)
        args, kwargs = copy.deepcopy(self._given, {id(old): new for old, new in places})
        output = self.get_submodule(_INSIDE)(*args, **kwargs)
        return [tensor for _, tensor in tensors_in(output)]
