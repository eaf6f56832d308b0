"""Transformers' architectures with BatchNorm: a small model of each modelling file, and its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_inputs import SAMPLES, Call, Make, picture
from benchmarks.zoo_recipes import FOLDERS, RECIPES

__all__ = ["build", "calls", "family_of", "modelling_files", "names", "preload"]

Given = dict[str, Any]

_LAYERS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "speech_encoder_layers",
    "qformer_layers",
    "encoder_num_layers",
    "decoder_num_layers",
)


def preload() -> None:
    """Import the modelling code, so that forked processes need not."""
    for name in names():
        _head(name)


def names() -> list[str]:
    """Return the modelling files that a model is made of."""
    return list(RECIPES)


def modelling_files() -> list[str]:
    """Return the installed modelling files that speak of BatchNorm."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    files = sorted(folder.glob("*/modeling_*.py"))
    return [f.stem.removeprefix("modeling_") for f in files if "BatchNorm" in f.read_text("utf-8")]


def family_of(name: str) -> str:
    """Return the modelling file."""
    return name


def build(name: str) -> nn.Module:
    """Make the model of a modelling file with random weights."""
    recipe, head = RECIPES[name], _head(name)
    config = head.config_class(**recipe.config)
    if recipe.shrink:
        _shrink(config)
    made = head(config).get_submodule(recipe.part)
    assert isinstance(made, nn.Module)
    return made


def _head(name: str) -> Any:
    import transformers

    if (found := getattr(transformers, RECIPES[name].head, None)) is not None:
        return found
    folder = FOLDERS.get(name, name)
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{name}")
    return getattr(module, RECIPES[name].head)


def _shrink(config: Any) -> None:
    """Leave two layers of each stack, in the config and the configs inside it."""
    from transformers import PreTrainedConfig

    for name in _LAYERS:
        if isinstance(value := getattr(config, name, None), int) and value > 2:
            setattr(config, name, 2)
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            _shrink(value)


# Inputs


def calls(name: str, model: nn.Module) -> Iterator[tuple[str, Make]]:
    """Yield what the model may be called with, the smallest first: a label and how to make it."""
    recipe = RECIPES[name]
    give = _INPUTS[recipe.inputs]
    config: Any = getattr(model, "config", None)
    own = getattr(getattr(config, "vision_config", config), "image_size", None)
    pairs = [(size, size) for size in recipe.sizes]
    if own:
        height, width = own if isinstance(own, (tuple, list)) else (own, own)
        pairs = [pair for pair in pairs if pair[0] < height] + [(height, width)]
    for pair in pairs:

        def make(batch: int, pair: tuple[int, int] = pair) -> Call:
            return Call((), give(_Draw(batch, config), *pair))

        label = ", ".join(
            f"{k} {'x'.join(map(str, v.shape[1:]))}" for k, v in make(1).kwargs.items()
        )
        yield label, make


@dataclass
class _Draw:
    """Random inputs of a batch size, always the same ones."""

    batch: int
    config: Any

    def pixels(self, *shape: int) -> Tensor:
        return picture((self.batch, *shape))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((SAMPLES, *shape), generator=_generator())[: self.batch]

    def words(self, *shape: int, most: int = 70) -> Tensor:
        return torch.randint(5, most, (SAMPLES, *shape), generator=_generator())[: self.batch]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _text(draw: _Draw) -> Given:
    ids = draw.words(12)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _series(draw: _Draw) -> Given:
    channels = draw.config.num_input_channels
    return {"past_values": draw.normal(draw.config.context_length, channels)}


def _dated(draw: _Draw) -> Given:
    config = draw.config
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": draw.normal(past),
        "past_time_features": draw.normal(past, config.num_time_features),
        "past_observed_mask": torch.ones(draw.batch, past),
        "future_values": draw.normal(config.prediction_length),
        "future_time_features": draw.normal(config.prediction_length, config.num_time_features),
    }


def _classes(draw: _Draw, height: int, width: int) -> Given:
    classes, tasks = draw.words(6), draw.words(6)
    return {
        "pixel_values": draw.pixels(3, height, width),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.ones(draw.batch, dtype=torch.long),
    }


_INPUTS: dict[str, Callable[[_Draw, int, int], Given]] = {
    "pixels": lambda draw, h, w: {"pixel_values": draw.pixels(3, h, w)},
    "four channels": lambda draw, h, w: {"pixel_values": draw.pixels(4, h, w)},
    "line of text": lambda draw, h, w: {"pixel_values": draw.pixels(3, 48, 2 * w)},
    "pairs of pictures": lambda draw, h, w: {"pixel_values": draw.pixels(2, 3, h, w)},
    "frames": lambda draw, h, w: {"pixel_values": draw.pixels(4, 3, h, w)},
    "upright": lambda draw, h, w: {"pixel_values": draw.pixels(3, 64, 48)},
    "tall line of text": lambda draw, h, w: {"pixel_values": draw.pixels(3, 96, 2 * w)},
    "inputs": lambda draw, h, w: {"inputs": draw.pixels(3, h, w)},
    "text": lambda draw, h, w: _text(draw),
    "text and pixels": lambda draw, h, w: _text(draw) | {"pixel_values": draw.pixels(3, h, w)},
    "text and spectrogram": lambda draw, h, w: (
        _text(draw) | {"input_features": draw.pixels(1, 1001, 64)}
    ),
    "text and mels": lambda draw, h, w: _text(draw) | {"decoder_input_values": draw.normal(10, 80)},
    "classes and pixels": _classes,
    "task and pixels": lambda draw, h, w: {
        "pixel_values": draw.pixels(3, h, w),
        "task_inputs": draw.words(77),
    },
    "sound": lambda draw, h, w: {"input_values": draw.pixels(1, 8000)[:, 0]},
    "series": lambda draw, h, w: _series(draw),
    "series with dates": lambda draw, h, w: _dated(draw),
    "spectrogram of 80": lambda draw, h, w: {"input_features": draw.pixels(100, 80)},
    "spectrogram of 128": lambda draw, h, w: {"input_features": draw.pixels(100, 128)},
    "spectrogram of 320": lambda draw, h, w: {"input_features": draw.pixels(100, 320)},
    "states of 160": lambda draw, h, w: {"hidden_states": draw.pixels(100, 160)},
    "spectrogram of 160 and text": lambda draw, h, w: {
        "input_features": draw.pixels(100, 160),
        "decoder_input_ids": draw.words(6),
    },
}
