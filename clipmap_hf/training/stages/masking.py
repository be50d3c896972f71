"""The stage of TinyCLIP's automatic inheritance: weights and the masks that select from them, under one budget."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.starts.selection.masks import MaskedLayerNorm, Masks, sampled, settled
from clipmap_hf.starts.selection.start import mapper_from_scores
from clipmap_hf.training.stages.base import Batch
from clipmap_hf.training.stages.distillation import DistillationStage


__all__ = ["MaskingStage"]

_MULTIPLIER = 10.0  # what the multipliers of the budget start at
_RATE = 0.02  # of the masks' logits and of the multipliers, from first to last


class MaskingStage(DistillationStage):
    """
    Trains a model together with masks of its channels, heads and neurons, until as many of the weights in its layers
    are left as the student has, in both towers together; the loss is that of distillation, and of the budget
    `λ₁ gap + λ₂ gap²`, whose multipliers rise as long as there is a gap. What is evaluated and saved is the student of
    the given shape, uniform in each tower, that keeps the parts with the largest logits; whatever the towers' shares.
    A tower that the student leaves as it is has no masks.

    Args:
        trained: A copy of the teacher; trained in place.
        student: The shape to reach, and the depth rule; with `score`, layers are chosen by what their masks keep.
        ramp_steps: Steps in which the budget goes from the whole to the target; at least 1.
        distillation: Teachers, losses and logit scale, as in `DistillationStage`.

    Raises:
        ValueError: If the student is as large as the model, or as in `DistillationStage`.
    """

    swaps_weights = True
    fixed_rates = {"masks.": _RATE, "multipliers": _RATE}

    def __init__(
        self,
        trained: PreTrainedModel,
        *,
        student: ClipMapConfig,
        ramp_steps: int,
        **distillation: Any,
    ):
        super().__init__(trained, **distillation)
        self.ramp_steps = ramp_steps
        self.plan = plan = MappingPlan.make(trained, dataclasses.replace(student, initializer="manual"))
        if not plan.cut:
            raise ValueError("The student is as large as its source; masks need a smaller one to select.")
        if narrower := plan.head_widths():
            small, big = next(iter(narrower.values()))
            raise ValueError(
                f"Masks keep whole heads, {big} wide, but the student's have {small} channels. Give a width that is a "
                f"multiple of {big}, and no number of heads; or start from a selection instead."
            )
        self.masks = Masks(trained.config, plan.family, plan.cut)
        self.multipliers = nn.Parameter(torch.full((2,), _MULTIPLIER))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.target = self.masks.share_of(plan.student)
        # As in the mapper, the skeleton lends its forward pass only.
        self.__dict__["skeleton"] = _with_masked_norms(trained).requires_grad_(False)

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        output = super().forward(chunks)
        share = self.masks.share()
        due = 1 - (1 - self.target) * min(1.0, (int(self.step) + 1) / self.ramp_steps)
        gap = (share - due).clamp(min=0)
        linear, quadratic = self.multipliers
        held = self.multipliers.detach()
        budget = held[0] * gap + held[1] * gap.square()
        # The multipliers climb the slope on which the weights descend. What is added to the loss for that is zero.
        rising = linear * gap.detach() + quadratic * gap.detach().square()
        loss = output["loss"] + budget - (rising - rising.detach())
        return {**output, "loss": loss, "budget": budget, "share": share, "due": torch.tensor(due)}

    def after_step(self) -> None:
        super().after_step()
        self.masks.clamp()
        self.step += 1

    @torch.no_grad()
    def student(self) -> nn.Module:
        tensors = self.plan.teacher_tensors(self.trained)
        return mapper_from_scores(self.plan, tensors, self.masks.scores()).export()

    def train(self, mode: bool = True):
        self.skeleton.train(mode)
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.skeleton._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def _student_model(self, chunks: Sequence[Batch]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        # The same draw in every process, and when a run goes on.
        generator = torch.Generator().manual_seed(int(self.step))
        masks = {
            name: sampled(logits, generator) if self.training else settled(logits)
            for name, logits in self.masks.named_parameters()
        }
        weights = dict(self.trained.named_parameters())
        return self.skeleton, self.masks.masked(weights, masks)


def _with_masked_norms(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, of the same weights, with LayerNorms that can be masked."""
    masked = copy.deepcopy(model)
    for name, module in list(masked.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, child = name.rpartition(".")
            setattr(masked.get_submodule(parent), child, MaskedLayerNorm.of(module))
    return masked
