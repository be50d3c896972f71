"""Converts between transformers' `CLIPModel` and open_clip: names of tensors, config and preprocessing."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, PretrainedConfig


__all__ = ["clip_config", "clip_image_processor", "clip_tensors", "open_clip_config", "open_clip_tensors"]

_ACTIVATIONS = {"gelu": False, "quick_gelu": True}  # open_clip has one flag for both towers
_INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
_EPSILON = 1e-5  # the epsilon of LayerNorms, unless open_clip's config gives another value
_TOWERS = {"vision": ("vision_model", "visual.transformer"), "text": ("text_model", "transformer")}
_OUTSIDE_LAYERS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_IN_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# The keys of open_clip's config that are read here. Any other key changes the architecture, unless its value is off.
_KEYS = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "norm_kwargs"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
    | {"pool_type", "eos_id", "pad_id", "hf_tokenizer_name"},
    "preprocess_cfg": {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"},
}


def open_clip_tensors(tensors: Mapping[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """
    Converts a `CLIPModel`'s tensors to open_clip's names. Query, key and value are concatenated, and projections are
    transposed.

    Args:
        tensors: The model's state dict.
        config: The model's config.

    Raises:
        ValueError: If a tensor is missing or unknown.
    """
    rows = list(_pair_names(config))
    _check_names(tensors, {name for ours, _, _ in rows for name in ours})
    converted = {}
    for ours, theirs, transposed in rows:
        tensor = torch.cat([tensors[name] for name in ours]) if len(ours) > 1 else tensors[ours[0]]
        converted[theirs] = (tensor.T if transposed else tensor).contiguous()
    return converted


def clip_tensors(tensors: Mapping[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Converts open_clip's tensors back: the inverse of `open_clip_tensors`. `config` is that of the `CLIPModel`."""
    layers = config.vision_config.num_hidden_layers + config.text_config.num_hidden_layers
    if layers > len(tensors):
        raise ValueError(f"The config says {layers} layers, but there are {len(tensors)} tensors in all.")
    rows = list(_pair_names(config))
    _check_names(tensors, {theirs for _, theirs, _ in rows})
    converted = {}
    for ours, theirs, transposed in rows:
        tensor = tensors[theirs].T if transposed else tensors[theirs]
        parts = tensor.chunk(len(ours)) if len(ours) > 1 else [tensor]
        converted |= zip(ours, (part.clone(memory_format=torch.contiguous_format) for part in parts), strict=True)
    return converted


def _pair_names(config: PretrainedConfig) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yields names in transformers, the name of their common tensor in open_clip, and whether it is transposed."""
    for ours, theirs in _OUTSIDE_LAYERS.items():
        yield (ours,), theirs, False
    for ours, theirs in _TRANSPOSED.items():
        yield (ours,), theirs, True
    for tower, (own, other) in _TOWERS.items():
        for layer in range(getattr(config, f"{tower}_config").num_hidden_layers):
            here, there = f"{own}.encoder.layers.{layer}", f"{other}.resblocks.{layer}"
            for kind in ("weight", "bias"):
                for ours, theirs in _IN_LAYERS.items():
                    yield (f"{here}.{ours}.{kind}",), f"{there}.{theirs}.{kind}", False
                fused = tuple(f"{here}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
                yield fused, f"{there}.attn.in_proj_{kind}", False


def _check_names(found: Mapping[str, torch.Tensor], expected: set[str]) -> None:
    missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or unknown:
        problems = " and ".join(
            f"{len(names)} are {problem}, such as {names[:5]}"
            for problem, names in (("missing", missing), ("unknown", unknown))
            if names
        )
        raise ValueError(
            f"The tensors do not fit a CLIP with the config's number of layers: {problems}. Only plain ViT towers can "
            "be converted."
        )


def open_clip_config(config: PretrainedConfig, image_processor: Any, tokenizer_name: str) -> dict[str, Any]:
    """
    Makes the content of `open_clip_config.json`.

    Args:
        config: Config of a `CLIPModel`.
        image_processor: The model's image processor.
        tokenizer_name: Hub id or folder where open_clip finds the tokenizer.

    Raises:
        ValueError: If open_clip cannot express the model or its preprocessing.
    """
    vision, text = config.vision_config, config.text_config
    _refuse(config.model_type != "clip", f"a model of type {config.model_type!r}", "'clip'")
    activation = vision.hidden_act
    known = activation == text.hidden_act and activation in _ACTIVATIONS
    _refuse(not known, f"hidden_act {activation!r} and {text.hidden_act!r}", "'gelu' or 'quick_gelu' in both towers")
    sizes = {
        name: {
            "layers": tower.num_hidden_layers,
            "width": tower.hidden_size,
            "mlp_ratio": _ratio(tower.intermediate_size, tower.hidden_size),
            **({} if tower.layer_norm_eps == _EPSILON else {"norm_kwargs": {"eps": tower.layer_norm_eps}}),
        }
        for name, tower in (("vision", vision), ("text", text))
    }
    vision_cfg = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        **sizes["vision"],
    }
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "heads": text.num_attention_heads,
        "hf_tokenizer_name": tokenizer_name,
        **sizes["text"],
    }
    if text.eos_token_id not in (2, text.vocab_size - 1):  # both stand for the largest id, open_clip's default
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": _ACTIVATIONS[activation],
            "vision_cfg": vision_cfg,
            "text_cfg": text_cfg,
        },
        "preprocess_cfg": _preprocess_cfg(image_processor, vision.image_size),
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


def clip_config(values: Mapping[str, Any]) -> CLIPConfig:
    """
    Makes the config of the `CLIPModel` that equals an open_clip model. The start token is set to the second-largest
    id, and texts are padded with their end token, as in OpenAI's vocabulary. Neither changes an embedding.

    Args:
        values: The content of `open_clip_config.json`.

    Raises:
        ValueError: If `CLIPModel` cannot express the model, or a key of the config is not known here.
    """
    model = _check_keys(values["model_cfg"], "model_cfg")
    vision, text = _check_keys(model["vision_cfg"], "vision_cfg"), _check_keys(model["text_cfg"], "text_cfg")
    _refuse(not isinstance(vision["layers"], int), f"vision_cfg.layers={vision['layers']}", "a number, as in a ViT")
    pool, last = text.get("pool_type", "argmax"), text["vocab_size"] - 1
    end = {"argmax": last, "eos": text.get("eos_id", 2)}.get(pool)
    # CLIPConfig treats the end token 2 as the largest id.
    allowed = "'argmax', or 'eos' with another id than 2"
    _refuse(end is None or end == 2, f"pool_type={pool!r} at the id {end}", allowed)
    towers = {
        name: {
            "hidden_size": tower["width"],
            "intermediate_size": int(tower["width"] * tower.get("mlp_ratio", 4.0)),
            "num_hidden_layers": tower["layers"],
            "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", _EPSILON),
            "projection_dim": model["embed_dim"],
        }
        for name, tower in (("vision", vision), ("text", text))
    }
    towers["vision"] |= {
        "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
    }
    towers["text"] |= {
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "bos_token_id": last - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return CLIPConfig(vision_config=towers["vision"], text_config=towers["text"], projection_dim=model["embed_dim"])


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
        raise ValueError(f"{given} cannot be converted between CLIPModel and open_clip; it must be {allowed}.")


def _ratio(size: int, width: int) -> float:
    """Returns the ratio that open_clip multiplies with the width, and rounds down, to get the size."""
    ratio = size / width
    return ratio if int(width * ratio) == size else math.nextafter(ratio, math.inf)
