"""Batches that are made once and read several times."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from clipmap_hf.files.tensor_store import TensorStore


__all__ = ["HeldBatches"]


class HeldBatches:
    """
    Makes batches once, and can iterate over them any number of times. The first iteration keeps every batch, in memory
    or in temporary files (`TensorStore`). Later iterations read the kept batches. Batches in a list are not copied.

    Args:
        batches: A list, a `DataLoader`, or any other object that starts anew at every iteration.

    Raises:
        TypeError: If `batches` is an iterator, which can be read only once.
    """

    def __init__(self, batches: Iterable[Mapping[str, torch.Tensor]]):
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"Calibration data of the type {type(batches).__name__} cannot be read. Give pairs (a path, a Hub id, "
                "a datasets.Dataset, a list of (image, text)), or batches in a list or a DataLoader."
            )
        if iter(batches) is batches:
            raise TypeError("Calibration goes through its batches several times; give a list or a DataLoader.")
        self.batches = batches
        self.held = list(batches) if isinstance(batches, (list, tuple)) else None

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        if self.held is not None:
            return iter(self.held)
        return self._first_pass()

    def _first_pass(self) -> Iterator[Mapping[str, torch.Tensor]]:
        store, held = TensorStore(), []
        for batch in self.batches:
            store.expect(sum(tensor.nbytes for tensor in batch.values()))
            held.append({name: store.keep(tensor) for name, tensor in batch.items()})
            yield held[-1]
        self.held = held
