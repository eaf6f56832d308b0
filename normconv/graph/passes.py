"""FX passes: `pass_(gm) -> PassResult(gm, modified)`, on GraphModules, usable alone.

`PlainPass`, `WeightNormPass` and `FrozenPass` rewrite every norm of a GraphModule for one target, in
place, and recompile. `FunctionalNormsToModules` goes before them, `DropIdentities` after.

>>> import torch
>>> from torch import nn
>>> gm = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
>>> result = WeightNormPass()(gm)
>>> result.modified, [node.target for node in result.graph_module.graph.nodes if node.op == "call_module"]
(True, ['0'])
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from normconv.errors import PlanError, Problem
from normconv.graph.fx_capture import graph_of, is_fixed_batch_norm
from normconv.graph.names import Names
from normconv.graph.rewrite import absorb_norm_, affine_norm_
from normconv.graph.sites import Site, judge

__all__ = [
    "DropIdentities",
    "FrozenPass",
    "FunctionalNormsToModules",
    "GraphPass",
    "PassResult",
    "PlainPass",
    "WeightNormPass",
    "settle_",
]


class PassResult(NamedTuple):
    """What a pass returns.

    Args:
        graph_module: the module it was given, rewritten in place.
        modified: whether anything changed.
    """

    graph_module: fx.GraphModule
    modified: bool


class GraphPass(ABC):
    """A rewrite of a GraphModule, in place; the code is recompiled when something changed."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run the pass."""
        modified = self.rewrite(gm)
        if modified:
            gm.graph.lint()
            gm.delete_all_unused_submodules()
            gm.recompile()
        return PassResult(gm, modified)

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> bool:
        """Rewrite graph and modules; return whether anything changed."""


class _NormPass(GraphPass):
    """Rewrites every norm; refuses all that it cannot rewrite exactly, before it changes anything."""

    def rewrite(self, gm: fx.GraphModule) -> bool:
        names = Names(gm)
        sites = judge(gm, graph_of(gm, names), "eval")
        problems = [Problem(site.name, site.refusal) for site in sites if site.refusal]
        if problems:
            raise PlanError(problems)
        for site in sorted(sites, key=lambda site: not site.consumers):  # forward before backward
            self.rewrite_site(gm, site)
        return bool(sites) | DropIdentities().rewrite(gm)

    @abstractmethod
    def rewrite_site(self, gm: fx.GraphModule, site: Site) -> None:
        """Rewrite one norm."""


class PlainPass(_NormPass):
    """BatchNorm folded away: into the layer before it, else a `ChannelAffine` in its slot."""

    weight_norm = False

    def rewrite_site(self, gm: fx.GraphModule, site: Site) -> None:
        """Fold the norm or put its affine map into its slot."""
        if site.producers or site.consumers:
            names = (site.name, *site.aliases)
            absorb_norm_(
                gm,
                names,
                site.producers,
                consumers=site.consumers,
                spans=site.spans,
                weight_norm=self.weight_norm,
            )
        else:
            affine_norm_(gm, (site.name, *site.aliases))


class WeightNormPass(PlainPass):
    """As `PlainPass`, with the absorbing layers weight-normed: g signed, v the raw weight."""

    weight_norm = True


class FrozenPass(_NormPass):
    """Every norm becomes a `ChannelAffine` whose scale and shift are not trained."""

    def rewrite_site(self, gm: fx.GraphModule, site: Site) -> None:
        """Put the frozen map into the slot."""
        affine_norm_(gm, (site.name, *site.aliases), trainable=False)


class DropIdentities(GraphPass):
    """Takes calls of `nn.Identity` out of the graph."""

    def rewrite(self, gm: fx.GraphModule) -> bool:
        """Replace each call by its input."""
        modified = False
        for node in list(gm.graph.nodes):
            if node.op != "call_module":
                continue
            if type(gm.get_submodule(str(node.target))) is nn.Identity and node.all_input_nodes:
                node.replace_all_uses_with(node.all_input_nodes[0])
                gm.graph.erase_node(node)
                modified = True
        return modified


def settle_(model: nn.Module) -> None:
    """Bring a GraphModule in line with edits of its modules; other modules need nothing."""
    if isinstance(model, fx.GraphModule):
        DropIdentities()(model)
        model.recompile()


class FunctionalNormsToModules(GraphPass):
    """Turns `F.batch_norm(x, mean, var, ...)` over attributes of the model into BatchNorm modules.

    The modules hold the very same tensors. A call that normalizes with the batch (`training=True`),
    or whose statistics are computed, is left alone.
    """

    def rewrite(self, gm: fx.GraphModule) -> bool:
        """Replace each such call by a module call."""
        modified = False
        taken: set[str] = set()
        for node in list(gm.graph.nodes):
            if not is_fixed_batch_norm(node):
                continue
            call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
            call.apply_defaults()
            norm = _module_for(gm, call.arguments)
            if norm is None:
                continue
            taken |= {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
            name = _free_name(gm, "batch_norm")
            gm.add_submodule(name, norm)
            with gm.graph.inserting_before(node):
                new = gm.graph.call_module(name, (call.arguments["input"],))
            # torch.export believes a node's module stack: this norm is not inside the old module.
            new.meta = {k: v for k, v in node.meta.items() if k != "nn_module_stack"}
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            modified = True
        if modified:
            gm.graph.eliminate_dead_code()
            _forget_attributes(gm, taken)
        return modified


class _FunctionalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm module of any rank over tensors that belong to someone else."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any rank, as `F.batch_norm` does."""


def _module_for(gm: fx.GraphModule, arguments: dict[str, Any]) -> nn.Module | None:
    tensors: dict[str, Tensor | None] = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        node = arguments[name]
        if node is None:
            tensors[name] = None
        elif isinstance(node, fx.Node) and node.op == "get_attr":
            tensors[name] = _attribute(gm, str(node.target))
        else:
            return None
    mean, var = tensors["running_mean"], tensors["running_var"]
    if mean is None or var is None:
        return None
    norm = _FunctionalBatchNorm(mean.numel(), eps=float(arguments["eps"]), affine=False)
    norm.running_mean, norm.running_var = mean.detach(), var.detach()
    for name in ("weight", "bias"):
        tensor = tensors[name]
        if isinstance(tensor, nn.Parameter):
            norm.register_parameter(name, tensor)
        elif tensor is not None:
            norm.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
    return norm.train(gm.training)


def _attribute(gm: fx.GraphModule, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return cast(Tensor, getattr(gm.get_submodule(owner), name))


def _forget_attributes(gm: fx.GraphModule, paths: set[str]) -> None:
    """Drop attributes that now belong to a norm module; left behind they would be trained twice."""
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for path in paths - read:
        owner, _, name = path.rpartition(".")
        if owner not in called:  # a called module is the user's own, shared with the traced model
            delattr(gm.get_submodule(owner), name)


def _free_name(gm: fx.GraphModule, stem: str) -> str:
    number = 0
    while hasattr(gm, f"{stem}_{number}"):
        number += 1
    return f"{stem}_{number}"
