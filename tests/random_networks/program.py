"""Random networks as pure data: a program in SSA form, and the one module class that runs it.

`Program(...)` says everything about a network: its layers, the operations in order (each takes earlier
values by index, inputs first), its outputs. Its `repr` makes it again, so a failing network is a case
for the zoo as it stands: ``Case(Program(...).fresh, Program(...).args())``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normconv.proof import randomise_norms_
from tests.random_networks.layers import KINDS, NORMS

__all__ = ["FUNCTIONS", "IN_PLACE", "VIEWS", "Layer", "Op", "Program", "RandomNet"]


class _Short:
    """A dataclass whose repr leaves out what is at its default."""

    def __repr__(self) -> str:
        shown = []
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            default = entry.default
            if entry.default_factory is not dataclasses.MISSING:
                default = entry.default_factory()
            if default is dataclasses.MISSING:
                shown.append(repr(value))
            elif value != default:
                shown.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Let hypothesis print a failing network as it can be pasted."""
        printer.text(repr(self))


@dataclasses.dataclass(frozen=True, repr=False)
class Layer(_Short):
    """One module.

    Args:
        path: where it is registered; containers on the way are made.
        kind: its class, in `KINDS`.
        args: of its class.
        options: of its class.
        aliases: further places.
        tie: path of a layer whose weight it shares (a norm: its bias too).
        touch: what is done to its values: ``zero rows``, ``zero``, ``zero gamma``, ``dead``.
        frozen: which of its parameters are not trained: ``all``, ``weight``, ``bias``.
        mode: ``train`` or ``eval`` where it is not in the network's mode.
        hook: whether a forward hook that does nothing hangs on it.
    """

    path: str
    kind: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    tie: str = ""
    touch: str = ""
    frozen: str = ""
    mode: str = ""
    hook: bool = False

    def make(self) -> nn.Module:
        """Make the module."""
        module: nn.Module = KINDS[self.kind](*self.args, **self.options)
        return module


@dataclasses.dataclass(frozen=True, repr=False)
class Op(_Short):
    """One operation: ``call`` of the layer at `path`, or one of `FUNCTIONS`."""

    kind: str
    inputs: tuple[int, ...]
    path: str = ""
    how: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Program(_Short):
    """One network.

    Args:
        inputs: shapes, batch first.
        layers: its modules.
        ops: value ``len(inputs) + i`` is what ``ops[i]`` makes.
        outputs: the values it returns.
        form: how it returns them: ``tuple`` (one alone is bare), ``dict`` or ``nested``.
        aux: operations that only training mode runs; the last is then one more output.
        dtype: of its parameters and inputs.
        float_norms: whether the norms stay in float32.
        training: the mode it is in.
        keyword: whether the second input is given by name.
        seed: of weights, statistics and inputs.
    """

    inputs: tuple[tuple[int, ...], ...]
    layers: tuple[Layer, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    form: str = "tuple"
    aux: tuple[Op, ...] = ()
    dtype: str = "float32"
    float_norms: bool = False
    training: bool = False
    keyword: bool = False
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def layer(self, path: str) -> Layer:
        """Return the layer that stands at a path."""
        return next(layer for layer in self.layers if path in (layer.path, *layer.aliases))

    def calls(self, *, aux: bool = False) -> Iterator[tuple[int, Op, Layer]]:
        """Yield each call of a layer with the index of its value."""
        for index, op in enumerate(self.ops + (self.aux if aux else ()), len(self.inputs)):
            if op.kind == "call":
                yield index, op, self.layer(op.path)

    def tensors(self, seed: int = 1) -> list[Tensor]:
        """Random inputs in its dtype, the same every time."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        drawn = [torch.randn(shape, generator=generator) for shape in self.inputs]
        return [tensor.to(self.torch_dtype) for tensor in drawn]

    def args(self, seed: int = 1) -> tuple[Tensor, ...]:
        """Positional inputs."""
        return tuple(self.tensors(seed)[:1] if self.keyword else self.tensors(seed))

    def kwargs(self, seed: int = 1) -> dict[str, Tensor]:
        """Keyword inputs."""
        return {"more": self.tensors(seed)[1]} if self.keyword else {}

    def fresh(self, seed: int = 0) -> RandomNet:
        """Make the network as a factory does: random weights, initial statistics."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + seed)
            return RandomNet(self)

    def model(self) -> RandomNet:
        """Make the network with statistics that let a comparison see, then touch its values."""
        net = self.fresh()
        randomise_norms_(net, self.args(), self.kwargs(), seed=self.seed)
        with torch.no_grad():
            for layer in self.layers:
                _touch_(net.get_submodule(layer.path), layer.touch)
        return net


def _touch_(module: Any, touch: str) -> None:
    if touch == "zero rows":
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        (module.weight[:, 0] if transposed else module.weight[0]).zero_()
    elif touch == "zero":
        module.weight.zero_()
    elif touch == "zero gamma":
        module.weight[0] = 0.0
    elif touch == "dead":
        module.running_var[0] = 0.0


# --- running --------------------------------------------------------------------------------------


#: What an operation computes from its tensors and its `how`.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "scale": lambda x: x * 0.5 + 1,
    "relu_": lambda x: F.relu(x, inplace=True),
    "mul_": lambda x: x.mul_(2),
    "add": lambda x, y: x + y,
    "gate": lambda x, y: x * torch.sigmoid(y),
    "cat": lambda *xs: torch.cat(xs, dim=1),
    "chunk": lambda x, n, i: x.chunk(n, dim=1)[i],
    "split": lambda x, a, b, i: x.split([a, b], dim=1)[i],
    "shuffle": lambda x, groups: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2),
    "transpose": lambda x, a, b: x.transpose(a, b),
    "flatten": lambda x, start: x.flatten(start),
    "reshape": lambda x, *shape: x.reshape(x.shape[0], *shape),
    "mean": lambda x, *dims: x.mean(dim=dims),
    "pad": lambda x, mode, *by: F.pad(x, by, mode=mode),
    "upsample": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "merge": lambda x: x.flatten(0, 1),
    "reshape as": lambda x, y: x.reshape_as(y),
    # Python control flow on a size: fx stops at it, export passes.
    "branch": lambda x, size: torch.relu(x) if x.shape[-1] > size else torch.tanh(x),
}
#: Functions whose result may be a view of their input.
VIEWS = frozenset({"chunk", "split", "transpose", "flatten", "reshape", "merge", "reshape as"})
IN_PLACE = frozenset({"relu_", "mul_"})


def keep(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing."""


class RandomNet(nn.Module):
    """Runs a program; traces, exports and pickles."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        for layer in program.layers:
            module = layer.make()
            for path in (layer.path, *layer.aliases):
                _place(self, path, module)
            if layer.tie:
                _tie(module, self.get_submodule(layer.tie))
        self.to(program.torch_dtype)
        self.train(program.training)
        for layer in program.layers:
            self._set_flags(layer)

    def _set_flags(self, layer: Layer) -> None:
        module = self.get_submodule(layer.path)
        if layer.mode:
            module.train(layer.mode == "train")
        for name, parameter in module.named_parameters():
            if layer.frozen in ("all", name):
                parameter.requires_grad_(False)
        if layer.hook:
            module.register_forward_hook(keep)
        if self.program.float_norms and layer.kind in NORMS:
            module.float()

    def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
        program = self.program
        values = [x] if more is None else [x, more]
        for op in program.ops + (program.aux if self.training else ()):
            values.append(self._compute(op, [values[index] for index in op.inputs]))
        outputs = [values[index] for index in program.outputs]
        if self.training and program.aux:
            outputs.append(values[-1])
        return _formed(outputs, program.form)

    def _compute(self, op: Op, inputs: Sequence[Tensor]) -> Tensor:
        result: Tensor
        if op.kind == "call":
            result = self.get_submodule(op.path)(*inputs)
        elif op.kind == "reads":  # a layer's weight is read outside of its own forward
            weight: Any = self.get_submodule(op.path).weight
            result = inputs[0] + weight.pow(2).mean()
        else:
            result = FUNCTIONS[op.kind](*inputs, *op.how)
        return result


def _formed(outputs: list[Tensor], form: str) -> Any:
    if form == "dict":
        return {f"out{index}": value for index, value in enumerate(outputs)}
    if form == "nested":
        return {"first": outputs[0], "rest": tuple(outputs[1:])}
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module at a path; `row` is a ModuleList, `table` a ModuleDict."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            container = {"row": nn.ModuleList, "table": nn.ModuleDict}.get(parent, nn.Module)
            root.add_module(parent, container())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _tie(module: Any, other: Any) -> None:
    module.weight = other.weight
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.bias = other.bias
