"""Converts between the configs of `CLIPModel` or `CLIPResNetModel` and open_clip's: sizes and preprocessing."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, CLIPImageProcessorPil, PretrainedConfig

from clipmap_hf.models.clip_resnet.config import MODEL_TYPE, CLIPResNetConfig


__all__ = ["clip_config", "clip_image_processor", "open_clip_config"]

_ACTIVATIONS = {"gelu": False, "quick_gelu": True}  # open_clip has one flag for both towers
_INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
_EPSILON = 1e-5  # the epsilon of LayerNorms, unless open_clip's config gives another value
# The keys of open_clip's config that are read here. Any other key changes the architecture, unless its value is off.
_KEYS = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "norm_kwargs"},
    "vision_cfg of a ResNet": {"image_size", "layers", "width", "head_width"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
    | {"pool_type", "eos_id", "pad_id", "hf_tokenizer_name"},
    "preprocess_cfg": {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"},
}


def open_clip_config(config: PretrainedConfig, image_processor: Any, tokenizer_name: str) -> dict[str, Any]:
    """
    Makes the content of `open_clip_config.json`.

    Args:
        config: Config of a `CLIPModel` or `CLIPResNetModel`.
        image_processor: The model's image processor.
        tokenizer_name: Hub id or folder where open_clip finds the tokenizer.

    Raises:
        ValueError: If open_clip cannot express the model or its preprocessing.
    """
    vision, text = config.vision_config, config.text_config
    types = ("clip", MODEL_TYPE)
    _refuse(config.model_type not in types, f"a model of type {config.model_type!r}", f"one of {types}")
    activations = [tower.hidden_act for tower in (vision, text) if hasattr(tower, "hidden_act")]  # ResNets have ReLU
    known = len(set(activations)) == 1 and activations[0] in _ACTIVATIONS
    _refuse(not known, f"hidden_act {' and '.join(map(repr, activations))}", "'gelu' or 'quick_gelu' in both towers")
    if config.model_type == MODEL_TYPE:
        vision_cfg = {"layers": list(vision.layers), "width": vision.width, "head_width": vision.head_width}
    else:
        head_width = vision.hidden_size // vision.num_attention_heads
        vision_cfg = {"patch_size": vision.patch_size, "head_width": head_width, **_transformer_cfg(vision)}
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "heads": text.num_attention_heads,
        "hf_tokenizer_name": tokenizer_name,
        **_transformer_cfg(text),
    }
    if text.eos_token_id not in (2, text.vocab_size - 1):  # both stand for the largest id, open_clip's default
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": _ACTIVATIONS[activations[0]],
            "vision_cfg": {"image_size": vision.image_size, **vision_cfg},
            "text_cfg": text_cfg,
        },
        "preprocess_cfg": _preprocess_cfg(image_processor, vision.image_size),
    }


def _transformer_cfg(tower: PretrainedConfig) -> dict[str, Any]:
    return {
        "layers": tower.num_hidden_layers,
        "width": tower.hidden_size,
        "mlp_ratio": _ratio(tower.intermediate_size, tower.hidden_size),
        **({} if tower.layer_norm_eps == _EPSILON else {"norm_kwargs": {"eps": tower.layer_norm_eps}}),
    }


def _preprocess_cfg(images: Any, size: int) -> dict[str, Any]:
    names = {number: name for name, number in _INTERPOLATIONS.items()}
    _refuse(images.resample not in names, f"resample={images.resample}", f"one of {names}")
    plain = images.do_resize and images.do_rescale and images.do_normalize
    _refuse(
        not plain, "an image processor that leaves out a step", "a processor that resizes, rescales and normalizes"
    )
    square, given = {"height": size, "width": size}, dict(images.size)
    cropped = bool(images.do_center_crop)
    expected = {"shortest_edge": size} if cropped else square
    fits = given == expected and (not cropped or dict(images.crop_size) == square)
    _refuse(not fits, f"size={given} with do_center_crop={cropped}", f"{expected}, the size of the model's images")
    return {
        "mean": list(images.image_mean),
        "std": list(images.image_std),
        "interpolation": names[images.resample],
        "resize_mode": "shortest" if cropped else "squash",
    }


def clip_config(values: Mapping[str, Any]) -> CLIPConfig | CLIPResNetConfig:
    """
    Makes the config of the `CLIPModel` or `CLIPResNetModel` that equals an open_clip model. The start token is set to
    the second-largest id, and texts are padded with their end token, as in OpenAI's vocabulary. Neither changes an
    embedding.

    Args:
        values: The content of `open_clip_config.json`.

    Raises:
        ValueError: If neither class can express the model, or a key of the config is not known here.
    """
    model = _check_keys(values["model_cfg"], "model_cfg")
    is_resnet = isinstance(model["vision_cfg"]["layers"], list)
    vision = _check_keys(model["vision_cfg"], "vision_cfg of a ResNet" if is_resnet else "vision_cfg")
    text = _check_keys(model["text_cfg"], "text_cfg")
    pool, last = text.get("pool_type", "argmax"), text["vocab_size"] - 1
    end = {"argmax": last, "eos": text.get("eos_id", 2)}.get(pool)
    # CLIPConfig treats the end token 2 as the largest id.
    allowed = "'argmax', or 'eos' with another id than 2"
    _refuse(end is None or end == 2, f"pool_type={pool!r} at the id {end}", allowed)
    ours = {"image_size": vision["image_size"]}
    if is_resnet:
        ours |= {name: vision[name] for name in ("width", "layers", "head_width") if name in vision}
    else:
        heads = vision["width"] // vision.get("head_width", 64)
        ours |= {"num_attention_heads": heads, "patch_size": vision["patch_size"], **_transformer(vision, model)}
    words = {
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "bos_token_id": last - 1,
        "eos_token_id": end,
        "pad_token_id": end,
        **_transformer(text, model),
    }
    make = CLIPResNetConfig if is_resnet else CLIPConfig
    try:
        return make(vision_config=ours, text_config=words, projection_dim=model["embed_dim"])
    except StrictDataclassError as error:
        raise ValueError(f"The open_clip_config.json is not valid. {error}") from error


def _transformer(tower: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower.get("mlp_ratio", 4.0)),
        "num_hidden_layers": tower["layers"],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", _EPSILON),
        "projection_dim": model["embed_dim"],
    }


def clip_image_processor(values: Mapping[str, Any]) -> CLIPImageProcessorPil:
    """
    Makes the image processor of an open_clip model.

    Args:
        values: The content of `open_clip_config.json`.

    Raises:
        ValueError: If `CLIPImageProcessor` does not support the preprocessing.
    """
    given = _check_keys(values["preprocess_cfg"], "preprocess_cfg")
    size = values["model_cfg"]["vision_cfg"]["image_size"]
    mode, interpolation = given.get("resize_mode", "shortest"), given.get("interpolation", "bicubic")
    _refuse(mode not in ("shortest", "squash"), f"resize_mode={mode!r}", "'shortest' or 'squash'")
    _refuse(
        interpolation not in _INTERPOLATIONS, f"interpolation={interpolation!r}", f"one of {list(_INTERPOLATIONS)}"
    )
    _refuse(
        given.get("size", size) not in (size, [size, size]), f"size={given.get('size')}", f"{size} as in vision_cfg"
    )
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": size} if mode == "shortest" else square,
        crop_size=square,
        do_center_crop=mode == "shortest",
        resample=_INTERPOLATIONS[interpolation],
        **{f"image_{name}": list(given[name]) for name in ("mean", "std") if name in given},
    )


def _check_keys(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the values, after a check that this module reads all keys whose values are not off."""
    unknown = {key: value for key, value in values.items() if key not in _KEYS[name] and value not in (None, False)}
    _refuse(bool(unknown), f"{name} with {unknown}", f"a mapping with no other keys than {sorted(_KEYS[name])}")
    return values


def _refuse(condition: bool, given: str, allowed: str) -> None:
    """Raises a `ValueError` if the condition holds."""
    if condition:
        raise ValueError(f"{given} cannot be converted between transformers and open_clip; it must be {allowed}.")


def _ratio(size: int, width: int) -> float:
    """Returns the ratio that open_clip multiplies with the width, and rounds down, to get the size."""
    ratio = size / width
    return ratio if int(width * ratio) == size else math.nextafter(ratio, math.inf)
