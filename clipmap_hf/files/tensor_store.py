"""Keeps many tensors, in memory up to a limit and beyond it in temporary files."""

import tempfile

import numpy as np
import torch


__all__ = ["IN_MEMORY", "TensorStore"]

IN_MEMORY = 2**31  # bytes that a store keeps in memory


class TensorStore:
    """
    Keeps tensors on the CPU. Once more than `IN_MEMORY` bytes are announced by `expect`, further tensors are written
    to temporary files. The space of such a file is freed together with its tensor.
    """

    def __init__(self):
        self.expected = 0

    def expect(self, bytes: int) -> None:
        """Announces tensors that will be passed to `keep`, by their total number of bytes."""
        self.expected += bytes

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor on the CPU, in memory or mapped from a temporary file."""
        if self.expected <= IN_MEMORY:
            return tensor.cpu()
        with tempfile.TemporaryFile() as file:  # the file has no name, so it is removed together with the tensor
            array = np.memmap(file, tensor.cpu().numpy().dtype, "w+", shape=tuple(tensor.shape))
        return torch.from_numpy(array).copy_(tensor)
