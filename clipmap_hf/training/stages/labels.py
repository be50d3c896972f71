"""The stage that trains a vision tower against its teachers on a fixed list of texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from clipmap_hf.data.collate import normalized_pixels
from clipmap_hf.models.features import ClipFeatures, encode_images
from clipmap_hf.models.vision_tower import vision_tower
from clipmap_hf.training.stages.base import Batch
from clipmap_hf.training.stages.distillation import DistillationStage


__all__ = ["LabelStage"]


class LabelStage(DistillationStage):
    """
    Trains the vision tower of a student. Losses compare its images with a fixed list of texts, in the embeddings that
    the first teacher has of them, and each teacher's images with that teacher's own. No text tower is run.

    Args:
        trained: The student; its text tower is frozen.
        label_embeds: Each teacher's normalized embeddings of the list, `(texts, dim)`.
        options: As in `DistillationStage`.
    """

    def __init__(self, trained: nn.Module, *, label_embeds: Sequence[torch.Tensor], **options: Any):
        super().__init__(trained, **options)
        for index, embeds in enumerate(label_embeds):
            self.register_buffer(f"label_embeds_{index}", embeds, persistent=False)

    def export(self) -> nn.Module:
        """Returns the vision tower as it stands, to write."""
        return vision_tower(self.trained)

    @staticmethod
    def encoder(
        model: nn.Module, weights: dict[str, torch.Tensor], chunk: Batch, hidden: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Encodes the images of a chunk; in place of texts, which come from the list, are the images again."""
        images = encode_images(model, normalized_pixels(chunk))
        return images, images, {}

    def _student_features(self, chunks: Sequence[Batch]) -> ClipFeatures:
        return replace(super()._student_features(chunks), text_embeds=self.label_embeds_0)

    def _teacher_features(self, chunks: Sequence[Batch]) -> list[ClipFeatures]:
        return [
            replace(features, text_embeds=getattr(self, f"label_embeds_{index}"))
            for index, features in enumerate(super()._teacher_features(chunks))
        ]
