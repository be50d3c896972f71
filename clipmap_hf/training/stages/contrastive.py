"""The stage that trains a model from scratch."""

from collections.abc import Sequence

import torch
from torch import nn

from clipmap_hf.losses import LOSSES
from clipmap_hf.training.stages.base import Batch, Stage
from clipmap_hf.training.stages.logits import learn_bias


__all__ = ["ContrastiveStage"]


class ContrastiveStage(Stage):
    """
    Trains all weights on the contrastive loss, or if there is a logit bias on the sigmoid loss: from scratch.

    Args:
        trained: The model.
        logit_scale: As in `Stage`, but the model gets it: without a teacher, it has no other.
        learn_logit_scale: As in `Stage`.
    """

    def __init__(self, trained: nn.Module, *, logit_scale: float = 50.0, learn_logit_scale: bool = False):
        super().__init__(trained, logit_scale=logit_scale, learn_logit_scale=learn_logit_scale)
        self._set_scale(learn_logit_scale)
        self.loss = "sigmoid" if hasattr(trained, "logit_bias") else "contrastive"
        learn_bias(trained, {self.loss: 1.0}, first=-10.0)  # as SigLIP: at first, nothing belongs together

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        features = self._student_features(chunks)
        return {"loss": LOSSES[self.loss](features), "logit_scale": features.logit_scale}
