"""Names of a CLIP's tensors in transformers and in open_clip, and the conversion of a state dict between them."""

from collections.abc import Iterator, Mapping

import torch
from transformers import PretrainedConfig

from clipmap_hf.models.clip_resnet.config import MODEL_TYPE
from clipmap_hf.models.clip_resnet.tower import ModifiedResNet


__all__ = ["clip_tensors", "open_clip_tensors"]

_TOWERS = {"vision": ("vision_model", "visual.transformer"), "text": ("text_model", "transformer")}
_VISION = {  # of a ViT, outside its layers
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_OTHERS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
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
_COUNT = ".num_batches_tracked"  # of a BatchNorm; torch loads weights without it, and sets it to zero


def open_clip_tensors(tensors: Mapping[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """
    Converts a `CLIPModel`'s or `CLIPResNetModel`'s tensors to open_clip's names. Of transformers, query, key and value
    are concatenated, and projections are transposed.

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
    """Converts open_clip's tensors back: the inverse of `open_clip_tensors`. `config` is that of the model to be."""
    layers = config.vision_config.num_hidden_layers + config.text_config.num_hidden_layers
    if layers > len(tensors):
        raise ValueError(f"The config says {layers} layers, but there are {len(tensors)} tensors in all.")
    rows = list(_pair_names(config))
    counts = (theirs for _, theirs, _ in rows if theirs.endswith(_COUNT))
    tensors = {**{name: torch.zeros((), dtype=torch.long) for name in counts}, **tensors}
    _check_names(tensors, {theirs for _, theirs, _ in rows})
    converted = {}
    for ours, theirs, transposed in rows:
        tensor = tensors[theirs].T if transposed else tensors[theirs]
        parts = tensor.chunk(len(ours)) if len(ours) > 1 else [tensor]
        converted |= zip(ours, (part.clone(memory_format=torch.contiguous_format) for part in parts), strict=True)
    return converted


def _pair_names(config: PretrainedConfig) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yields names in transformers, the name of their common tensor in open_clip, and whether it is transposed."""
    towers, names, transposed = dict(_TOWERS), _VISION | _OTHERS, dict(_TRANSPOSED)
    if config.model_type == MODEL_TYPE:  # has OpenAI's names, and no projection behind its attention pool
        del towers["vision"], transposed["visual_projection.weight"]
        with torch.device("meta"):
            own = ModifiedResNet(config.vision_config).state_dict()
        names = _OTHERS | {f"vision_model.{name}": f"visual.{name}" for name in own}
    for ours, theirs in names.items():
        yield (ours,), theirs, False
    for ours, theirs in transposed.items():
        yield (ours,), theirs, True
    for tower, (own, other) in towers.items():
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
            f"The tensors do not fit a CLIP with the config's number of layers: {problems}. Only plain ViT towers "
            "and OpenAI's ResNets can be converted."
        )
