"""The way back to the original class: every norm in its slot again, with the weights of the result."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from normconv.errors import PlanError, Problem, UsageError
from normconv.folding.refactoring import reparametrised_before
from normconv.folding.slots import Slot, fill_norm_, read_slot, responses
from normconv.graph import is_norm
from normconv.graph.passes import settle_
from normconv.graph.rewrite import move_hooks_, replace_module_
from normconv.layers import Cloned, Reparametrised, copy_model, fold_layer_
from normconv.numerics import all_finite
from normconv.plan import Plan, Span, Step, forget, history_of
from normconv.report import Report, SiteRow
from normconv.surgery import Result, fingerprint, original_norm, originals

__all__ = ["applied_plans", "refactor_norms"]

_LOOK_ALIKE = "pass like=, the original or what makes one (--like)"


def refactor_norms(
    model: nn.Module, *, like: nn.Module | None = None, plan: Plan | None = None
) -> Result:
    """Return the model in the class that it was converted from, unmodified; nothing is run.

    Each norm is in its slot again, with μ = 0, σ² = 1 − eps, γ = 1 and β the bias that the layers before
    it carry; those have the folded weight, and no bias or one of 0, as in the original. Where an affine
    map stood in the slot, γ and β are its scale and shift. A mean-only norm gives its running mean to μ.
    Without γ and β the statistics carry scale and shift. A bias that the original has not, after a norm
    that went forward, goes into β where some β has that effect.

    Args:
        model: from ``wn``, ``wn+mobn``, ``plain`` or ``frozen``, folded or not; not changed.
        like: the original; None takes what the model's history says of it.
        plan: what was done to it; None takes the history's.

    Returns:
        A model without history, whose state dict loads strictly into the original's class.

    Raises:
        UsageError: there is neither a history nor a `like`.
        PlanError: some norm cannot be put back; names each, with the reason.

    >>> import normconv as nc
    >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)).eval()
    >>> model, _ = nc.convert(net, "wn", example_inputs=(torch.randn(4, 3),))
    >>> back = refactor_norms(nc.fold(model).model).model
    >>> net.load_state_dict(back.state_dict())
    <All keys matched successfully>
    """
    _refuse(model, like, plan)
    done = [(plan, {})] if plan is not None else applied_plans(model)
    twin = copy_model(model)
    layers = _ours(twin, like)
    _fold_(twin, layers)
    problems: list[Problem] = []
    rows: list[SiteRow] = []
    for one, was in reversed(done):
        if like is not None:
            was = originals(like, one)
        work = _Undoing(twin, was, like, _absorbed(model), problems, plan is not None)
        rows = work.undo(one.converted) + rows
    settle_(twin)
    forget(twin)
    if problems:
        raise PlanError(problems)
    if like is not None:
        twin = _loaded(like, twin)
    elif fingerprint(twin) != done[0][0].fingerprint:
        what = f"it is not the {done[0][0].model} that it was before its conversion"
        raise PlanError(Problem(type(model).__name__, what, _LOOK_ALIKE))
    facts = {"layers folded": len(layers), "norms put back": len(rows)}
    name = type(model).__name__
    return Result(twin, Report("refactor", name, target="bn", sites=tuple(rows), facts=facts))


def applied_plans(model: nn.Module) -> list[tuple[Plan, Mapping[str, Any]]]:
    """Return the plans that were carried out on a model, each with what it took out; oldest first."""
    return [
        (Plan.from_dict(entry["apply"]), entry.get("was", {}))
        for entry in history_of(model)
        if "apply" in entry
    ]


def _refuse(model: nn.Module, like: nn.Module | None, plan: Plan | None) -> None:
    name = type(model).__name__
    done = [plan] if plan is not None else [one for one, _ in applied_plans(model)]
    if not done:
        what = "it has no history of a conversion"
        raise UsageError(Problem(name, what, f"{_LOOK_ALIKE}, with example_inputs"))
    if isinstance(model, fx.GraphModule):
        what = "it is a traced graph, from which the slots of the norms are gone"
        raise UsageError(Problem(name, what, 'convert with output="module"'))
    if any(isinstance(module, Cloned) for module in model.modules()):
        what = "copies of activations stand beside its layers"
        raise UsageError(Problem(name, what, "nc.fold(model) takes them out"))
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise UsageError(Problem(name, "it is on the meta device and has no values", "load them"))
    if broken := [key for key, p in model.named_parameters() if not all_finite(p)]:
        what = f"{', '.join(broken[:3])} holds NaN or infinity"
        raise UsageError(Problem(name, what, "load sound weights first"))
    roots = {name: model} if like is None else {name: model, f"like= ({type(like).__name__})": like}
    known = {n: dict(root.named_modules(remove_duplicate=False)) for n, root in roots.items()}
    problems = [
        Problem(layer, f"the {root} has no such module", "pass the model that was converted")
        for one in done
        for step in one.converted
        for layer in (step.site, *step.aliases, *step.producers, *step.consumers)
        for root, modules in known.items()
        if layer not in modules
    ]
    problems += [
        Problem(
            step.site,
            f"{step.target} put a norm there that takes statistics of every sample",
            "no BatchNorm computes that: keep the original",
        )
        for one in done
        for step in one.converted
        if step.action in ("standardize", "fresh", "insert") or step.target.startswith("gn")
    ]
    if problems:
        raise PlanError(problems)


def _ours(model: nn.Module, like: nn.Module | None) -> list[str]:
    """The layers whose computed weights a conversion made: the original may have others of its own."""
    found = [name for name, m in model.named_modules() if isinstance(m, Reparametrised)]
    if like is None:
        known = reparametrised_before(model)
        return [name for name in found if name in known]
    originals_of = dict(like.named_modules())
    return [name for name in found if not isinstance(originals_of.get(name), Reparametrised)]


def _fold_(model: nn.Module, names: Iterable[str]) -> None:
    kept = list(model.parameters())  # alive until the end, so that identities stay unique
    done: dict[tuple[int, ...], nn.Parameter] = {}
    for name in names:
        layer = model.get_submodule(name)
        fold_layer_(layer, done)
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()
    del kept


def _absorbed(model: nn.Module) -> list[Mapping[str, Any]]:
    """What `fold` took out of slots later."""
    return [a for entry in history_of(model) for a in entry.get("fold", {}).get("absorbed", ())]


def _loaded(like: nn.Module, made: nn.Module) -> nn.Module:
    """Load the values into a copy of the original, strictly."""
    twin = copy_model(like)
    values = made.state_dict(keep_vars=True)
    shapes = {name: getattr(value, "shape", None) for name, value in values.items()}
    wanted = {name: getattr(value, "shape", None) for name, value in twin.state_dict().items()}
    if wrong := sorted(n for n in shapes | wanted if shapes.get(n, 0) != wanted.get(n, 0)):
        listed = ", ".join(wrong[:5])
        what = f"like= is no original of it: {listed} differ" + " …" * (len(wrong) > 5)
        raise PlanError(Problem(type(like).__name__, what, "pass what it was converted from"))
    trained = {name: parameter.requires_grad for name, parameter in twin.named_parameters()}
    twin.load_state_dict(values, strict=True, assign=True)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trained[name])
    modes = {name: module.training for name, module in made.named_modules()}
    for name, module in twin.named_modules():
        module.training = modes.get(name, module.training)
    return twin


class _Undoing:
    """Puts the norms of one plan back into a model, in place."""

    def __init__(
        self,
        model: nn.Module,
        was: Mapping[str, Any],
        like: nn.Module | None,
        absorbed: list[Mapping[str, Any]],
        problems: list[Problem],
        guessed: bool,
    ) -> None:
        self._model = model
        self._guessed = guessed
        self._norms: Mapping[str, Any] = was.get("norms", {})
        self._without_bias = set(was.get("without bias", ()))
        self._like = like
        self._absorbed = absorbed
        self._problems = problems

    def undo(self, steps: Iterable[Step]) -> list[SiteRow]:
        """Put the norms back; what stands in the way is appended to the problems."""
        steps = [step for step in steps if step.action != "wrap" and self._is_gone(step)]
        slots = {step.site: slot for step in steps if (slot := self._slot(step)) is not None}
        steps = [step for step in steps if step.site in slots]
        for step in steps:  # biases first go to the norms that follow, then to those before
            for layers, spans in self._links(step, "producers"):
                self._pull_(step, slots[step.site], layers, spans)
        for step in steps:
            links = self._links(step, "consumers")
            self._push_(step, slots[step.site], links)
        if steps and not self._problems:
            self._check_biases()
        rows = [self._put_back_(step, slots[step.site]) for step in steps]
        return [row for row in rows if row is not None]

    def _is_gone(self, step: Step) -> bool:
        """Whether the norm is not there any more: it may have been kept in what `like` describes."""
        if self._like is None or not self._guessed:  # the history knows what was converted
            return True
        now, before = (root.get_submodule(step.site) for root in (self._model, self._like))
        eps = [getattr(norm, "eps", None) for norm in (now, before)]
        return not (is_norm(now) and type(now) is type(before) and eps[0] == eps[1])

    def _slot(self, step: Step) -> Slot | None:
        if self._like is None and step.site not in self._norms:
            what = "the history is older than what says which norm stood there"
            self._problems.append(Problem(step.site, what, _LOOK_ALIKE))
            return None
        children = self._norms[step.site]["children"]
        module = self._model.get_submodule(step.site)
        slot = read_slot(module, step.channels, children)
        if isinstance(slot, str):
            self._problems.append(Problem(step.site, slot, "put back what the conversion left"))
            return None
        return slot

    def _links(self, step: Step, side: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The layers on one side that took the norm, at its conversion or when the model was folded."""
        own = getattr(step, side)
        links = [(own, step.spans)] if own else []
        names = {step.site, *step.aliases}
        for entry in self._absorbed:
            parts = {n for name in names for n in (name, f"{name}.affine", f"{name}.norm")}
            if entry.get(side) and parts & set(entry["names"]):
                links.append((tuple(entry[side]), tuple(entry.get("spans", ()))))
        return links

    @torch.no_grad()
    def _pull_(
        self, step: Step, slot: Slot, layers: tuple[str, ...], spans: tuple[str, ...]
    ) -> None:
        """Take the biases of the layers before a norm into it, in place."""
        total: Tensor | None = None
        for surplus in (True, False):  # what has to go decides, the others keep the difference
            for place, name in enumerate(layers):
                layer: Any = self._model.get_submodule(name)
                if (name in self._without_bias) != surplus or not (surplus or slot.plain):
                    continue
                channels = _channels(spans, place, step, layer.weight.device)
                bias = torch.zeros(len(channels), dtype=torch.float64, device=layer.weight.device)
                if layer.bias is not None:
                    bias = layer.bias.double()
                if total is None:
                    total = torch.full((step.channels,), torch.nan, device=bias.device).double()
                first = total.clone()
                first[channels.flip(0)] = bias.flip(0)
                total = torch.where(total.isnan(), first, total)
                rest = bias - total[channels]
                if not surplus and layer.bias is not None:
                    layer.bias.copy_(rest)
                elif bool((rest != 0).any()):
                    what = f"the original's {name} has no bias, and no one β gives what it has now"
                    self._problems.append(Problem(step.site, what, "keep it in its present class"))
                else:
                    layer.bias = None
                slot.like = layer.weight if slot.like is None else slot.like
        if total is not None:
            moved = slot.scale.to(total.device) * total.nan_to_num(0.0)
            if slot.centers:
                slot.mean = slot.mean.to(moved.device) - moved
            else:
                slot.shift = slot.shift.to(moved.device) + moved

    @torch.no_grad()
    def _push_(
        self,
        step: Step,
        slot: Slot,
        links: list[tuple[tuple[str, ...], tuple[str, ...]]],
    ) -> None:
        """Take biases that the original has not out of the layers after a norm: W β = b."""
        blocks: list[Tensor] = []
        biases: list[Tensor] = []
        owners: list[Any] = []
        for layers, spans in links:
            for place, name in enumerate(layers):
                layer: Any = self._model.get_submodule(name)
                slot.like = layer.weight if slot.like is None else slot.like
                if name not in self._without_bias or layer.bias is None:
                    continue
                channels = _channels(spans, place, step, layer.weight.device)
                blocks.append(responses(layer, channels, step.channels).cpu())
                biases.append(layer.bias.double().cpu())
                owners.append(layer)
        if not owners:
            return
        matrix, bias = torch.cat(blocks), torch.cat(biases)
        shift = torch.linalg.lstsq(matrix, bias.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        rest = (matrix @ shift - bias).abs()
        noise = torch.finfo(owners[0].weight.dtype).eps * (matrix.abs() @ shift.abs() + bias.abs())
        if not bool((rest <= 4 * noise).all()):
            what = "the layers after it have a bias that no β before them gives"
            self._problems.append(Problem(step.site, what, "keep it in its present class"))
            return
        slot.shift = slot.shift + shift.to(slot.shift.device)
        for layer in owners:
            layer.bias = None

    def _check_biases(self) -> None:
        """Refuse what the original's layers cannot hold."""
        for name in self._without_bias:
            layer: Any = self._model.get_submodule(name)
            bias = layer._parameters.get("bias")
            if bias is None:
                continue
            if bool((bias != 0).any()):
                what = "it has a bias now, the original has none, and no norm can take it"
                self._problems.append(Problem(name, what, "keep it in its present class"))
            layer.bias = None

    def _put_back_(self, step: Step, slot: Slot) -> SiteRow | None:
        names = (step.site, *step.aliases)
        like = slot.like
        if like is None:
            like = next(
                (p for p in self._model.parameters() if p.is_floating_point()), torch.ones(1)
            )
        try:
            norm = self._norm(step, slot, like)
        except PlanError as error:
            self._problems.extend(error.problems)
            return None
        if self._like is None:
            move_hooks_(slot.module, norm)
        for module in (norm, *slot.trailing.values()):
            module.training = slot.module.training
        eps = self._norms[step.site]["eps"]
        reason = "its eps is not known" if eps is None else fill_norm_(norm, slot, float(eps))
        if reason:
            self._problems.append(Problem(step.site, reason, "keep it in its present class"))
            return None
        replace_module_(self._model, names, norm)
        return SiteRow(step.site, step.norm, " + ".join(step.producers), "bn", "exact", "")

    def _norm(self, step: Step, slot: Slot, like: Tensor) -> nn.Module:
        if self._like is None:
            return original_norm(
                self._norms[step.site],
                step.site,
                step.channels,
                slot.trailing,
                slot.module.__dict__,
                dtype=like.dtype,
                device=like.device,
            )
        norm = copy.deepcopy(self._like.get_submodule(step.site))
        for name, child in slot.trailing.items():
            norm._modules[name] = child
        return norm.to(dtype=like.dtype, device=like.device)


def _channels(spans: tuple[str, ...], place: int, step: Step, device: torch.device) -> Tensor:
    channels = Span.read(spans[place]).channels if spans else range(step.channels)
    return torch.tensor(channels, device=device)
