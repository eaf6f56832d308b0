"""Small models of transformers that compute weights, as folders; most of them speak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from normconv.sources.hf_folder import quiet_transformers

_VOCODER: dict[str, Any] = {
    "upsample_initial_channel": 16,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
}


def _encodec() -> Any:
    config = transformers.EncodecConfig(
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        codebook_dim=16,
        upsampling_ratios=[2, 2],
        num_residual_layers=1,
        num_lstm_layers=1,
        target_bandwidths=[48.0],
        sampling_rate=4000,
    )
    return transformers.EncodecModel(config)


def _wav2vec2() -> Any:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        vocab_size=8,
    )
    return transformers.Wav2Vec2Model(config)


def _hifigan() -> Any:
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(model_in_dim=8, **_VOCODER)
    )


def _vits() -> Any:
    config = transformers.VitsConfig(
        hidden_size=16,
        vocab_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=16,
        spectrogram_bins=9,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=2,
        duration_predictor_num_flows=2,
        duration_predictor_filter_channels=16,
        depth_separable_num_layers=1,
        **_VOCODER,
    )
    return transformers.VitsModel(config)


def _bit() -> Any:
    config = transformers.BitConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2, stem_kernel_size=3
    )
    return transformers.BitModel(config)


_MAKE: dict[str, Callable[[], Any]] = {
    "encodec": _encodec,
    "wav2vec2": _wav2vec2,
    "hifigan": _hifigan,
    "vits": _vits,
    "bit": _bit,
}


def tiny(name: str) -> Any:
    """Make a model whose weight norms have gains of their own, as training leaves them."""
    torch.manual_seed(0)
    model = _MAKE[name]().eval()
    spread_gains_(model)
    return model


def spread_gains_(model: Any) -> None:
    """Make ‖v‖ differ from g."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("original0"):
                parameter.mul_(torch.rand(parameter.shape) + 0.5)


def inputs_of(name: str) -> dict[str, Tensor]:
    """Return keyword inputs for a model of `tiny`."""
    generator = torch.Generator().manual_seed(1)
    if name == "vits":
        return {"input_ids": torch.randint(1, 12, (2, 5), generator=generator)}
    if name == "hifigan":
        return {"spectrogram": torch.randn(2, 6, 8, generator=generator)}
    if name == "bit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    shape = {"encodec": (2, 1, 64), "wav2vec2": (2, 400)}[name]
    return {"input_values": torch.randn(shape, generator=generator)}


def save_tiny(name: str, folder: Path, model: Any = None) -> Path:
    """Write it as `save_pretrained` does."""
    with quiet_transformers():
        (tiny(name) if model is None else model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"sampling_rate": 4000}')
    return folder
