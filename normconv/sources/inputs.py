"""Example inputs: from the user, from the model's own configuration, or inferred and tried out."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.errors import LoadError, Problem, UsageError
from normconv.sources.data import IMAGENET
from normconv.sources.recognise import recognise
from normconv.sources.safe_load import safe_load
from normconv.sources.trial import failure_of
from normconv.sources.trust import Trust

__all__ = ["Inputs", "example_inputs"]

BATCH = 2
_SEED = 0
_MAX_ELEMENTS = 1 << 28
_SHAPE = re.compile(r"\d+(x\d+)*")
_SIZES = {
    1: (1024, 128, 256, 64, 32, 16, 4000, 16000, 28, 100, 10),
    2: (224, 64, 32, 28, 96, 128, 299, 256, 384, 16, 48, 512, 600, 8),
    3: (16, 32, 64, 112, 8, 28),
}
_TOKENS = 16


class Inputs(NamedTuple):
    """What the model is called with, as torch.export has it, and where that came from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str

    def to(self, device: torch.device) -> Inputs:
        """Return them with all tensors on a device."""
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.to(device), (self.args, self.kwargs)
        )
        return self._replace(args=args, kwargs=kwargs)


def example_inputs(
    model: nn.Module, spec: str | None = None, *, source: str | None = None
) -> Inputs:
    """Give inputs that a model can be called with.

    Args:
        model: the model; its mode and parameters are left alone.
        spec: ``2x3x224x224`` (normal numbers, always the same), several with commas between; a
            ``.pt`` file with a tensor, tuple or dict; a ``.npz`` file. None asks the model.
        source: what the model was loaded from, for errors.

    Raises:
        UsageError: the spec is no shape and no file.
        LoadError: nothing is known of the model's inputs and no guess passes.

    >>> given = example_inputs(nn.Linear(5, 2))
    >>> given.args[0].shape, given.origin
    (torch.Size([2, 5]), '2x5 inferred from the first layer, a Linear')
    """
    if spec is not None:
        return _from_spec(model, spec)
    place = source or type(model).__name__
    tried: list[str] = []
    for inputs in _guesses(model):
        failure = failure_of(model, inputs.args, inputs.kwargs)
        if failure is None:
            return inputs
        tried.append(f"{_shapes(inputs)} ({failure})")
    what = "no input of it could be inferred"
    if tried:
        what = f"no inferred input passes: {'; '.join(tried[:2])}"
        if len(tried) > 2:
            what += f" and {len(tried) - 2} more"
    raise LoadError(Problem(place, what, "say it with --input, e.g. --input 2x3x224x224"))


# What the user says


def _from_spec(model: nn.Module, spec: str) -> Inputs:
    text = spec.strip()
    if Path(text).suffix.lower() in (".pt", ".pth", ".npz"):
        return _from_file(model, Path(text))
    words = [word.strip() for word in text.split(",")]
    shapes = [tuple(map(int, word.split("x"))) if _SHAPE.fullmatch(word) else () for word in words]
    problems = []
    for word, shape in zip(words, shapes, strict=True):
        if not shape:
            what = f"{word!r} is no shape and no .pt or .npz file"
            problems.append(Problem("--input", what, "write e.g. 2x3x224x224"))
        elif 0 in shape or math.prod(shape) > _MAX_ELEMENTS:
            what = f"{word!r} has no or more than {_MAX_ELEMENTS} elements"
            problems.append(Problem("--input", what))
    if problems:
        raise UsageError(problems)
    like = _like(model)
    config = getattr(model, "pretrained_cfg", None)
    tensors = tuple(_as_images(_normal(shape, like), config) for shape in shapes)
    return Inputs(tensors, {}, f"{text} as given")


def _from_file(model: nn.Module, path: Path) -> Inputs:
    origin = f"the file {path}"
    if path.suffix.lower() == ".npz":
        arrays = _read_npz(path)
        names = _parameters_of(model)
        kwargs = {name: value for name, value in arrays.items() if name in names}
        return Inputs(tuple(v for k, v in arrays.items() if k not in kwargs), kwargs, origin)
    document = safe_load(path, recognise(path), Trust())
    if isinstance(document, Tensor):
        return Inputs((document,), {}, origin)
    if isinstance(document, (tuple, list)) and document:
        return Inputs(tuple(document), {}, origin)
    if isinstance(document, dict) and document and all(isinstance(key, str) for key in document):
        return Inputs((), dict(document), origin)
    what = f"holds a {type(document).__name__}, not a tensor, a tuple or a dict of tensors"
    raise LoadError(Problem(str(path), what))


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    if not path.is_file():
        raise UsageError(Problem(str(path), "there is no such file"))
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise LoadError(Problem(str(path), f"is no readable .npz file ({error})")) from None


def _parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


# What the model says


def _guesses(model: nn.Module) -> Iterator[Inputs]:
    """Yield what may be right, the likeliest first."""
    like = _like(model)
    for name in ("pretrained_cfg", "default_cfg"):
        shape = _get(getattr(model, name, None), "input_size")
        if isinstance(shape, (tuple, list)) and all(isinstance(n, int) for n in shape):
            tensor = _as_images(_normal((BATCH, *shape), like), getattr(model, name))
            yield _inputs(tensor, f"from the model's {name}")
    yield from _from_transformers(model, like)
    yield from _from_first_layer(model, like)


def _get(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)


def _inputs(tensor: Tensor, origin: str) -> Inputs:
    return Inputs((tensor,), {}, f"{_shape(tensor)} {origin}")


def _from_transformers(model: nn.Module, like: Tensor) -> Iterator[Inputs]:
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return
    if main == "pixel_values":
        sizes = _get(config, "image_size") or _SIZES[2]
        channels = _get(config, "num_channels") or 3
        for size in sizes if isinstance(sizes, tuple) and sizes is _SIZES[2] else (sizes,):
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            pixels = _normal((BATCH, channels, height, width), like)
            origin = f"pixel_values {_shape(pixels)} from the model's config"
            yield Inputs((), {"pixel_values": pixels}, origin)
    elif main == "input_ids":
        words = _get(config, "vocab_size") or 2
        length = min(_TOKENS, _get(config, "max_position_embeddings") or _TOKENS)
        ids = _tokens((BATCH, length), words, like)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        names = _parameters_of(model)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
            given["decoder_input_ids"] = ids
        given = {name: value for name, value in given.items() if name in names}
        yield Inputs((), given, f"input_ids {_shape(ids)} from the model's config")
    elif main in ("input_values", "input_features"):
        bands = _get(config, "num_mel_bins")
        shape = (BATCH, bands, 3000) if bands and main == "input_features" else (BATCH, 16000)
        yield Inputs((), {main: _normal(shape, like)}, f"{main} from the model's config")


# What the first layer says

_CONVS = {
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), 1),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), 2),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), 3),
}


def _from_first_layer(model: nn.Module, like: Tensor) -> Iterator[Inputs]:
    first = _first_layer(model)
    if first is None:
        return
    origin = f"inferred from the first layer, a {type(first).__name__}"
    for kind, dimensions in _CONVS.items():
        if isinstance(first, kind):
            channels = int(first.in_channels)  # type: ignore[arg-type]
            fixed = _flattened(model, dimensions)
            for size in dict.fromkeys((*_SIZES[dimensions], *fixed)):
                yield _inputs(_normal((BATCH, channels, *[size] * dimensions), like), origin)
            return
    if isinstance(first, nn.Linear):
        width = first.in_features
        yield _inputs(_normal((BATCH, width), like), origin)
        yield _inputs(_normal((BATCH, _TOKENS, width), like), origin)
        # A Linear may stand behind a Flatten: images and their usual sizes.
        for channels in (1, 3):
            side = math.isqrt(width // channels)
            if side > 1 and side * side * channels == width:
                yield _inputs(_normal((BATCH, channels, side, side), like), origin)
    elif isinstance(first, nn.modules.batchnorm._BatchNorm):
        rank = {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
        dimensions = next((d for kind, d in rank.items() if isinstance(first, kind)), 0)
        if dimensions == 0:
            yield _inputs(_normal((BATCH, first.num_features), like), origin)
        for size in _SIZES[dimensions or 1]:
            shape = (BATCH, first.num_features, *[size] * (dimensions or 1))
            yield _inputs(_normal(shape, like), origin)
    elif isinstance(first, nn.Embedding):
        yield _inputs(_tokens((BATCH, _TOKENS), first.num_embeddings, like), origin)
    elif isinstance(first, nn.RNNBase):
        shape = (BATCH, _TOKENS) if first.batch_first else (_TOKENS, BATCH)
        yield _inputs(_normal((*shape, first.input_size), like), origin)


def _first_layer(model: nn.Module) -> nn.Module | None:
    """Return the first layer in the order of definition that fixes a size."""
    kinds = (*_CONVS, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.Embedding, nn.RNNBase)
    return next((module for module in model.modules() if isinstance(module, kinds)), None)


def _flattened(model: nn.Module, dimensions: int) -> list[int]:
    """Find sizes for which a Linear behind a Flatten may fit: its width over channels, scaled."""
    sizes: dict[int, None] = {}
    channels = 0
    for module in model.modules():
        if isinstance(module, tuple(_CONVS)):
            channels = int(module.out_channels)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear) and channels and module.in_features % channels == 0:
            side = round((module.in_features // channels) ** (1 / dimensions))
            if side**dimensions * channels == module.in_features:
                # Convolutions without padding lose a few pixels before each halving.
                near = (scale * side + extra for scale in (1, 2, 4, 8, 16, 32) for extra in _LOST)
                sizes |= dict.fromkeys(near)
            break
    return list(sizes)


_LOST = (0, 2, 4, 6, 8, 10, 12, 14, 1, 3)


# Tensors


def _normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(like)


def _as_images(noise: Tensor, config: Any) -> Tensor:
    """Give noise the mean and deviation that photographs have for a model with such a config.

    Pixels of mean m and deviation s become (m − mean) / std and s / std: 0 and 1 for what was trained
    with ImageNet's, but a deviation near 1/2 for what was trained with 0.5.
    """
    mean, std = _get(config, "mean"), _get(config, "std")
    axis = noise.dim() - 3
    known = isinstance(mean, (tuple, list)) and isinstance(std, (tuple, list))
    if not known or axis < 1 or not noise.shape[axis] == len(mean) == len(std) == len(IMAGENET[0]):
        return noise
    pixels_mean, pixels_std = (noise.new_tensor(v).view(-1, 1, 1) for v in IMAGENET)
    own_mean, own_std = (noise.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    # Exactly the noise where both are the same.
    return noise * (pixels_std / own_std) + (pixels_mean - own_mean) / own_std


def _tokens(shape: tuple[int, ...], words: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, words, shape, generator=generator).to(like.device)


def _like(model: nn.Module) -> Tensor:
    """Return a tensor whose dtype and device the inputs take: the first floating parameter."""
    floating = (p for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.empty(0))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _shapes(inputs: Inputs) -> str:
    values = [*inputs.args, *inputs.kwargs.values()]
    return ", ".join(_shape(value) for value in values if isinstance(value, Tensor))
