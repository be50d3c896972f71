"""Finds BatchNorms, which see a whole batch and change in training without a gradient."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


__all__ = ["has_batch_norms"]


def has_batch_norms(model: nn.Module) -> bool:
    """Tells whether a model has a BatchNorm."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())
