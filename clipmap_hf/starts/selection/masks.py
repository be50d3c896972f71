"""Hard-concrete masks of a CLIP's channels, heads and neurons, and their budget (TinyCLIP's automatic way)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from clipmap_hf.families import BOTH_TOWERS, Family
from clipmap_hf.starts.selection.scores import Scores, TowerScores


__all__ = ["MaskedLayerNorm", "Masks", "expected", "sampled", "settled"]

LOW, HIGH = -0.1, 1.1  # where the stretched distribution ends, so that it has mass at 0 and 1
TEMPERATURE = 2 / 3
LARGEST = math.log(100)  # of a logit, either way


def sampled(logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A draw of masks between 0 and 1, differentiable in their logits."""
    uniform = torch.rand(logits.shape, generator=generator).to(logits).clamp(1e-6, 1 - 1e-6)
    return ((uniform.logit() + logits) / TEMPERATURE).sigmoid().mul(HIGH - LOW).add(LOW).clamp(0, 1)


def expected(logits: torch.Tensor) -> torch.Tensor:
    """The probability that a mask is not 0."""
    return (logits - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


def settled(logits: torch.Tensor) -> torch.Tensor:
    """Masks without a draw, of the last dimension: as many 0 as expected, those of the smallest logits; the rest 1."""
    zeros = (1 - expected(logits)).sum(dim=-1, keepdim=True).round()
    ranks = logits.argsort(dim=-1, stable=True).argsort(dim=-1)
    return (ranks >= zeros).to(logits.dtype)


class MaskedLayerNorm(nn.LayerNorm):
    """A LayerNorm that sees the channels whose mask is not 0, and gives 0 for the others."""

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> "MaskedLayerNorm":
        """One like `norm`, of random weights, with all channels kept."""
        masked = cls(norm.normalized_shape, eps=norm.eps)
        masked.register_buffer("mask", torch.ones(norm.normalized_shape))
        return masked

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        kept = (self.mask > 0).to(stream.dtype)
        count = kept.sum().clamp(min=1)
        centered = (stream - (stream * kept).sum(dim=-1, keepdim=True) / count) * kept
        variance = centered.square().sum(dim=-1, keepdim=True) / count
        return (centered * torch.rsqrt(variance + self.eps) * self.weight + self.bias) * kept


class Masks(nn.Module):
    """
    The logits of all masks of a model: of a tower's channels, and of each layer's heads and neurons.

    Args:
        config: The model's config.
        family: Its table of axes.
        towers: Those that are masked.
    """

    def __init__(self, config: PretrainedConfig, family: Family, towers: Sequence[str] = ("vision", "text")):
        super().__init__()
        if not family.layerwise >= BOTH_TOWERS:
            raise ValueError(
                f"Models of type {config.model_type!r} cannot be masked; start by an initializer instead, such as "
                "'diagonal'."
            )
        self.config, self.family, self.towers = config, family, towers
        for name in towers:
            tower = getattr(config, f"{name}_config")
            layers = tower.num_hidden_layers
            shapes = ((tower.hidden_size,), (layers, tower.num_attention_heads), (layers, tower.intermediate_size))
            for part, shape in zip(("channels", "heads", "neurons"), shapes, strict=True):
                self.register_parameter(f"{name}_{part}", nn.Parameter(torch.full(shape, LARGEST)))

    def clamp(self) -> None:
        """Keeps all logits within reach of a few steps."""
        for logits in self.parameters():
            logits.data.clamp_(-LARGEST, LARGEST)

    def masked(
        self, weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        Weights of a model whose LayerNorms are `MaskedLayerNorm`s, that does what `weights` do under masks: channels
        are masked where the residual stream is written, heads and neurons where they are read.

        Args:
            weights: By their names in the unmasked model.
            masks: By the names of the logits.
        """
        found = {}
        for name, tensor in weights.items():
            spec = self.family.match(name)
            masked, module = spec.tower in self.towers, name.rpartition(".")[0]
            if masked and "norm" in module.rpartition(".")[2]:
                found[f"{module}.mask"] = masks[f"{spec.tower}_channels"]
            elif masked:
                for axis, space in enumerate(spec.rule.axes):
                    if (mask := self._mask(space, spec.tower, spec.layer, masks)) is not None:
                        tensor = tensor * mask.reshape([-1 if axis == other else 1 for other in range(tensor.ndim)])
            found[name] = tensor
        return found

    def _mask(
        self, space: str | None, tower: str | None, layer: int | None, masks: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | None:
        if space in ("residual", "patch"):
            return masks[f"{tower}_channels"]
        if space == "ffn.in":
            return masks[f"{tower}_neurons"][layer]
        if space == "value.in":
            config = getattr(self.config, f"{tower}_config")
            return masks[f"{tower}_heads"][layer].repeat_interleave(config.hidden_size // config.num_attention_heads)
        return None

    def share(self) -> torch.Tensor:
        """The expected share of the weights in layers that are kept, of both towers together."""
        kept = _weights_of(self.config)
        for name in self.towers:
            config = getattr(self.config, f"{name}_config")
            width = config.hidden_size // config.num_attention_heads
            channels, heads, neurons = (
                expected(getattr(self, f"{name}_{part}")).sum() for part in ("channels", "heads", "neurons")
            )
            kept = kept - _weights_of_tower(config) + _weights(channels, width * heads, neurons)
        return kept / _weights_of(self.config)

    def share_of(self, student: PretrainedConfig) -> float:
        """The share of the weights in layers that a student of this config has."""
        return _weights_of(student) / _weights_of(self.config)

    @torch.no_grad()
    def scores(self) -> Scores:
        """What was learned, as scores; a layer has the expected share of its heads plus that of its neurons."""
        towers = {"vision": None, "text": None}
        for name in self.towers:
            channels, heads, neurons = (getattr(self, f"{name}_{part}") for part in ("channels", "heads", "neurons"))
            layers = expected(heads).mean(dim=1) + expected(neurons).mean(dim=1)
            towers[name] = TowerScores(channels, heads, neurons, layers)
        return Scores(**towers, embed=torch.zeros(self.config.projection_dim))


def _weights(channels: torch.Tensor | int, values: torch.Tensor | int, neurons: torch.Tensor | int) -> Any:
    """Weights of a tower's layers, from how many channels it has, and of all layers together values and neurons."""
    return channels * (4 * values + 2 * neurons)


def _weights_of_tower(config: PretrainedConfig) -> int:
    layers = config.num_hidden_layers
    return _weights(config.hidden_size, layers * config.hidden_size, layers * config.intermediate_size)


def _weights_of(config: PretrainedConfig) -> int:
    return _weights_of_tower(config.vision_config) + _weights_of_tower(config.text_config)
