"""The logit scale, and SigLIP's logit bias: what they start from, when they are trained, and within what bounds."""

import math
from collections.abc import Mapping

import torch
from torch import nn


__all__ = ["MAX_LOGIT_SCALE", "clamp_scale", "learn_bias", "logit_parameters", "set_scale"]

MAX_LOGIT_SCALE = 100.0


def logit_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The logit scale of a model, and its logit bias if it has one."""
    return [getattr(model, name) for name in ("logit_scale", "logit_bias") if hasattr(model, name)]


def set_scale(model: nn.Module, logit_scale: float, learn: bool) -> None:
    """
    Sets a model's logit scale.

    Args:
        model: Has a `logit_scale`, the logarithm.
        logit_scale: The scale itself.
        learn: Whether it is trained from there.
    """
    model.logit_scale.data.fill_(math.log(logit_scale))
    model.logit_scale.requires_grad_(learn)


def clamp_scale(model: nn.Module) -> None:
    """Keeps a learned logit scale within CLIP's bound of 100."""
    if model.logit_scale.requires_grad:
        model.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))


def learn_bias(model: nn.Module, losses: Mapping[str, float], first: float | None = None) -> bool:
    """
    Trains a model's logit bias if the sigmoid loss, the only one that depends on it, is among the losses; returns
    whether it does.

    Args:
        model: With a `logit_bias`, or without.
        losses: Weights by name.
        first: What the bias starts at; by default at what it is.

    Raises:
        ValueError: If there is no bias for the sigmoid loss.
    """
    bias: torch.Tensor | None = getattr(model, "logit_bias", None)
    if bias is not None:
        bias.requires_grad_("sigmoid" in losses)
        if first is not None:
            bias.data.fill_(first)
    elif "sigmoid" in losses:
        raise ValueError(
            "The sigmoid loss learns a logit bias, which models of type 'siglip' have and this model lacks; take the "
            "contrastive loss."
        )
    return bias is not None and "sigmoid" in losses
