"""The residual streams of a batch while a tower is refitted, of the student and of the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, starmap

import torch

from clipmap_hf.starts.calibrated.moments import Moments


__all__ = ["SegmentPass", "Streams", "segments"]


@dataclass
class Streams:
    """A batch where the current segment begins, and what the teacher makes of it there."""

    weights: torch.Tensor  # (items, tokens), as the streams
    ends: torch.Tensor
    first: torch.Tensor  # what the student's first layer reads
    teacher: torch.Tensor
    student: torch.Tensor
    attended: torch.Tensor | None = None  # mapped, with all that the segment's attention adds
    reads: torch.Tensor | None = None  # what fc1 reads in layers of the segment, side by side
    behind: torch.Tensor | None = None  # mapped, behind the segment
    embeds: torch.Tensor | None = None  # what the student is to embed it as, normalized
    watched: dict[int, torch.Tensor] = field(default_factory=dict)  # mapped, behind some layers of the student

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def tokens(self) -> int:
        """The tokens of each item, padding among them."""
        return self.weights.shape[1]

    def add_to(self, moments: Moments, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds inputs and targets `(items, tokens, width)` to moments, but for tokens that are padding."""
        counted = self.weights > 0
        moments.add(inputs[counted], targets[counted], self.weights[counted])


@dataclass
class SegmentPass:
    """What the teacher does to the streams of a batch in a segment; shapes are those of the streams."""

    attention_reads: torch.Tensor  # in the layers with kept heads, side by side
    mlp_reads: torch.Tensor  # in the layers with kept neurons, side by side
    attended: torch.Tensor  # the stream with all that attention adds
    behind: torch.Tensor  # the stream behind the segment


def segments(begins: Sequence[int], layers: int) -> list[range]:
    """
    The teacher's layers that each of the student's stands for.

    Args:
        begins: The layers that they begin with, ascending; the first begins at 0 always.
        layers: How many the teacher has.
    """
    return list(starmap(range, pairwise([0, *begins[1:], layers])))
