"""CLIP with OpenAI's modified ResNet, with the text tower, the methods and the outputs of `CLIPModel`."""

import math
from itertools import chain

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPProcessor,
    CLIPTextModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput, CLIPPreTrainedModel, image_text_contrastive_loss

from clipmap_hf.models.clip_resnet.config import CLIPResNetConfig
from clipmap_hf.models.clip_resnet.tower import AttentionPool, ModifiedResNet


__all__ = ["CLIPResNetModel"]


class CLIPResNetModel(CLIPPreTrainedModel):
    """
    CLIP with OpenAI's modified ResNet. The attention pool ends in the joint embedding, so there is no
    `visual_projection`; all else is a `CLIPModel`'s.

    Args:
        config: Its config.
    """

    config: CLIPResNetConfig
    config_class = CLIPResNetConfig

    def __init__(self, config: CLIPResNetConfig):
        super().__init__(config)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.vision_model = ModifiedResNet(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws the weights of a module of a new model, as OpenAI's code does."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_uniform_(module.weight, a=math.sqrt(5))  # torch's default
        elif isinstance(module, AttentionPool):
            std = module.c_proj.in_features**-0.5
            initialization.normal_(module.positional_embedding, std=std)
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.c_proj):
                initialization.normal_(linear.weight, std=std)
        elif isinstance(module, CLIPResNetModel):
            for block in chain(*module.vision_model.stages):
                initialization.zeros_(block.bn3.weight)  # so that a new block adds nothing
            std = module.config.text_config.hidden_size**-0.5 * module.config.initializer_factor
            initialization.normal_(module.text_projection.weight, std=std)

    def get_image_features(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """
        Embeds images.

        Args:
            pixel_values: `(images, channels, image_size, image_size)`.
            output_hidden_states: Whether to return what the stem and each stage write, too.

        Returns:
            The embeddings `(images, projection_dim)`, not normalized, as `pooler_output`.

        Raises:
            ValueError: If the images have another size than the model's.
        """
        return self.vision_model(pixel_values, output_hidden_states)

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:
        """
        Embeds texts.

        Args:
            input_ids: `(texts, length)`.
            attention_mask: 1 for tokens, 0 for padding, `(texts, length)`.
            position_ids: The position of each token, `(texts, length)`; by default they are counted.
            output_hidden_states: Whether to return what each layer writes, too.

        Returns:
            The embeddings `(texts, projection_dim)`, not normalized, as `pooler_output`.
        """
        output = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_hidden_states=output_hidden_states,
        )
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool = False,
        output_hidden_states: bool = False,
    ) -> CLIPOutput:
        """
        Compares images with texts.

        Args:
            input_ids: `(texts, length)`.
            pixel_values: `(images, channels, image_size, image_size)`.
            attention_mask: 1 for tokens, 0 for padding, `(texts, length)`.
            position_ids: The position of each token, `(texts, length)`; by default they are counted.
            return_loss: Whether to compute the contrastive loss of pairs, too.
            output_hidden_states: Whether both towers return what their layers write, too.

        Returns:
            The normalized embeddings, and the logits of all images and texts.

        Raises:
            ValueError: If the images have another size than the model's.
        """
        vision = self.get_image_features(pixel_values, output_hidden_states)
        text = self.get_text_features(input_ids, attention_mask, position_ids, output_hidden_states)
        image_embeds, text_embeds = (
            found.pooler_output / found.pooler_output.norm(dim=-1, keepdim=True) for found in (vision, text)
        )
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        return CLIPOutput(
            loss=image_text_contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


def _register() -> None:
    """Makes `AutoModel`, the pipeline's class for zero-shot classification, and `AutoProcessor` know the model."""
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        auto.register(CLIPResNetConfig, CLIPResNetModel, exist_ok=True)
    AutoProcessor.register(CLIPResNetConfig, CLIPProcessor, exist_ok=True)


_register()
