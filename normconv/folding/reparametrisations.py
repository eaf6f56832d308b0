"""Every reparametrisation of a model, one module after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from normconv.errors import Problem
from normconv.folding.hooked import fold_hooks_
from normconv.folding.in_forward import fold_forward
from normconv.folding.parametrized import fold_parametrizations_
from normconv.folding.placing import Folded, Left, Made, Outcome
from normconv.graph import Names
from normconv.graph.rewrite import replace_module_
from normconv.layers import Reparametrised, fold_layer_
from normconv.report import SiteRow

__all__ = ["fold_weights_"]


def fold_weights_(model: nn.Module) -> tuple[list[SiteRow], list[Problem]]:
    """Fold what can be, in place; return a row for each weight that was, and what is left."""
    kept = [*model.parameters(), *model.buffers()]  # so that identities stay unique until the end
    names, made = Names(model), Made()
    rows, left, gone = [], [], set[int]()
    for name, module in list(model.named_modules()):
        if id(module) in gone:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            gone |= {id(part) for part in module.modules()}
            what = "is TorchScript: whether it computes weights does not show"
            left.append(
                Problem(name or type(module).__name__, what, "fold the module it is made of")
            )
            continue
        before = list(module.modules())
        for outcome in _fold_(model, name, module, names, made):
            kind = type(module).__name__  # its plain class by now
            if isinstance(outcome, Left):
                left.append(Problem(name or kind, outcome.what, outcome.way_out))
            else:
                rows.append(SiteRow(name, kind, "", outcome.kind, "exact", outcome.reason))
        # What parametrized a tensor is no part of the model any more.
        gone |= {id(part) for part in before} - {id(part) for part in module.modules()}
    del kept
    return rows, left


def _fold_(
    model: nn.Module, name: str, module: nn.Module, names: Names, made: Made
) -> Iterator[Outcome]:
    folded = 0
    for outcome in _fold_computed_(module, made):
        folded += isinstance(outcome, Folded)
        yield outcome
    if isinstance(module, nn.RNNBase) and folded:
        module._init_flat_weights()  # torch runs on a list of its weights
    layer, of_forward = fold_forward(module, made, replaceable=bool(name))
    if layer is not module:
        replace_module_(model, (name, *names.aliases(name)), layer)
    if of_forward is not None:
        yield of_forward


def _fold_computed_(module: nn.Module, made: Made) -> Iterator[Outcome]:
    exact: dict[str, Tensor] = {}  # what one computes from another's result is rounded once too
    yield from fold_parametrizations_(module, made, exact)
    yield from fold_hooks_(module, made, exact)
    if isinstance(module, Reparametrised) and isinstance(module, nn.Module):
        what = module.what
        repaired = fold_layer_(module, made)
        rows = 0 if repaired.is_meta else int(repaired.sum())
        reason = f"{rows} rows without direction became 0" if rows else ""
        yield Folded(f"normconv {what}", reason)
