"""The stage that trains ternary weights: latent float weights, made ternary once a step, taught by the float model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.model import pack_model, ternary_modules
from clipmap_hf.ternary.quantizers import learned_ternary, straight_through, ternarized
from clipmap_hf.training.stages.base import Batch
from clipmap_hf.training.stages.distillation import DistillationStage


__all__ = ["TernaryStage"]

_LOWEST_LEVEL = 1e-6  # of learned ones, so that none changes its sign


class TernaryStage(DistillationStage):
    """
    Distillation of a student whose forward pass sees ternary weights while its latent float weights are trained, with
    the gradient of the former (quantization-aware training, as TernaryCLIP's). The student itself is an ordinary
    model, so checkpoints, gradient caching and teacher caches are those of distillation.

    Args:
        trained: The student; its weights become the latent ones. Those that require no gradient stay float.
        config: What is ternary, and how.
        ramp_steps: Steps in which weights go from float to ternary; none by default.
        float_dtype: Of all that is not ternary in the exported model.
        distillation: Teachers, losses and logit scale, as in `DistillationStage`.

    Raises:
        ValueError: If all that could be ternary is frozen, or as in `DistillationStage`.
    """

    swaps_weights = True

    def __init__(
        self,
        trained: PreTrainedModel,
        *,
        config: TernaryConfig,
        ramp_steps: int = 0,
        float_dtype: torch.dtype = torch.float32,
        **distillation: Any,
    ):
        super().__init__(trained, **distillation)
        self.float_dtype = float_dtype
        self._options = (config.quantizer, config.granularity, config.block_size)
        names = ternary_modules(trained, config)
        self.names = [name for name in names if trained.get_submodule(name).weight.requires_grad]
        if not self.names:
            raise ValueError(f"All of the parts {config.parts} are frozen; freeze another tower, or name other parts.")
        self.config, self.ramp_steps = dataclasses.replace(config, modules=self.names), ramp_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        learned = self.names if config.quantizer == "learned" else []
        found = [ternarized(trained.get_submodule(name).weight.detach(), *self._options)[1] for name in learned]
        self._shapes = [level.shape for level in found]
        starts = [level.float().clamp(min=_LOWEST_LEVEL).flatten() for level in found]  # vectors do not decay
        self.levels = nn.ParameterList(starts)

    def after_step(self) -> None:
        super().after_step()
        self.step += 1
        for level in self.levels:
            level.data.clamp_(min=_LOWEST_LEVEL)

    @torch.no_grad()
    def student(self) -> nn.Module:
        """The student as a float model that holds what its trits stand for."""
        return pack_model(self.trained, self.config, self._levels()).dequantize()

    def export(self) -> PreTrainedModel:
        """The student with packed weights."""
        return pack_model(self.trained, self.config, self._levels(), self.float_dtype)

    def _levels(self) -> dict[str, torch.Tensor]:
        levels = [level.detach().view(shape) for level, shape in zip(self.levels, self._shapes, strict=True)]
        return dict(zip(self.names, levels, strict=False))

    def _student_model(self, chunks: Sequence[Batch]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        share = min(1.0, (int(self.step) + 1) / self.ramp_steps) if self.ramp_steps else 1.0
        weights = {}
        for index, name in enumerate(self.names):
            latent = self.trained.get_submodule(name).weight
            ternary = self._ternary(latent, index)
            weights[f"{name}.weight"] = ternary if share == 1 else latent.lerp(ternary, share)
        return self.trained, weights

    def _ternary(self, latent: torch.Tensor, index: int) -> torch.Tensor:
        if not self.levels:
            return straight_through(latent, *self._options)
        return learned_ternary(latent, self.levels[index].view(self._shapes[index]), *self._options[1:])
