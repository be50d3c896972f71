"""What the BatchNorms of a mapped network have measured: its own statistics, which no operator maps any more."""

from collections.abc import Mapping

import torch
from torch import nn


__all__ = ["Statistics"]


class Statistics(nn.Module):
    """
    The statistics of a student's BatchNorms, as buffers, which a checkpoint and a map hold. A forward pass in training
    changes them in place.

    Args:
        tensors: Their first values by state-dict name, which are copied.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "-"), tensor.detach().clone())  # a buffer has no dots in its name

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the buffers by their state-dict names."""
        return {name.replace("-", "."): buffer for name, buffer in self.named_buffers()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over the values that a state dict has under these names."""
        for name, buffer in self.tensors().items():
            buffer.copy_(tensors[name])
