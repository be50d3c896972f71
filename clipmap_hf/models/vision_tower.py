"""A CLIP's vision tower alone, as transformers' class for it, and put together with another model's text tower."""

import copy

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel


__all__ = ["VISION_TOWERS", "check_vision_tower", "vision_tower", "with_vision"]

# By the type of the whole model; SigLIP and Chinese CLIP have no such class in transformers.
_CLASSES = {"clip": "CLIPVisionModelWithProjection", "metaclip_2": "MetaClip2VisionModelWithProjection"}
VISION_TOWERS = {
    getattr(transformers, name).config_class.model_type: getattr(transformers, name) for name in _CLASSES.values()
}


def check_vision_tower(config: PretrainedConfig) -> None:
    """
    Checks that transformers has a class for the vision tower of a model.

    Raises:
        ValueError: If it has none.
    """
    if config.model_type not in _CLASSES:
        raise ValueError(
            f"transformers has no vision tower with a projection for models of type {config.model_type!r}, so labels "
            f"make no student of them; they do of {sorted(_CLASSES)}."
        )


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """
    Returns the vision tower of a model and its projection, as a model that shares their weights.

    Args:
        model: A `CLIPModel`.

    Raises:
        ValueError: If transformers has no class for it.
    """
    check_vision_tower(model.config)
    config = copy.deepcopy(model.config.vision_config)
    config.projection_dim = model.config.projection_dim
    with torch.device("meta"):
        tower = getattr(transformers, _CLASSES[model.config.model_type])(config)
    tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection
    return tower.train(model.training)


def with_vision(model: PreTrainedModel, vision: PreTrainedModel) -> PreTrainedModel:
    """
    Returns a copy of a model with the vision tower of another, whose weights it shares.

    Args:
        model: A `CLIPModel`, whose text tower and logit scale are copied.
        vision: Another one, or a vision tower alone.

    Raises:
        ValueError: If their joint embeddings are not equally wide.
    """
    widths = [one.visual_projection.out_features for one in (model, vision)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"The image embeddings of a student for labels are compared with its teacher's text embeddings, but it "
            f"has {widths[1]} dimensions and the teacher {widths[0]}. Leave projection_dim as the teacher's."
        )
    whole = copy.deepcopy(model)
    whole.config.vision_config = copy.deepcopy(getattr(vision.config, "vision_config", vision.config))
    whole.vision_model, whole.visual_projection = vision.vision_model, vision.visual_projection
    return whole
