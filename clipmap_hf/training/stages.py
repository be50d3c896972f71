"""What is trained, against whom, by which losses: one module per stage, whose `forward(chunks)` returns the loss."""

import math
from collections.abc import Mapping, Sequence
from itertools import starmap
from types import MappingProxyType

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from clipmap_hf.data.collate import normalized_pixels
from clipmap_hf.distributed import average_gradients, gather
from clipmap_hf.features import ClipFeatures
from clipmap_hf.losses import EMBEDDING_LOSSES, LOSSES, check_losses, contrastive_loss
from clipmap_hf.mapping.mapper import WeightMapper


__all__ = ["ContrastiveStage", "DistillationStage", "MappingStage", "Stage"]

MAX_LOGIT_SCALE = 100.0
AFFINITY, CONTRASTIVE = MappingProxyType({"affinity": 1.0}), MappingProxyType({"contrastive": 1.0})
Batch = Mapping[str, torch.Tensor]


class Stage(nn.Module):
    """
    A training stage. The loop calls it on the chunks of a batch and knows nothing else of it.

    Of several chunks, only the embeddings are kept; the loss spans them all, and those of all processes, and in its
    backward pass every chunk is computed once more, with the same random numbers, for its gradient (gradient caching).
    So a step needs the memory of one chunk, a third more time, and has the gradient of the whole batch.

    Args:
        trained: The module whose parameters are trained; it has a `logit_scale` (the logarithm).
        logit_scale: Reciprocal temperature of all logits, the teacher's included (Tables 8 and 9: 50).
        learn_logit_scale: Whether to train it from there, clamped at 100 as CLIP's.
    """

    averages_gradients = False  # whether backward leaves the mean of all processes, so that no wrapper has to

    def __init__(self, trained: nn.Module, logit_scale: float, learn_logit_scale: bool):
        super().__init__()
        self.trained = trained
        self.initial_logit_scale = math.log(logit_scale)
        trained.logit_scale.data.fill_(self.initial_logit_scale)
        trained.logit_scale.requires_grad_(learn_logit_scale)
        self._encode = _encode

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Returns `{"loss": …}` over the chunks of all processes, and the scalars to log."""
        raise NotImplementedError

    def student(self) -> nn.Module:
        """The `CLIPModel` as it stands, to evaluate or save."""
        return self.trained

    def after_step(self) -> None:
        """Keeps a learned logit scale within CLIP's bound; called after every optimizer step."""
        if self.trained.logit_scale.requires_grad:
            self.trained.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def compile_encoder(self) -> None:
        """Lets `torch.compile` make the student's forward and backward pass faster, which takes a while at first."""
        self._encode = torch.compile(_encode)

    def _student_model(self, chunks: Sequence[Batch]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The module that encodes these chunks, and weights for it that take the place of its own."""
        return self.trained, {}

    def _student_features(self, chunks: Sequence[Batch]) -> ClipFeatures:
        model = self._student_model(chunks)
        if len(chunks) == 1:
            embeds = [self._encode(*model, chunks[0])]
        else:
            embeds = [checkpoint(self._encode, *model, chunk, use_reentrant=False) for chunk in chunks]
        return _features(embeds, self.trained.logit_scale)


class ContrastiveStage(Stage):
    """Trains all weights of a `CLIPModel` on the contrastive loss: pretraining, and the from-scratch baseline."""

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        features = self._student_features(chunks)
        return {"loss": contrastive_loss(features), "logit_scale": features.logit_scale}


class DistillationStage(Stage):
    """
    Trains all student weights against frozen teachers, on a weighted sum of losses: `{"affinity": 1}` is Eq. 11,
    `{"affinity": λ, "contrastive": 1 - λ}` Eq. 13, `{"contrastive": 1, "relational": 1, "feature": 2000,
    "interactive": 1}` CLIP-KD. Where a loss compares embeddings of other widths than the student's, a linear map from
    the student's is trained with it.

    Args:
        trained: The student.
        teachers: `CLIPModel`s that read the same inputs; kept in eval mode and out of the stage's state dict. Without
            any, chunks must bring `teacher_embeds`, from a `TeacherCache`.
        logit_scale: As above.
        learn_logit_scale: As above.
        losses: Weights by name, a key of `LOSSES`.
        teacher_dims: Widths of the teachers' embeddings, if chunks bring them.

    Raises:
        ValueError: If a loss is unknown or its weight negative, or the models read different inputs.
    """

    def __init__(
        self,
        trained: nn.Module,
        teachers: Sequence[nn.Module],
        logit_scale: float,
        learn_logit_scale: bool,
        losses: Mapping[str, float] = AFFINITY,
        teacher_dims: Sequence[int] = (),
    ):
        super().__init__(trained, logit_scale, learn_logit_scale)
        check_losses(losses)
        config = self._student_config()
        for teacher in teachers:
            _check_same_inputs(config, teacher.config)
        self.losses = dict(losses)
        # In a list, they are no submodules, so never saved, wrapped or sent to other processes.
        self._teachers = [teacher.requires_grad_(False).eval() for teacher in teachers]
        dims = teacher_dims or [teacher.config.projection_dim for teacher in teachers]
        own = config.projection_dim
        compared = set(EMBEDDING_LOSSES) & set(losses) and set(dims) - {own}
        self.projectors = nn.ModuleList(
            nn.Identity() if dim == own else _Projector(own, dim) for dim in dims if compared
        )

    def _apply(self, fn, *args, **kwargs):
        for teacher in self._teachers:
            teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        teachers, student = self._teacher_features(chunks), self._student_features(chunks)
        values = {name: self._loss(name, student, teachers) for name in self.losses}
        loss = sum(weight * values[name] for name, weight in self.losses.items())
        return {"loss": loss, **values, "logit_scale": student.logit_scale}

    def _loss(self, name: str, student: ClipFeatures, teachers: Sequence[ClipFeatures]) -> torch.Tensor:
        if name not in EMBEDDING_LOSSES or not self.projectors:
            return LOSSES[name](student, *teachers)
        projected = [projector(student) for projector in self.projectors]
        return sum(starmap(LOSSES[name], zip(projected, teachers, strict=True))) / len(teachers)

    def _student_config(self) -> PretrainedConfig:
        return self.trained.config

    @torch.no_grad()
    def _teacher_features(self, chunks: Sequence[Batch]) -> list[ClipFeatures]:
        if not self._teachers and "teacher_embeds" not in chunks[0]:
            return []
        embeds = [
            [(images.float(), texts.float()) for images, texts in chunk["teacher_embeds"]]
            if "teacher_embeds" in chunk
            else [_encode(teacher, {}, chunk) for teacher in self._teachers]
            for chunk in chunks
        ]
        scale = torch.tensor(self.initial_logit_scale, device=embeds[0][0][0].device)
        return [_features(of_teacher, scale) for of_teacher in zip(*embeds, strict=True)]


class MappingStage(DistillationStage):
    """
    Trains the operators of a `WeightMapper`, the teacher frozen, on the contrastive loss (paper A.3, Eq. 12) or, as in
    Fig. 4, on others too. The weights are mapped once for all chunks of a step, and what processes exchange are
    gradients of the student's size.

    Args:
        trained: The mapper.
        logit_scale: As above.
        learn_logit_scale: As above.
        teachers: As above; not needed for the contrastive loss alone.
        losses: As above.
        teacher_dims: As above.

    Raises:
        ValueError: If the student is as large as its teacher, so that nothing is mapped, or as above.
    """

    trained: WeightMapper
    averages_gradients = True

    def __init__(
        self,
        trained: WeightMapper,
        logit_scale: float,
        learn_logit_scale: bool,
        teachers: Sequence[nn.Module] = (),
        losses: Mapping[str, float] = CONTRASTIVE,
        teacher_dims: Sequence[int] = (),
    ):
        if not trained.cut:
            raise ValueError(
                "The student is as large as its teacher, so there is nothing to map. Say what is to be smaller: a "
                "preset, or sizes such as vision_hidden_size."
            )
        super().__init__(trained, teachers, logit_scale, learn_logit_scale, losses, teacher_dims)

    def student(self) -> nn.Module:
        return self.trained.export()

    def _student_config(self) -> PretrainedConfig:
        return self.trained.student_config

    def _student_model(self, chunks: Sequence[Batch]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        # Those of all processes: the gradient that comes back is the mean of theirs, for the rows that any looks up.
        token_ids = gather(torch.cat([chunk["input_ids"].flatten() for chunk in chunks])) if self.training else None
        weights = self.trained.materialize(token_ids)
        trained = [name for name, weight in weights.items() if weight.requires_grad]
        weights |= zip(trained, average_gradients([weights[name] for name in trained]), strict=True)
        return self.trained.skeleton, weights


class _Projector(nn.Module):
    """Takes the student's embeddings to where a teacher's are; the same in every process."""

    def __init__(self, student_dim: int, teacher_dim: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("image", "text"):
            linear = skip_init(nn.Linear, student_dim, teacher_dim, bias=False)
            nn.init.orthogonal_(linear.weight, generator=generator)
            setattr(self, name, linear)

    def forward(self, student: ClipFeatures) -> ClipFeatures:
        embeds = self.image(student.image_embeds), self.text(student.text_embeds)
        return ClipFeatures(*(F.normalize(one.float(), dim=-1) for one in embeds), student.logit_scale)


def _encode(model: nn.Module, weights: dict[str, torch.Tensor], chunk: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized embeddings of a chunk's images and texts; `weights` take the place of the model's own."""
    inputs = {name: chunk[name] for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = normalized_pixels(chunk)
    output = functional_call(model, weights, args=(), kwargs=inputs) if weights else model(**inputs)
    return ClipFeatures.embeds(output)


def _features(embeds: Sequence[tuple[torch.Tensor, torch.Tensor]], logit_scale: torch.Tensor) -> ClipFeatures:
    """The chunks' embeddings put together, those of all processes with them."""
    images, texts = (gather(torch.cat(pieces)) for pieces in zip(*embeds, strict=True))
    return ClipFeatures(images, texts, logit_scale.float().exp())


def _check_same_inputs(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    for tower, names in (
        ("vision", ("image_size",)),
        ("text", ("vocab_size", "eos_token_id", "max_position_embeddings")),
    ):
        for name in names:
            values = [getattr(getattr(config, f"{tower}_config"), name) for config in (student, teacher)]
            if values[0] != values[1]:
                raise ValueError(
                    f"Student and teacher must read the same inputs, but {tower}_config.{name} is {values[0]} in the "
                    f"student and {values[1]} in the teacher."
                )
