"""The config of CLIP with OpenAI's modified ResNet, registered in transformers as the model type `clip_resnet`."""

import importlib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

# No more of transformers than that: this is imported while transformers' own modules are half imported.
from transformers.models.auto.configuration_auto import AutoConfig


__all__ = ["MODEL_TYPE", "CLIPResNetConfig", "CLIPResNetVisionConfig", "register"]

MODEL_TYPE = "clip_resnet"
_TEXT = "clip_text_model"
_STAGES = 4
_EXPANSION = 4  # of a bottleneck: what it writes is so many times as wide as what it computes
_STRIDE = 32  # pixels between two places that the attention pool sees


@strict
class CLIPResNetVisionConfig(PreTrainedConfig):
    """
    The config of the vision tower.

    Attributes:
        width: Channels behind the stem; those of RN50 are 64 (TinyCLIP's RN-30M: 56, RN-19M: 44).
        layers: Bottlenecks of each of the four stages.
        head_width: Channels of a head of the attention pool.
        num_channels: Channels of an image.
        image_size: Height and width of an image.
        projection_dim: Width of the joint embedding, which the attention pool writes.

    Raises:
        ValueError: If there are other than four stages, the heads do not divide the attention pool, or the images are
            no multiple of 32 pixels.
    """

    model_type = f"{MODEL_TYPE}_vision_model"
    base_config_key = "vision_config"

    width: int = 64
    layers: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    head_width: int = 64
    num_channels: int = 3
    image_size: int = 224
    projection_dim: int = 1024

    def __post_init__(self, **kwargs: Any):
        self.layers = list(self.layers)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels that the last stage writes and the attention pool reads."""
        return self.stage_widths[-1] * _EXPANSION

    @property
    def num_hidden_layers(self) -> int:
        """Bottlenecks of all stages."""
        return sum(self.layers)

    @property
    def num_attention_heads(self) -> int:
        """Heads of the attention pool."""
        return self.hidden_size // self.head_width

    @property
    def stem_widths(self) -> list[int]:
        """Channels that each convolution of the stem writes."""
        return [self.width // 2, self.width // 2, self.width]

    @property
    def stage_widths(self) -> list[int]:
        """Channels within the bottlenecks of each stage."""
        return [self.width * 2**stage for stage in range(_STAGES)]

    @property
    def stream_widths(self) -> list[int]:
        """Channels that each stage writes."""
        return [width * _EXPANSION for width in self.stage_widths]

    @property
    def grid(self) -> int:
        """Places along an edge of the image that the attention pool sees."""
        return self.image_size // _STRIDE

    def validate_architecture(self) -> None:
        """Checks that there is such a tower; part of the validation of `strict`."""
        if len(self.layers) != _STAGES or min(self.layers) < 1:
            raise ValueError(f"layers={self.layers} must be {_STAGES} numbers of at least 1, such as [3, 4, 6, 3].")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width={self.width} must be even and at least 2: the stem begins with half of it.")
        if self.head_width < 1 or self.hidden_size % self.head_width:
            raise ValueError(
                f"head_width={self.head_width} does not divide the {self.hidden_size} channels of the attention pool "
                f"({_STRIDE} times width={self.width})."
            )
        if self.image_size < _STRIDE or self.image_size % _STRIDE:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {_STRIDE} pixels.")


@strict
class CLIPResNetConfig(PreTrainedConfig):
    """
    The config of a `CLIPResNetModel`.

    Attributes:
        text_config: That of the text tower, a `CLIPTextConfig` or its values by name.
        vision_config: That of the vision tower, a `CLIPResNetVisionConfig` or its values by name.
        projection_dim: Width of the joint embedding, which the towers' configs get too.
        logit_scale_init_value: The logarithm of the reciprocal temperature that a new model has.
        initializer_factor: A factor of the spread of a new model's text weights.

    Raises:
        ValueError: If the text tower is not CLIP's.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults = {
        "vision_config": CLIPResNetVisionConfig,
        "text_config": SubConfigSpec(AutoConfig, _TEXT),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | CLIPResNetVisionConfig | None = None
    projection_dim: int = 1024
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        # Whoever has a config may look for its model: that module registers it.
        importlib.import_module("clipmap_hf.models.clip_resnet.model")
        if self.text_config.model_type != _TEXT:
            raise ValueError(
                f"text_config is of the type {self.text_config.model_type!r}; the text tower must be {_TEXT!r}."
            )
        for tower in (self.vision_config, self.text_config):
            tower.projection_dim = self.projection_dim


def register() -> None:
    """Makes `AutoConfig` know the config."""
    AutoConfig.register(MODEL_TYPE, CLIPResNetConfig, exist_ok=True)
    AutoConfig.register(CLIPResNetVisionConfig.model_type, CLIPResNetVisionConfig, exist_ok=True)


register()  # `clipmap_hf` cannot call it while this module is still being imported
