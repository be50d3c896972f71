"""Linear maps from where a student's embeddings and streams are to where a teacher's are."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from transformers import PretrainedConfig

from clipmap_hf.models.features import ClipFeatures


__all__ = ["EmbeddingProjector", "stream_projectors"]


class EmbeddingProjector(nn.Module):
    """
    Takes normalized embeddings to a teacher's width, and normalizes them again.

    Args:
        student_dim: The student's width.
        teacher_dim: The teacher's.
    """

    def __init__(self, student_dim: int, teacher_dim: int):
        super().__init__()
        # Every process begins with the same.
        generator = torch.Generator().manual_seed(0)
        self.image = _orthogonal(student_dim, teacher_dim, generator)
        self.text = _orthogonal(student_dim, teacher_dim, generator)

    def forward(self, student: ClipFeatures) -> ClipFeatures:
        embeds = self.image(student.image_embeds), self.text(student.text_embeds)
        return ClipFeatures(*(F.normalize(found.float(), dim=-1) for found in embeds), student.logit_scale)


def stream_projectors(student: PretrainedConfig, teacher: PretrainedConfig) -> nn.ModuleDict:
    """For each tower, what takes the student's residual stream to the teacher's width, where that is another."""
    generator, projectors = torch.Generator().manual_seed(0), {}
    for name in ("vision", "text"):
        own, dim = (getattr(config, f"{name}_config").hidden_size for config in (student, teacher))
        projectors[name] = nn.Identity() if own == dim else _orthogonal(own, dim, generator)
    return nn.ModuleDict(projectors)


def _orthogonal(student_dim: int, teacher_dim: int, generator: torch.Generator) -> nn.Linear:
    linear = skip_init(nn.Linear, student_dim, teacher_dim, bias=False)
    nn.init.orthogonal_(linear.weight, generator=generator)
    return linear
