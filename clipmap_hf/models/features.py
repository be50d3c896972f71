"""Reads CLIP's outputs, as no other module does: normalized embeddings and logit scale, fp32 under any autocast."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


__all__ = [
    "ClipFeatures",
    "Towers",
    "encode_images",
    "encode_texts",
    "evaluating",
    "project_images",
    "project_texts",
]


@dataclass(frozen=True)
class ClipFeatures:
    """
    What every loss and metric reads.

    Args:
        image_embeds: Normalized image embeddings of shape `(images, projection_dim)`, fp32.
        text_embeds: Normalized text embeddings of shape `(texts, projection_dim)`, fp32.
        logit_scale: The reciprocal temperature (not its logarithm), a scalar.
        hidden_errors: Of each pair, how far hidden states are from a teacher's, `(images,)`; only for the hidden loss.
        logit_bias: What SigLIP adds to all logits, a scalar.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    logit_scale: torch.Tensor
    hidden_errors: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None

    @staticmethod
    def embeds(output) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the normalized embeddings of a `CLIPOutput`'s images and texts, fp32."""
        # Normalized again: under autocast, CLIP's own norm is only as exact as bf16.
        return tuple(F.normalize(x.float(), dim=-1) for x in (output.image_embeds, output.text_embeds))

    @classmethod
    def from_output(cls, output, logit_scale: torch.Tensor, logit_bias: torch.Tensor | None = None) -> "ClipFeatures":
        """Reads a `CLIPOutput`, the model's logarithmic `logit_scale` and, if it has one, its `logit_bias`."""
        return cls(*cls.embeds(output), logit_scale.float().exp(), logit_bias=logit_bias)

    def logits_per_image(self) -> torch.Tensor:
        """Computes scaled cosine similarities `(images, texts)`, plus the bias if there is one."""
        with torch.autocast(self.image_embeds.device.type, enabled=False):
            logits = self.logit_scale * self.image_embeds @ self.text_embeds.T
            return logits if self.logit_bias is None else logits + self.logit_bias


def project_images(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Embeds `pixel_values` `(batch, 3, height, width)` as `(batch, projection_dim)`, not normalized."""
    return model.get_image_features(pixel_values=pixel_values).pooler_output


def project_texts(model: nn.Module, **tokens: torch.Tensor) -> torch.Tensor:
    """Embeds `input_ids` and `attention_mask` `(batch, length)` as `(batch, projection_dim)`, not normalized."""
    return model.get_text_features(**tokens).pooler_output


def encode_images(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Embeds `pixel_values` `(batch, 3, height, width)` as `(batch, projection_dim)`, normalized, fp32."""
    return F.normalize(project_images(model, pixel_values).float(), dim=-1)


def encode_texts(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Embeds token ids and mask `(batch, length)` as `(batch, projection_dim)`, normalized, fp32."""
    return F.normalize(project_texts(model, input_ids=input_ids, attention_mask=attention_mask).float(), dim=-1)


@dataclass(frozen=True)
class Towers:
    """
    Both towers of a model as functions, whatever runs them.

    Args:
        images: From `pixel_values` to normalized embeddings, as `encode_images`.
        texts: From `input_ids` and `attention_mask` to normalized embeddings, as `encode_texts`.
        device: Where both take their inputs.
    """

    images: Callable[[torch.Tensor], torch.Tensor]
    texts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    device: torch.device

    @classmethod
    def of_model(cls, model: nn.Module) -> "Towers":
        """Takes the towers of a `CLIPModel`, in the mode it is in."""
        return cls(partial(encode_images, model), partial(encode_texts, model), next(model.parameters()).device)

    def passes(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
        """Returns a function for each tower, `vision` and `text`, that embeds the batch when it is called."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return {
            "vision": partial(self.images, batch["pixel_values"]),
            "text": partial(self.texts, batch["input_ids"], batch["attention_mask"]),
        }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, and afterwards back in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
