"""A plan carried out on a checkpoint: norms folded, layers weight-normed, as in the model it is for.

Each layer that a step names is made anew, alone, from its weight and bias; the steps then do to it what
they would do to it in the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from normconv.bridges.conventions import part_keys
from normconv.bridges.gains import GainRows
from normconv.bridges.jobs import Findings, Job, Parts, Read, reformed
from normconv.bridges.request import Request
from normconv.bridges.tensors import Spec, Tensors
from normconv.errors import LoadError, Problem, UsageError
from normconv.graph.families import NormState
from normconv.layers import (
    ChannelAffine,
    absorb_affine_,
    absorb_input_affine_,
    log_gain_,
)
from normconv.numerics import RowLayout, all_finite
from normconv.plan import Span, Step
from normconv.report import SiteRow

__all__ = ["planned_jobs"]

_INTO_LAYERS = ("fold", "forward")
_IN_THE_SLOT = ("affine", "frozen")
_NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Where the affine map of a norm's slot stands: norms that also hold an activation keep it beside it.
_SLOTS = {
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"), ""),
    **dict.fromkeys(("FrozenBatchNorm2d", "InstanceNorm1d", "InstanceNorm2d"), ""),
    **dict.fromkeys(("BatchNormAct2d", "FrozenBatchNormAct2d", "SyncBatchNormAct"), "affine."),
}
_CONVOLUTIONS: dict[tuple[int, bool], Any] = {
    (3, False): nn.Conv1d,
    (4, False): nn.Conv2d,
    (5, False): nn.Conv3d,
    (3, True): nn.ConvTranspose1d,
    (4, True): nn.ConvTranspose2d,
    (5, True): nn.ConvTranspose3d,
}


def planned_jobs(tensors: Tensors, request: Request) -> tuple[list[Job], tuple[str, ...]]:
    """Return what the plan makes of a state dict, and the keys that it drops.

    Raises:
        LoadError: lists what the plan names and the checkpoint does not hold, or holds in other shapes,
            and steps that need the model.
        UsageError: the eps of the norms is not given.
    """
    return _Planned(tensors, request).jobs()


class _Planned:
    def __init__(self, tensors: Tensors, request: Request) -> None:
        assert request.plan is not None
        self._tensors, self._request = tensors, request
        # Of two norms around one layer the one before it goes first: weight norm comes last.
        steps = request.plan.converted
        self._steps = sorted(steps, key=lambda step: step.action != "forward")
        self._normed = request.to == "normconv-wn"
        self.problems: list[Problem] = []
        self.unsaid: list[Problem] = []

    def jobs(self) -> tuple[list[Job], tuple[str, ...]]:
        states: dict[str, NormState] = {}
        for step in self._steps:
            if reason := _needs_model(step):
                self.problems.append(Problem(step.site, reason, "normconv convert, with the model"))
            elif step.action in (*_INTO_LAYERS, *_IN_THE_SLOT):
                state = self._state(step)
                if state is not None:
                    states[step.site] = state
        made = list(self._layers(states)) + list(self._slots(states)) + list(self._wrapped())
        dropped = [key for step in self._steps for key in self._norm_keys(step)]
        if not made and not self.problems and not self.unsaid:
            self.problems.append(Problem("plan", "no step of it changes a weight"))
        if self._normed and made and not self._makes_weight_norm():
            what = f"it makes no weight norm (its targets: {', '.join(self._targets())})"
            self.unsaid.append(Problem("plan", what, "use --to plain"))
        if self.problems:
            raise LoadError([*self.problems, *self.unsaid])
        if self.unsaid:
            raise UsageError(self.unsaid)
        return made, tuple(dropped)

    def _targets(self) -> list[str]:
        return sorted({step.target for step in self._steps})

    def _makes_weight_norm(self) -> bool:
        return any(s.target == "wn" and s.action in (*_INTO_LAYERS, "wrap") for s in self._steps)

    # Norms.

    def _norm_keys(self, step: Step) -> list[str]:
        if step.action not in (*_INTO_LAYERS, *_IN_THE_SLOT, "drop"):
            return []
        keys = [f"{site}.{key}" for site in (step.site, *step.aliases) for key in _NORM_KEYS]
        return [key for key in keys if key in self._tensors.specs]

    def _state(self, step: Step) -> NormState | None:
        found: dict[str, Tensor] = {}
        for key in _NORM_KEYS[:4]:
            name = f"{step.site}.{key}"
            if name not in self._tensors.specs:
                if key.startswith("running"):
                    self._missing(name, f"the plan folds {step.site}")
                continue
            tensor = found[key] = self._tensors.read(name)
            if tuple(tensor.shape) != (step.channels,):
                what = f"is {tuple(tensor.shape)}, and the plan has {step.channels} channels there"
                self.problems.append(Problem(name, what, "make a plan for this model"))
            elif not all_finite(tensor):
                self.problems.append(Problem(name, "holds NaN or infinity"))
        given = self._request.eps_of(step.site)
        eps = step.eps if given is None else given
        if eps is None:  # a plan of before plans said it
            what = f"neither plan nor checkpoint says the eps of the {step.norm}"
            way_out = "give it: --eps 1e-5 is torch's default, --eps 'GLOB=VALUE' for some"
            if not self.unsaid:
                self.unsaid.append(Problem(step.site, what, way_out))
            return None
        if "running_mean" not in found or "running_var" not in found or self.problems:
            return None
        mean, var = found["running_mean"], found["running_var"]
        if bool((var.double() + eps <= 0).any()):
            what = "plus eps is not positive everywhere"
            self.problems.append(Problem(f"{step.site}.running_var", what))
        return NormState(mean, var, found.get("weight"), found.get("bias"), eps)

    def _missing(self, name: str, why: str) -> None:
        near = get_close_matches(name, self._tensors.specs, n=1, cutoff=0.7)
        way_out = f"the file has {near[0]}" if near else "pass the checkpoint the plan is for"
        self.problems.append(Problem(name, f"{why}, and the file does not hold it", way_out))

    def _slots(self, states: dict[str, NormState]) -> Iterator[Job]:
        for step in self._steps:
            if step.action not in _IN_THE_SLOT:
                continue
            if step.norm not in _SLOTS:
                what = f"what a {step.norm} holds beside its statistics does not show in a plan"
                self.problems.append(Problem(step.site, what, "normconv convert, with the model"))
            elif step.site in states:
                yield _slot_job(step, states[step.site], self._tensors)

    # Layers.

    def _layers(self, states: dict[str, NormState]) -> Iterator[Job]:
        steps_of: dict[str, list[tuple[Step, Tensor]]] = defaultdict(list)
        transposed: set[str] = set()
        for step in self._steps:
            if step.action not in _INTO_LAYERS:
                continue
            layers = step.producers or step.consumers
            for place, layer in enumerate(layers):
                span = Span.read(step.spans[place]) if step.spans else Span(0, step.channels)
                steps_of[layer].append((step, torch.tensor(span.channels)))
                if step.producers and step.op.startswith("conv_transpose"):
                    transposed.add(layer)
        for layer, steps in steps_of.items():
            job = self._layer_job(layer, steps, states, layer in transposed)
            if job is not None:
                yield job

    def _layer_job(
        self,
        layer: str,
        steps: Sequence[tuple[Step, Tensor]],
        states: dict[str, NormState],
        transposed: bool,
    ) -> Job | None:
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        spec = self._tensors.specs.get(weight)
        if spec is None:
            self._missing(weight, "the plan names the layer")
            return None
        shape = spec.shape
        groups = 1
        for step, features in steps:
            axis = 1 if transposed or step.action == "forward" else 0
            own, wanted = shape[axis] if len(shape) > axis else 0, len(features)
            grouped = axis == 1 and own > 0 and wanted % own == 0 and len(shape) > 2
            if own != wanted and not grouped:
                what = f"is {shape}, and the plan has {wanted} features there"
                self.problems.append(Problem(weight, what, "make a plan for this model"))
            elif grouped:
                groups = wanted // own
        if not spec.dtype.is_floating_point:
            self.problems.append(Problem(weight, f"its numbers are {str(spec.dtype)[6:]}"))
        if self.problems or any(step.site not in states for step, _ in steps):
            return None
        normed = self._normed and any(step.target == "wn" for step, _ in steps)
        options = next((dict(s.options) for s, _ in steps if s.target == "wn"), {})
        c = float(options.get("c", 1.0)) if options.get("scale") == "exp" else None
        biased = bias in self._tensors.specs
        done = [(s.action, s.target, states[s.site], features) for s, features in steps]
        names = [layer, *self._others(weight)]
        row = SiteRow(weight, "plain", "", self._request.to, "exact", _why(steps))
        layout = RowLayout(transposed, groups if transposed else 1)
        gain, v = part_keys("weight", "normconv-wn", log=c is not None)
        parts = {gain: Spec(GainRows.of(layout, shape).shape, spec.dtype), v: spec}
        own_bias = self._tensors.specs[bias].dtype if biased else spec.dtype
        channels = layout.channels(torch.empty(shape, device="meta"))
        held = (parts if normed else {"weight": spec}) | {"bias": Spec((channels,), own_bias)}

        def make(read: Read, found: Findings) -> dict[str, Tensor]:
            module = _alone(read(weight), read(bias) if biased else None, transposed, groups)
            for action, target, state, features in done:
                into_g = self._normed and target == "wn"
                affine = state.affine.at(features)
                if action == "fold":
                    absorb_affine_(module, affine, weight_norm=into_g)
                else:
                    center = state.mean[features]
                    absorb_input_affine_(module, affine, center=center, weight_norm=into_g)
            if normed and c is not None:
                for floored in log_gain_(module, c).values():
                    found.zero_rows(weight, floored, "have a g within rounding: 0 is no e^(c·s)")
            state_dict = module.state_dict()
            found.check(weight, *state_dict.values())
            return {f"{name}.{key}": state_dict[key] for name in names for key in held}

        outputs = {f"{name}.{key}": each for name in names for key, each in held.items()}
        inputs = [f"{name}.{key}" for name in names for key in ("weight", "bias")]
        used = tuple(key for key in inputs if key in self._tensors.specs)
        return Job(outputs, used, make, None, row)

    def _others(self, weight: str) -> list[str]:
        """Layers that hold the very same weight under other names."""
        own = self._tensors.identity(weight)
        return [
            name.removesuffix(".weight")
            for name in self._tensors.specs
            if name.endswith(".weight") and name != weight and self._tensors.identity(name) == own
        ]

    def _wrapped(self) -> Iterator[Job]:
        for step in self._steps if self._normed else ():
            if step.action != "wrap":
                continue
            names = [n for n in self._tensors.specs if _is_weight_of(step, n)]
            if not names:
                self._missing(f"{step.site}.weight", "the plan names the layer")
            log = step.options.get("scale") == "exp"
            c = float(step.options.get("c", 1.0)) if log else None
            for name in names:
                shape = self._tensors.specs[name].shape
                transposed = step.op.startswith("conv_transpose")
                if len(shape) < 2 or (transposed and step.channels % max(1, shape[1])):
                    what = f"is {shape}, and the plan has {step.channels} rows there"
                    self.problems.append(Problem(name, what, "make a plan for this model"))
                    continue
                groups = step.channels // shape[1] if transposed else 1
                rows = GainRows.of(RowLayout(transposed, groups), shape)
                gain, v = part_keys(name, "normconv-wn", log=log)
                row = SiteRow(name, "plain", "", self._request.to, "exact", "")
                yield reformed(name, None, Parts(gain, v, rows, c), self._tensors, row)


def _needs_model(step: Step) -> str:
    if step.target not in ("wn", "plain", "frozen"):
        return f"target {step.target} is more than its keys"
    able = (*_INTO_LAYERS, *_IN_THE_SLOT, "wrap", "drop")
    return "" if step.action in able else f"'{step.action}' is more than its keys"


def _why(steps: Sequence[tuple[Step, Tensor]]) -> str:
    return ", ".join(
        f"{step.site} {'before' if step.action == 'forward' else 'after'} it" for step, _ in steps
    )


def _is_weight_of(step: Step, name: str) -> bool:
    layer, _, last = name.rpartition(".")
    if layer != step.site:
        return False
    if step.op in ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"):
        return last.startswith("weight_")
    return last.endswith("proj_weight") if step.op == "attention" else last == "weight"


def _alone(weight: Tensor, bias: Tensor | None, transposed: bool, groups: int) -> nn.Module:
    """Make a layer of these tensors' copies; what is not written in a state dict does not matter."""
    module: nn.Module
    if weight.dim() == 2:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        kind = _CONVOLUTIONS[weight.dim(), transposed]
        first, second = weight.shape[0], weight.shape[1] * groups
        sizes = (first, second) if transposed else (second, first)
        module = kind(*sizes, weight.shape[2:], groups=groups, bias=False, device="meta")
    module.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module


def _slot_job(step: Step, state: NormState, tensors: Tensors) -> Job:
    sites = (step.site, *step.aliases)
    names = [f"{site}.{_SLOTS[step.norm]}" for site in sites]
    spec = Spec((step.channels,), state.dtype)
    outputs = {f"{name}{key}": spec for name in names for key in ("scale", "shift")}

    def make(read: Read, found: Findings) -> dict[str, Tensor]:
        made = ChannelAffine.of(state.affine, trainable=False, dtype=state.dtype, center=state.mean)
        values = {"scale": made.scale, "shift": made.shift}
        found.check(step.site, *values.values())
        return {f"{name}{key}": value for name in names for key, value in values.items()}

    first = f"{step.site}.running_mean"
    row = SiteRow(step.site, step.norm, "", "scale and shift", "exact", step.reason)
    return Job(outputs, (first,), make, None, row)
