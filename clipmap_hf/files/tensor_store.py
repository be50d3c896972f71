"""Keeps many tensors: in memory up to a bound, and beyond it in temporary files."""

import tempfile

import numpy as np
import torch


__all__ = ["IN_MEMORY", "TensorStore"]

IN_MEMORY = 2**31  # bytes that a store keeps in memory


class TensorStore:
    """
    Keeps tensors on the CPU. Once more than `IN_MEMORY` bytes are expected or kept, further tensors are written to
    temporary files, whose space is free again when the tensors are.
    """

    def __init__(self):
        self.expected = 0

    def expect(self, bytes: int) -> None:
        """Announces tensors of so many bytes that `keep` will be given."""
        self.expected += bytes

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the CPU, in memory or mapped from a file."""
        if self.expected <= IN_MEMORY:
            return tensor.cpu()
        with tempfile.TemporaryFile() as file:  # has no name, so it vanishes with the tensor
            array = np.memmap(file, tensor.cpu().numpy().dtype, "w+", shape=tuple(tensor.shape))
        return torch.from_numpy(array).copy_(tensor)
