"""The zoos' architectures: which there are, how one is made, what it is called with."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import zoo_transformers
from benchmarks.zoo_inputs import Call, Make, picture

__all__ = [
    "LIBRARIES",
    "NOT_COVERED",
    "Call",
    "build",
    "calls",
    "family_of",
    "names",
    "picture",
    "preload",
]

LIBRARIES = ("timm", "torchvision", "transformers")
NOT_COVERED = {
    "timm": "",
    "torchvision": "torchvision's quantized models, whose norms are fused already",
    "transformers": "one model per modelling file, made from a small config",
}
_NEEDED = ("normconv.api", "normconv.proof", "torch.export", "torch._dynamo", "torch.fx")
_SIZES = (64, 96, 128, 160, 224)


def preload(library: str) -> None:
    """Import the library, so that forked processes need not."""
    importlib.import_module(library)
    for name in _NEEDED:
        importlib.import_module(name)
    if library == "transformers":
        zoo_transformers.preload()


def names(library: str) -> list[str]:
    """Return every architecture of the library, with norms or without."""
    if library == "timm":
        import timm

        return list(timm.list_models())
    if library == "torchvision":
        from torchvision import models

        return [name for name in models.list_models() if "quantized" not in name]
    return zoo_transformers.names()


def family_of(library: str, name: str) -> str:
    """Return the model file that an architecture is defined in, without its package."""
    if library == "timm":
        import timm

        return str(timm.models.model_entrypoint(name).__module__).rpartition(".")[2]
    if library == "torchvision":
        from torchvision import models

        module = models.get_model_builder(name).__module__
        return str(module).removeprefix("torchvision.models.")
    return zoo_transformers.family_of(name)


def build(library: str, name: str) -> nn.Module:
    """Make an architecture with random weights, always the same ones."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            import timm

            made = timm.create_model(name, pretrained=False)
        elif library == "torchvision":
            made = _torchvision(name)
        else:
            made = zoo_transformers.build(name)
    assert isinstance(made, nn.Module)
    return made.eval()


def _torchvision(name: str) -> nn.Module:
    import inspect

    from torchvision import models

    builder = models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # slow, and the norms set every scale anew
    if ".detection." in builder.__module__:
        options |= _few_boxes(name)
    made = builder(**options)
    assert isinstance(made, nn.Module)
    return made


def _few_boxes(name: str) -> dict[str, Any]:
    """Return options under which a detector of random weights finds something, and not too much."""
    if "rcnn" in name:
        return {
            **dict.fromkeys(("min_size", "max_size"), 96),
            "rpn_pre_nms_top_n_test": 50,
            "rpn_post_nms_top_n_test": 8,
            "box_score_thresh": 0.0,
            "box_detections_per_img": 4,
        }
    sizes = {} if "ssd" in name else dict.fromkeys(("min_size", "max_size"), 96)
    return {**sizes, "score_thresh": 0.0, "detections_per_img": 10}


def calls(library: str, name: str, model: nn.Module) -> Iterator[tuple[str, Make]]:
    """Yield what the model may be called with, the smallest first: a label and how to make it."""
    if library == "transformers":
        yield from zoo_transformers.calls(name, model)
        return
    if library == "torchvision" and (special := _special(name)):
        yield special
        return
    for shape in _shapes(model):
        yield "x".join(map(str, shape)), _one_tensor(shape)


def _one_tensor(shape: tuple[int, ...]) -> Make:
    return lambda batch: Call((picture((batch, *shape)),), {})


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return input shapes to try: small squares where the size is free, else the model's own."""
    config: Any = (
        getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    )
    channels, height, width = config.get("input_size") or (3, 224, 224)
    shapes: list[tuple[int, ...]] = [(channels, height, width)]
    if not config.get("fixed_input_size"):
        shapes = [(channels, size, size) for size in _SIZES if size < height] + shapes
    if not config:
        shapes.append((channels, 299, 299))  # auxiliary heads of Inception
    return shapes


def _special(name: str) -> tuple[str, Make] | None:
    """Return the inputs of torchvision's models that do not take one image."""
    from torchvision import models

    module = models.get_model_builder(name).__module__
    if ".detection." in module:
        size = 300 if "ssd300" in name else 320 if "ssd" in name else 96
        label = f"list of 3x{size}x{size}"
        return label, lambda batch: Call((list(picture((batch, 3, size, size))),), {})
    if ".optical_flow." in module:

        def flow(batch: int) -> Call:
            pair = tuple(picture((batch, 3, 128, 128), seed) for seed in (0, 1))
            return Call(pair, {"num_flow_updates": 3})

        return "3x128x128, 3x128x128", flow
    if ".video." in module:
        shape = (3, 16, 224, 224) if name == "s3d" else (3, 8, 32, 32)
        return "x".join(map(str, shape)), _one_tensor(shape)
    return None
