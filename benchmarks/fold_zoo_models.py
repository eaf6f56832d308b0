"""Every modelling file of transformers that uses weight norm, small and at random weights."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normconv.folding.torch_weight_norm import hooked_names, parametrized_names

__all__ = ["RECIPES", "Recipe", "apply_", "build", "modelling_files", "normed", "remove_"]

Inputs = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How the model of a modelling file is made and called.

    Args:
        head: the class.
        inputs: what makes the keyword inputs of each part that is run: of the whole model, or of the
            submodules before and after a codec's rounding to the nearest code.
        config: what differs from the default config; nested configs are dicts.
    """

    head: str
    inputs: Mapping[str, Inputs]
    config: Mapping[str, Any] = field(default_factory=dict)


def _normal(**shapes: tuple[int, ...]) -> Inputs:
    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}

    return make


_SOUND = {"": _normal(input_values=(1, 4000))}
_MEL = {"": _normal(spectrogram=(1, 20, 80))}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_SQUEEZED = {**_SPEECH, "squeeze_factor": 2}
_VOCODER = {
    "upsample_initial_channel": 32,
    "upsample_rates": (4, 2),
    "upsample_kernel_sizes": (8, 4),
    "resblock_kernel_sizes": (3, 5),
    "resblock_dilation_sizes": ((1, 3), (1, 3)),
}
_UNITS = {
    **_VOCODER,
    "unit_hifi_gan_vocab_size": 50,
    "unit_embed_dim": 16,
    "lang_embed_dim": 8,
    "spkr_embed_dim": 8,
    "vocoder_num_langs": 3,
    "vocoder_num_spkrs": 3,
}
_DAC = {
    "encoder_hidden_size": 8,
    "decoder_hidden_size": 32,
    "downsampling_ratios": (2, 4),
    "upsampling_ratios": (4, 2),
    "n_codebooks": 2,
    "codebook_size": 16,
}
_CODEC = {
    "hidden_size": 32,
    "num_filters": 8,
    "upsampling_ratios": [4, 2],
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "upsample_groups": 32,
}
_IN_AND_OUT = {
    "encoder": _normal(hidden_states=(1, 1, 800)),
    "decoder": _normal(hidden_states=(1, 32, 40)),
}
_TOKENS = {
    "acoustic_encoder": _normal(hidden_states=(1, 1, 800)),
    "acoustic_decoder": _normal(hidden_states=(1, 256, 40)),
    "semantic_model": _normal(input_values=(1, 4000)),
}


_TOKENIZER = {
    "acoustic_model_config": {"model_type": "dac", **_DAC},
    "semantic_model_config": {"model_type": "hubert", **_SPEECH},
}


def _units(speaker: str) -> dict[str, Inputs]:
    one = torch.tensor([[1]])
    return {"": lambda: {"input_ids": torch.arange(4, 24)[None], speaker: one, "lang_id": one}}


def _text() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(1, 13)[None]}


RECIPES: dict[str, Recipe] = {
    "dac": Recipe("DacModel", _IN_AND_OUT, _DAC),
    "encodec": Recipe(
        "EncodecModel",
        _IN_AND_OUT,
        {"hidden_size": 32, "num_filters": 8, "upsampling_ratios": [4, 2], "codebook_dim": 32},
    ),
    "fastspeech2_conformer": Recipe("FastSpeech2ConformerHifiGan", _MEL, _VOCODER),
    "higgs_audio_v2_tokenizer": Recipe(
        "HiggsAudioV2TokenizerModel",
        _TOKENS,
        _TOKENIZER,
    ),
    "hubert": Recipe("HubertModel", _SOUND, _SPEECH),
    "mimi": Recipe("MimiModel", _IN_AND_OUT, _CODEC),
    "pocket_tts_audio_tokenizer": Recipe("PocketTTSAudioTokenizerModel", _IN_AND_OUT, _CODEC),
    "seamless_m4t": Recipe("SeamlessM4TCodeHifiGan", _units("spkr_id"), _UNITS),
    "seamless_m4t_v2": Recipe("SeamlessM4Tv2CodeHifiGan", _units("speaker_id"), _UNITS),
    "sew": Recipe("SEWModel", _SOUND, _SQUEEZED),
    "sew_d": Recipe("SEWDModel", _SOUND, _SQUEEZED),
    "speecht5": Recipe("SpeechT5HifiGan", _MEL, _VOCODER),
    "unispeech": Recipe("UniSpeechModel", _SOUND, _SPEECH),
    "unispeech_sat": Recipe("UniSpeechSatModel", _SOUND, _SPEECH),
    "univnet": Recipe(
        "UnivNetModel",
        {"": _normal(input_features=(1, 20, 100), noise_sequence=(1, 20, 64))},
        {"model_hidden_channels": 8},
    ),
    "vits": Recipe(
        "VitsModel",
        {"": _text},
        {
            **_VOCODER,
            "hidden_size": 32,
            "flow_size": 32,
            "num_hidden_layers": 1,
            "ffn_dim": 32,
            "spectrogram_bins": 17,
            "duration_predictor_filter_channels": 32,
            "posterior_encoder_num_wavenet_layers": 2,
        },
    ),
    "wav2vec2": Recipe("Wav2Vec2Model", _SOUND, _SPEECH),
    "wav2vec2_conformer": Recipe("Wav2Vec2ConformerModel", _SOUND, _SPEECH),
    "wavtokenizer": Recipe(
        "WavTokenizerModel",
        {"encoder_model.encoder": _normal(hidden_states=(1, 1, 800))},
        {
            "hidden_size": 32,
            "num_filters": 8,
            "upsampling_ratios": [4, 2],
            "codebook_dim": 32,
            "decoder_hidden_size": 32,
            "decoder_intermediate_size": 64,
            "decoder_num_layers": 1,
            "decoder_attention_num_groups": 8,
        },
    ),
    "wavlm": Recipe("WavLMModel", _SOUND, _SPEECH),
    "xcodec": Recipe("XcodecModel", _TOKENS, _TOKENIZER),
}


def modelling_files() -> list[str]:
    """Return the installed modelling files that call weight norm."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    files = sorted(folder.glob("*/modeling_*.py"))
    return [f.parent.name for f in files if "weight_norm" in f.read_text("utf-8")]


def build(name: str) -> nn.Module:
    """Make the model of a modelling file with random weights."""
    recipe = RECIPES[name]
    if name == "higgs_audio_v2_tokenizer" and importlib.util.find_spec("torchaudio") is None:
        _stand_in("torchaudio")  # it resamples the input of a part that is not run here
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    head: Any = getattr(module, recipe.head)
    torch.manual_seed(0)
    made: nn.Module = head(head.config_class(**recipe.config)).eval()
    return made


def _stand_in(name: str) -> None:
    """Put an empty package in the place of one that is not installed."""
    from transformers.utils import import_utils

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    import_utils.is_torchaudio_available.cache_clear()


def _outermost(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """The modules that have a method, without those inside another such module."""
    if callable(getattr(model, method, None)):
        yield model
        return
    for child in model.children():
        yield from _outermost(child, method)


def apply_(model: nn.Module) -> None:
    """Call the model's own `apply_weight_norm`, where there is one, and draw new gains."""
    for module in _outermost(model, "apply_weight_norm"):
        module.apply_weight_norm()  # type: ignore[operator]
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for tensor in parametrized_names(module):
                gains: Any = module.parametrizations[tensor]  # type: ignore[index]
                gains.original0.mul_(torch.rand_like(gains.original0) + 0.5)
            for tensor in hooked_names(module):
                getattr(module, f"{tensor}_g").mul_(1.5)


def normed(model: nn.Module) -> int:
    """Count the tensors under torch's weight norm."""
    return sum(len(hooked_names(m)) + len(parametrized_names(m)) for m in model.modules())


def remove_(model: nn.Module) -> bool:
    """Call the model's own `remove_weight_norm`; False where there is none."""
    found = list(_outermost(model, "remove_weight_norm"))
    for module in found:
        module.remove_weight_norm()  # type: ignore[operator]
    return bool(found)
