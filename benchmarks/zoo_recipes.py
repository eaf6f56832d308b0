"""How the model of each of transformers' modelling files with BatchNorm is made and called.

Sizes that only repeat (layers, image size) are cut down; the norms and what is around them stay as the
library has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FOLDERS", "NOT_MADE", "RECIPES", "Recipe"]

_SIZES = (64, 96, 128, 160, 224, 256, 384)
_RESNET = {
    "model_type": "resnet",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [64, 96, 128, 160],
    "embedding_size": 32,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


@dataclass(frozen=True)
class Recipe:
    """How the model of a modelling file is made and called.

    Args:
        head: the class, the one of the file that has the most norms.
        inputs: which of the kinds of `zoo_transformers.calls` it takes.
        config: what differs from the default config.
        sizes: image sizes to try, the smallest first.
        shrink: cut the number of layers.
        part: the submodule to take, where the class itself has no forward.
    """

    head: str
    inputs: str = "pixels"
    config: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = _SIZES
    shrink: bool = True
    part: str = ""


def _vit(**more: Any) -> dict[str, Any]:
    return {"image_size": 64, **more}


_DINO = {
    "model_type": "dinov2",
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
}
_INTRACLASS: dict[str, Any] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
for _name, _pad in zip(("long", "mid", "short"), (3, 2, 1), strict=True):
    _length = 2 * _pad + 1
    _INTRACLASS |= {
        f"vertical_long_to_small_conv_{_name}ratio": [[_length, 1], [1, 1], [_pad, 0]],
        f"horizontal_small_to_long_conv_{_name}ratio": [[1, _length], [1, 1], [0, _pad]],
        f"symmetric_conv_long_{_name}ratio": [[_length, _length], [1, 1], [_pad, _pad]],
    }
_SERVER_DET = {
    "intraclass_block_config": _INTRACLASS,
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
_LCNET = {
    "model_type": "pp_lcnet_v4",
    "block_configs": [
        [[3, 96, 96, 1, True]],
        [[3, 96, 96, 2, False], [3, 96, 96, 1, False]],
        [[3, 96, 192, 2, False], [3, 192, 192, 1, True]],
        [[3, 192, 384, 2, False], [3, 384, 384, 1, True]],
    ],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_TAPS = {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]}

RECIPES: dict[str, Recipe] = {
    "align": Recipe("AlignModel", "text and pixels"),
    "beit": Recipe("BeitForSemanticSegmentation", config=_vit(**_TAPS), shrink=False),
    "clap": Recipe("ClapModel", "text and spectrogram", {"audio_config": {"depths": [1, 1, 1, 1]}}),
    "conditional_detr": Recipe("ConditionalDetrForSegmentation"),
    "cvt": Recipe("CvtForImageClassification"),
    "d_fine": Recipe("DFineForObjectDetection"),
    "dab_detr": Recipe("DabDetrForObjectDetection"),
    "data2vec_vision": Recipe(
        "Data2VecVisionForSemanticSegmentation",
        config=_vit(num_hidden_layers=4, out_indices=[1, 2, 3, 4]),
        shrink=False,
    ),
    "deformable_detr": Recipe("DeformableDetrForObjectDetection"),
    "deimv2": Recipe("Deimv2ForObjectDetection"),
    "depth_pro": Recipe(
        "DepthProForDepthEstimation",
        config={
            "patch_size": 64,
            "intermediate_hook_ids": [3, 1],
            "use_batch_norm_in_fusion_residual": True,
            **dict.fromkeys(
                ("image_model_config", "patch_model_config", "fov_model_config"), _DINO
            ),
        },
        sizes=(256,),
        shrink=False,
    ),
    "detr": Recipe("DetrForSegmentation"),
    "dpt": Recipe(
        "DPTForSemanticSegmentation",
        config=_vit(
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            use_batch_norm_in_fusion_residual=True,
        ),
        shrink=False,
    ),
    "efficientloftr": Recipe("EfficientLoFTRForKeypointMatching", "pairs of pictures"),
    "efficientnet": Recipe("EfficientNetForImageClassification", config={"depth_coefficient": 1.0}),
    "emu3": Recipe("Emu3VQVAE", "frames", part="encoder"),
    "fastspeech2_conformer": Recipe("FastSpeech2ConformerModel", "text", shrink=False),
    "glpn": Recipe("GLPNForDepthEstimation"),
    "granite_speech": Recipe("GraniteSpeechCTCEncoder", "states of 160"),
    "granite_speech5": Recipe("GraniteSpeech5ForCTC", "spectrogram of 320"),
    "granite_speech_plus": Recipe("GraniteSpeechPlusCTCEncoder", "states of 160"),
    "grounding_dino": Recipe(
        "GroundingDinoForObjectDetection", "text and pixels", {"backbone_config": _RESNET}
    ),
    "groupvit": Recipe("GroupViTModel", "text and pixels", shrink=False),
    "hgnet_v2": Recipe("HGNetV2ForImageClassification"),
    "hubert": Recipe("HubertModel", "sound", {"conv_pos_batch_norm": True}),
    "informer": Recipe("InformerForPrediction", "series with dates", {"prediction_length": 8}),
    "lasr": Recipe("LasrForCTC", "spectrogram of 128"),
    "levit": Recipe("LevitForImageClassificationWithTeacher", shrink=False),
    "lw_detr": Recipe(
        "LwDetrForObjectDetection",
        config={
            "num_queries": 100,
            "projector_scale_factors": [1.0],
            "backbone_config": {
                "model_type": "lw_detr_vit",
                "image_size": 256,
                "hidden_size": 192,
                "num_hidden_layers": 4,
                "window_block_indices": [0, 1],
                "out_indices": [1, 2, 3, 4],
            },
        },
        sizes=(256,),
        shrink=False,
    ),
    "mask2former": Recipe(
        "Mask2FormerForUniversalSegmentation", config={"backbone_config": _RESNET}
    ),
    "maskformer": Recipe("MaskFormerForInstanceSegmentation", config={"backbone_config": _RESNET}),
    "mm_grounding_dino": Recipe(
        "MMGroundingDinoForObjectDetection", "text and pixels", {"backbone_config": _RESNET}
    ),
    "mobilenet_v1": Recipe("MobileNetV1ForImageClassification"),
    "mobilenet_v2": Recipe("MobileNetV2ForSemanticSegmentation"),
    "mobilevit": Recipe("MobileViTForSemanticSegmentation"),
    "mobilevitv2": Recipe("MobileViTV2ForSemanticSegmentation"),
    "omdet_turbo": Recipe("OmDetTurboForObjectDetection", "classes and pixels"),
    "oneformer": Recipe(
        "OneFormerForUniversalSegmentation", "task and pixels", {"backbone_config": _RESNET}
    ),
    "parakeet": Recipe("ParakeetForCTC", "spectrogram of 80"),
    "patchtsmixer": Recipe(
        "PatchTSMixerForPrediction", "series", {"norm_mlp": "BatchNorm", "context_length": 32}
    ),
    "patchtst": Recipe("PatchTSTForPrediction", "series", {"context_length": 32}),
    "perceiver": Recipe(
        "PerceiverForImageClassificationConvProcessing",
        "inputs",
        {"num_cross_attention_heads": 1, "num_self_attends_per_block": 2},
        sizes=(224,),
    ),
    "pp_doclayout_v2": Recipe(
        "PPDocLayoutV2ForObjectDetection",
        config={"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    ),
    "pp_doclayout_v3": Recipe("PPDocLayoutV3ForObjectDetection"),
    "pp_doclayout_v4": Recipe("PPDocLayoutV4ForObjectDetection"),
    "pp_lcnet": Recipe("PPLCNetForImageClassification"),
    "pp_lcnet_v3": Recipe("PPLCNetV3Backbone"),
    "pp_lcnet_v4": Recipe("PPLCNetV4Backbone"),
    "pp_ocrv5_mobile_det": Recipe("PPOCRV5MobileDetForObjectDetection"),
    "pp_ocrv5_mobile_rec": Recipe("PPOCRV5MobileRecForTextRecognition", "tall line of text"),
    "pp_ocrv5_server_det": Recipe("PPOCRV5ServerDetForObjectDetection", config=_SERVER_DET),
    "pp_ocrv5_server_rec": Recipe("PPOCRV5ServerRecForTextRecognition", "line of text"),
    "pp_ocrv6_medium_det": Recipe(
        "PPOCRV6MediumDetForObjectDetection", config={**_SERVER_DET, "backbone_config": _LCNET}
    ),
    "pp_ocrv6_small_det": Recipe(
        "PPOCRV6SmallDetForObjectDetection",
        config={"backbone_config": _LCNET, "layer_list_out_channels": [96, 96, 192, 384]},
    ),
    "pp_ocrv6_small_rec": Recipe("PPOCRV6SmallRecForTextRecognition", "line of text"),
    "pp_ocrv6_tiny_rec": Recipe("PPOCRV6TinyRecForTextRecognition", "line of text"),
    "regnet": Recipe("RegNetForImageClassification"),
    "resnet": Recipe("ResNetForImageClassification"),
    "rt_detr": Recipe("RTDetrForObjectDetection"),
    "rt_detr_resnet": Recipe("RTDetrResNetBackbone"),
    "rt_detr_v2": Recipe("RTDetrV2ForObjectDetection"),
    "sam3_lite_text": Recipe("Sam3LiteTextTextModel", "text", shrink=False),
    "seamless_m4t": Recipe("SeamlessM4TForSpeechToText", "spectrogram of 160 and text"),
    "segformer": Recipe("SegformerForSemanticSegmentation"),
    "slanet": Recipe("SLANetForTableRecognition"),
    "speecht5": Recipe("SpeechT5ForTextToSpeech", "text and mels"),
    "superglue": Recipe("SuperGlueForKeypointMatching", "pairs of pictures"),
    "swiftformer": Recipe("SwiftFormerForImageClassification"),
    "table_transformer": Recipe("TableTransformerForObjectDetection"),
    "textnet": Recipe("TextNetForImageClassification"),
    "timm_backbone": Recipe("TimmBackbone", config={"backbone": "resnet18"}),
    "upernet": Recipe("UperNetForSemanticSegmentation", config={"backbone_config": _RESNET}),
    "uvdoc": Recipe(
        "UVDocModel",
        config={
            "backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [1, 2, 3, 4, 5, 6]}
        },
    ),
    "vitmatte": Recipe(
        "VitMatteForImageMatting",
        "four channels",
        {
            "backbone_config": {
                "model_type": "vitdet",
                "image_size": 64,
                "hidden_size": 384,
                "num_channels": 4,
                "num_attention_heads": 6,
                "out_features": ["stage4"],
            },
            "fusion_hidden_sizes": [256, 128, 64, 32],
        },
        shrink=False,
    ),
    "vitpose": Recipe(
        "VitPoseForPoseEstimation",
        "upright",
        {
            "use_simple_decoder": False,
            "backbone_config": {
                "model_type": "vitpose_backbone",
                "image_size": [64, 48],
                "num_hidden_layers": 2,
                "out_indices": [2],
            },
        },
    ),
    "wav2vec2_conformer": Recipe("Wav2Vec2ConformerModel", "sound"),
    "zoedepth": Recipe(
        "ZoeDepthForDepthEstimation",
        config={
            "use_batch_norm_in_fusion_residual": True,
            "backbone_config": {
                "model_type": "beit",
                "image_size": 64,
                "num_hidden_layers": 4,
                "hidden_size": 192,
                "num_attention_heads": 3,
                "use_relative_position_bias": True,
                "reshape_hidden_states": False,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
        },
        shrink=False,
    ),
}
NOT_MADE = {
    "layoutlmv2": "needs detectron2",
    "sapiens2": "names BatchNorm in a docstring only",
}
FOLDERS = {"data2vec_vision": "data2vec", "rt_detr_resnet": "rt_detr"}
"""Where a modelling file's folder has another name."""
