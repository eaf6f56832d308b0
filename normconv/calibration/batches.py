"""Calibration data: any re-iterable of batches, checked, as positional and keyword inputs of a model."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.errors import Problem, UsageError
from normconv.graph.tracing import tensors_in

__all__ = ["Batches", "DataUse", "Source", "check_use", "notes_of"]

Source = Iterable[Any] | Callable[[], Iterable[Any]]
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]

DataUse = Literal["public", "private", "none"]

_NO_MORE = object()
_ONE_SHOT = "give a DataLoader, a list of batches, or a function that makes a new iterator"


@dataclass(frozen=True)
class Batches:
    """Batches of inputs that can be gone through again and again.

    A batch is a tensor; a tuple or list, of which as many are taken as the model has positional inputs
    (what follows are labels); or a dict of keyword inputs.

    Args:
        source: a DataLoader, a list, or a function that makes an iterator.
        positional: how many positional inputs the model takes.
        names: keyword inputs to take of a dict; all for None.
        like: a parameter of the model, whose device all inputs get; None leaves them where they are.
        dtypes: of the model's parameters; a floating input of another one gets that of `like`.
        seed: of the order of a source that draws it from torch's default generator, as a DataLoader with
            `shuffle` does: each pass is the same, and the caller's generator is left as it was.
    """

    source: Source
    positional: int = 1
    names: frozenset[str] | None = None
    like: Tensor | None = None
    dtypes: frozenset[torch.dtype] = frozenset()
    seed: int = 0

    @classmethod
    def of(cls, source: Source, model: nn.Module) -> Batches:
        """Take data for a model, and refuse what can be gone through only once.

        How many items of a batch are inputs, and which names, is read off the model's `forward`: its
        parameters without a default.

        Raises:
            UsageError: an iterator, or nothing that can be iterated.
        """
        if isinstance(source, (Tensor, Mapping, str)) or not (
            callable(source) or isinstance(source, Iterable)
        ):
            what = f"it is a {type(source).__name__}, no iterable of batches"
            raise UsageError(Problem("data", what, "give a list of batches: [tensor]"))
        if isinstance(source, Iterator):
            what = f"it is a {type(source).__name__}, which can be gone through only once"
            raise UsageError(Problem("data", what, _ONE_SHOT))
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        dtypes = frozenset(parameter.dtype for parameter in model.parameters())
        return cls(source, *_inputs_of(model), like, dtypes)

    def __iter__(self) -> Iterator[_Inputs]:
        for batch in self.items():
            args, kwargs = self._inputs(batch)
            if not any(_is_empty(tensor) for _, tensor in tensors_in((args, kwargs))):
                yield args, kwargs

    def items(self) -> Iterator[Any]:
        """Go through the batches as the source gives them, in the order of the seed."""
        state = torch.Generator().manual_seed(self.seed).get_state()
        rest: Iterator[Any] | None = None
        while True:
            # Order and augmentation are drawn from a generator of this pass, and of no one else.
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                if rest is None:
                    rest = iter(self.source() if callable(self.source) else self.source)
                batch = next(rest, _NO_MORE)
                state = torch.get_rng_state()
            if batch is _NO_MORE:
                return
            yield batch

    def _inputs(self, batch: Any) -> _Inputs:
        if isinstance(batch, Mapping):
            names = batch.keys() if self.names is None else batch.keys() & self.names
            if not names:
                keys, known = ", ".join(map(str, batch)), ", ".join(sorted(self.names or ()))
                what = f"it has {keys}; the model takes {known}"
                raise UsageError(
                    Problem("data", what, "a dict that is one input goes into a tuple")
                )
            return (), {name: self._placed(batch[name]) for name in batch if name in names}
        if isinstance(batch, (tuple, list)):
            return tuple(self._placed(item) for item in batch[: self.positional]), {}
        return (self._placed(batch),), {}

    def _placed(self, value: Any) -> Any:
        like = self.like
        if like is None:
            return value

        def place(tensor: Tensor) -> Tensor:
            cast = tensor.is_floating_point() and tensor.dtype not in self.dtypes
            return tensor.to(device=like.device, dtype=like.dtype if cast else tensor.dtype)

        return pytree.tree_map_only(Tensor, place, value)

    def checked(self) -> dict[str, Any]:
        """Go through all of it once; return what a report says of it.

        Returns:
            Numbers of batches and samples, and a SHA-256 over the values of all tensors.

        Raises:
            UsageError: it is empty, constant, or holds NaN or infinity; names the batch.
        """
        digest, batches, samples = hashlib.sha256(), 0, 0
        lowest, highest = float("inf"), -float("inf")
        for args, kwargs in self:
            tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
            for tensor in tensors:
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise UsageError(
                        Problem(f"data, batch {batches}", "it holds NaN or infinity", "clean it")
                    )
                if tensor.numel():
                    lowest = min(lowest, tensor.double().min().item())
                    highest = max(highest, tensor.double().max().item())
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
            samples += len(tensors[0]) if tensors and tensors[0].dim() else 0
            batches += 1
        if not samples:
            raise UsageError(Problem("data", "it is empty", "give a few batches of inputs"))
        if lowest == highest:
            what = f"every number in it is {lowest:g}"
            raise UsageError(Problem("data", what, "give real inputs: a constant tells nothing"))
        if next(iter(self), None) is None:
            what = "its second pass is empty: it can be gone through only once"
            raise UsageError(Problem("data", what, _ONE_SHOT))
        return {"batches": batches, "samples": samples, "sha256": digest.hexdigest()}


def check_use(use: DataUse, purpose: str) -> None:
    """Refuse data where none may touch the weights.

    Raises:
        UsageError: the use is ``none``, or unknown.
    """
    if use not in get_args(DataUse):
        what = f"{use!r} is unknown"
        raise UsageError(Problem("data_use", what, f"take one of {', '.join(get_args(DataUse))}"))
    if use == "none":
        what = f"no data may touch the weights, and {purpose} sets them by data"
        raise UsageError(Problem("data_use", what, "leave the data out, or say public or private"))


def notes_of(use: DataUse) -> tuple[str, ...]:
    """Return what a report must say of a use of data."""
    what = "private data set these weights, and no privacy accountant covered that: account for it"
    return (what,) if use == "private" else ()


def _inputs_of(model: nn.Module) -> tuple[int, frozenset[str] | None]:
    """How many positional inputs the model needs, and the names it takes; None for any names."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in by_place and p.default is p.empty]
    names = None
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        labels = {p.name for p in parameters if p.name in _LABELS and p.default is not p.empty}
        names = frozenset(parameter.name for parameter in parameters) - labels
    return max(1, len(needed)), names


_LABELS = ("label", "labels", "target", "targets")  # with these some models put out a loss


def _is_empty(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and not len(tensor)
