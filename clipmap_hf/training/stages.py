"""What is trained, against whom, by which losses: one module per stage, whose `forward(batch)` returns the loss."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig

from clipmap_hf.features import ClipFeatures
from clipmap_hf.losses import affinity_loss, contrastive_loss
from clipmap_hf.mapping.mapper import WeightMapper


__all__ = ["ContrastiveStage", "DistillationStage", "MappingStage", "Stage"]

MAX_LOGIT_SCALE = 100.0
_INPUTS = ("input_ids", "attention_mask", "pixel_values")


class Stage(nn.Module):
    """
    A training stage. The loop calls it on collated batches and knows nothing else of it.

    Args:
        trained: The module whose parameters are trained; it has a `logit_scale` (the logarithm).
        logit_scale: Reciprocal temperature of all logits, the teacher's included (Tables 8 and 9: 50).
        learn_logit_scale: Whether to train it from there, clamped at 100 as CLIP's.
    """

    def __init__(self, trained: nn.Module, logit_scale: float, learn_logit_scale: bool):
        super().__init__()
        self.trained = trained
        self.initial_logit_scale = math.log(logit_scale)
        trained.logit_scale.data.fill_(self.initial_logit_scale)
        trained.logit_scale.requires_grad_(learn_logit_scale)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `{"loss": …}` and the scalars to log."""
        raise NotImplementedError

    def student(self) -> nn.Module:
        """The `CLIPModel` as it stands, to evaluate or save."""
        return self.trained

    def after_step(self) -> None:
        """Keeps a learned logit scale within CLIP's bound; called after every optimizer step."""
        if self.trained.logit_scale.requires_grad:
            self.trained.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def _student_features(self, batch: Mapping[str, torch.Tensor]) -> ClipFeatures:
        output = self.trained(**{name: batch[name] for name in _INPUTS})
        return ClipFeatures.from_output(output, self.trained.logit_scale)


class ContrastiveStage(Stage):
    """Trains all weights of a `CLIPModel` on the contrastive loss: pretraining, and the from-scratch baseline."""

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features = self._student_features(batch)
        return {"loss": contrastive_loss(features), "logit_scale": features.logit_scale}


class MappingStage(ContrastiveStage):
    """Trains the operators of a `WeightMapper` on the contrastive loss, the teacher frozen (paper A.3, Eq. 12)."""

    trained: WeightMapper

    def student(self) -> nn.Module:
        return self.trained.export()


class DistillationStage(Stage):
    """
    Trains all student weights against a frozen teacher: `(1 - λ) contrastive + λ affinity` (Eq. 11–13).

    Args:
        trained: The student.
        teacher: A `CLIPModel` that reads the same inputs; kept in eval mode and out of the stage's state dict.
        distillation_weight: λ of Eq. 13.

    Raises:
        ValueError: If λ is no share, or the two models read different inputs.
    """

    def __init__(
        self,
        trained: nn.Module,
        teacher: nn.Module,
        logit_scale: float,
        learn_logit_scale: bool,
        distillation_weight: float = 1.0,
    ):
        super().__init__(trained, logit_scale, learn_logit_scale)
        if not 0 <= distillation_weight <= 1:
            raise ValueError(f"distillation_weight={distillation_weight} must lie between 0 and 1 (Eq. 13's λ).")
        _check_same_inputs(trained.config, teacher.config)
        self.distillation_weight = distillation_weight
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: not a submodule, so never saved or wrapped

    def _apply(self, fn, *args, **kwargs):
        self._teacher[0]._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            output = self._teacher[0](**{name: batch[name] for name in _INPUTS})
        scale = torch.tensor(self.initial_logit_scale, device=output.image_embeds.device)
        teacher, student = ClipFeatures.from_output(output, scale), self._student_features(batch)
        affinity, contrastive = affinity_loss(student, teacher), contrastive_loss(student)
        loss = self.distillation_weight * affinity + (1 - self.distillation_weight) * contrastive
        return {"loss": loss, "affinity": affinity, "contrastive": contrastive, "logit_scale": student.logit_scale}


def _check_same_inputs(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    for tower, names in (
        ("vision", ("image_size",)),
        ("text", ("vocab_size", "eos_token_id", "max_position_embeddings")),
    ):
        for name in names:
            values = [getattr(getattr(config, f"{tower}_config"), name) for config in (student, teacher)]
            if values[0] != values[1]:
                raise ValueError(
                    f"Student and teacher must read the same inputs, but {tower}_config.{name} is {values[0]} in the "
                    f"student and {values[1]} in the teacher."
                )
