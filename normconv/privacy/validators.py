"""What Opacus has to refuse: norms through which the samples of a batch see each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normconv.errors import Problem
from normconv.graph.coupling import couples_in_training
from normconv.layers import MeanOnlyBatchNorm

__all__ = ["refuse_batch_norms"]


def refuse_batch_norms() -> None:
    """Have `ModuleValidator` refuse mean-only BatchNorm and the subclasses of torch's BatchNorms.

    Opacus looks a layer's class up exactly, and only layers with trained parameters.
    """
    from opacus.validators import ModuleValidator, register_module_validator

    for made in (MeanOnlyBatchNorm, *_made_from(_BatchNorm)):
        if made not in ModuleValidator.VALIDATORS:
            register_module_validator(made)(_refused)


def _made_from(base: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for made in base.__subclasses__():
        yield made
        yield from _made_from(made)


def _refused(module: nn.Module) -> list[Any]:
    from opacus.validators.errors import ShouldReplaceModuleError

    if not couples_in_training(module):
        return []
    mean_only = isinstance(module, MeanOnlyBatchNorm)
    what = "subtracts the mean of the batch" if mean_only else "normalizes with the whole batch"
    problem = Problem(
        repr(module),
        f"{what}, so that samples see each other",
        "convert the BatchNorm model with to='wn' or to='gn'; nc.audit names such layers",
    )
    return [ShouldReplaceModuleError(str(problem))]
