"""The supported CLIP families, each described by a table of axes."""

from transformers import PretrainedConfig

from clipmap_hf.families.base import BOTH_TOWERS, Family, TensorRule, TensorSpec
from clipmap_hf.families.chinese_clip import CHINESE_CLIP
from clipmap_hf.families.clip import CLIP
from clipmap_hf.families.clip_resnet import CLIP_RESNET
from clipmap_hf.families.siglip import SIGLIP


__all__ = [
    "BOTH_TOWERS",
    "CHINESE_CLIP",
    "CLIP",
    "CLIP_RESNET",
    "FAMILIES",
    "SIGLIP",
    "Family",
    "TensorRule",
    "TensorSpec",
    "family_for",
]

FAMILIES = {
    model_type: family for family in (CHINESE_CLIP, CLIP, CLIP_RESNET, SIGLIP) for model_type in family.model_types
}


def family_for(config: PretrainedConfig) -> Family:
    """
    Returns the family that describes a model.

    Args:
        config: The model's config.

    Raises:
        ValueError: If no family describes its `model_type`.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Models of type {config.model_type!r} are not supported; supported are {sorted(FAMILIES)}. To support "
            "another, add its table of axes under clipmap_hf/families."
        )
    return FAMILIES[config.model_type]
