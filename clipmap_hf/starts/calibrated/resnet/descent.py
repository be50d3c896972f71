"""Gradient descent on all of a ResNet, for the teacher's embeddings and for what its stages write."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from clipmap_hf.files.tensor_store import TensorStore
from clipmap_hf.starts.calibrated.descent import descend, share_lost


__all__ = ["descend_resnet"]

_WATCHED = (3, 4)  # stages, for what the first ones write is large


@dataclass
class ImageGoals:
    """Images, and what a student is to make of them."""

    pixels: torch.Tensor
    embeds: torch.Tensor  # normalized
    stages: list[torch.Tensor]  # what the watched stages write

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def tokens(self) -> int:
        """The places of an image, counted in the first watched stage: 16 × 16 pixels each, as in many ViTs."""
        return self.stages[0][0, 0].numel()


def descend_resnet(
    student: nn.Module,
    teacher: nn.Module,
    kept: Mapping[str, torch.Tensor],
    embed: torch.Tensor | None,
    batches: Iterable[Mapping[str, torch.Tensor]],
    steps: int,
) -> None:
    """
    Brings a student's embeddings, and what its last stages write, nearer to the teacher's; as in evaluation, so the
    statistics of BatchNorms stay.

    Args:
        student: The tower; changed in place.
        teacher: The teacher's.
        kept: The channels that the student has of each space.
        embed: Maps the teacher's embeddings, if the student's are smaller.
        batches: Of `pixel_values`, at least one in each process.
        steps: How many.
    """
    device, store = teacher.conv1.weight.device, TensorStore()

    def error(goals: ImageGoals, items: torch.Tensor) -> torch.Tensor:
        output = student(goals.pixels[items].to(device), output_hidden_states=True)
        found = [output.hidden_states[stage] for stage in _WATCHED]
        embeds = F.normalize(output.pooler_output, dim=-1)
        lost = [_share_lost(one, goal[items].to(device)) for one, goal in zip(found, goals.stages, strict=True)]
        return (embeds - goals.embeds[items].to(device)).square().sum(dim=-1).mean() + torch.stack(lost).mean()

    descend(student, [_goals(teacher, kept, embed, batch["pixel_values"], store) for batch in batches], steps, error)


def _goals(
    teacher: nn.Module,
    kept: Mapping[str, torch.Tensor],
    embed: torch.Tensor | None,
    pixels: torch.Tensor,
    store: TensorStore,
) -> ImageGoals:
    output = teacher(pixels.to(teacher.conv1.weight.device), output_hidden_states=True)
    stages = [output.hidden_states[stage][:, kept[f"stream{stage}"]] for stage in _WATCHED]
    store.expect(sum(stage.nbytes for stage in stages))
    embeds = output.pooler_output if embed is None else output.pooler_output @ embed.T
    return ImageGoals(pixels, F.normalize(embeds, dim=-1), [store.keep(stage) for stage in stages])


def _share_lost(stream: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`share_lost` of all places of images, `(images, channels, height, width)`."""
    stream, target = (one.flatten(2).transpose(1, 2) for one in (stream, target))
    return share_lost(stream, target, torch.ones_like(stream[..., 0]))
