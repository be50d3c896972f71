"""What is trained, against whom, by which losses: one module per stage, whose `forward(chunks)` returns the loss."""

import math
from collections.abc import Mapping, Sequence
from itertools import starmap
from types import MappingProxyType

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from clipmap_hf.config import embedding_width
from clipmap_hf.data.collate import normalized_pixels
from clipmap_hf.distributed import average_gradients, gather
from clipmap_hf.features import ClipFeatures
from clipmap_hf.losses import EMBEDDING_LOSSES, LOSSES, check_losses
from clipmap_hf.losses.hidden import hidden_errors
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.training.logits import clamp_scale, learn_bias, logit_parameters, set_scale
from clipmap_hf.training.projectors import EmbeddingProjector, stream_projectors


__all__ = ["ContrastiveStage", "DistillationStage", "MappingStage", "Stage"]

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
    swaps_weights = False  # whether the forward pass has others in their place, which FSDP would put back

    def __init__(self, trained: nn.Module, logit_scale: float, learn_logit_scale: bool):
        super().__init__()
        self.trained = trained
        self.initial_logit_scale = math.log(logit_scale)
        set_scale(trained, logit_scale, learn_logit_scale)
        self._encode = _encode

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Returns `{"loss": …}` over the chunks of all processes, and the scalars to log."""
        raise NotImplementedError

    def student(self) -> nn.Module:
        """The `CLIPModel` as it stands, to evaluate or save."""
        return self.trained

    def after_step(self) -> None:
        """Keeps a learned logit scale within CLIP's bound; called after every optimizer step."""
        clamp_scale(self.trained)

    def compile_encoder(self) -> None:
        """Lets `torch.compile` make the student's forward and backward pass faster, which takes a while at first."""
        self._encode = torch.compile(_encode)

    def _student_model(self, chunks: Sequence[Batch]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The module that encodes these chunks, and weights for it that take the place of its own."""
        return self.trained, {}

    def _student_features(self, chunks: Sequence[Batch]) -> ClipFeatures:
        model = self._student_model(chunks)
        if len(chunks) == 1:
            found = [self._encoded(*model, chunks[0])]
        else:
            found = [checkpoint(self._encoded, *model, chunk, use_reentrant=False) for chunk in chunks]
        return _features(found, *logit_parameters(self.trained))

    def _encoded(self, model: nn.Module, weights: dict[str, torch.Tensor], chunk: Batch) -> tuple[torch.Tensor, ...]:
        """What the loss reads of a chunk, in rows that are pairs: the first fields of `ClipFeatures`."""
        return self._encode(model, weights, chunk)[:2]


class ContrastiveStage(Stage):
    """Trains all weights on the contrastive loss, or if there is a logit bias on the sigmoid loss: from scratch."""

    def __init__(self, trained: nn.Module, logit_scale: float, learn_logit_scale: bool):
        super().__init__(trained, logit_scale, learn_logit_scale)
        self.loss = "sigmoid" if hasattr(trained, "logit_bias") else "contrastive"
        learn_bias(trained, {self.loss: 1.0}, first=-10.0)  # as SigLIP: at first, nothing belongs together

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        features = self._student_features(chunks)
        return {"loss": LOSSES[self.loss](features), "logit_scale": features.logit_scale}


class DistillationStage(Stage):
    """
    Trains all student weights against frozen teachers, on a weighted sum of losses: `{"affinity": 1}` is Eq. 11,
    `{"affinity": λ, "contrastive": 1 - λ}` Eq. 13, `{"contrastive": 1, "relational": 1, "feature": 2000,
    "interactive": 1}` CLIP-KD. Where a loss compares embeddings of other widths than the student's, a linear map from
    the student's is trained with it; so it is for the hidden loss, if the first teacher's streams are wider.

    Args:
        trained: The student.
        teachers: `CLIPModel`s that read the same inputs; kept in eval mode and out of the stage's state dict. Without
            any, chunks must bring `teacher_embeds`, from a `TeacherCache`, which has no streams for the hidden loss.
        logit_scale: As above.
        learn_logit_scale: As above.
        losses: Weights by name, a key of `LOSSES`.
        teacher_dims: Widths of the teachers' embeddings, if chunks bring them.

    Raises:
        ValueError: If a loss is unknown, its weight negative or its teacher missing, or the models read different
            inputs.
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
        learn_bias(trained, losses)
        config = self._student_config()
        for teacher in teachers:
            _check_same_inputs(config, teacher.config)
        self.losses = dict(losses)
        # In a list, they are no submodules, so never saved, wrapped or sent to other processes.
        self._teachers = [teacher.requires_grad_(False).eval() for teacher in teachers]
        dims = teacher_dims or [embedding_width(teacher.config) for teacher in teachers]
        own = embedding_width(config)
        compared = set(EMBEDDING_LOSSES) & set(losses) and set(dims) - {own}
        self.projectors = nn.ModuleList(
            nn.Identity() if dim == own else EmbeddingProjector(own, dim) for dim in dims if compared
        )
        if "hidden" in losses:
            if not teachers:
                raise ValueError("The hidden loss needs the teacher itself, of whose streams a cache has none.")
            _check_same_inputs(config, teachers[0].config, ("image_size", "patch_size"))  # token by token
            self.stream_projectors = stream_projectors(config, teachers[0].config)

    def _apply(self, fn, *args, **kwargs):
        for teacher in self._teachers:
            teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        chunks = self._taught(chunks)
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
    def _taught(self, chunks: Sequence[Batch]) -> list[Batch]:
        """Chunks with what their teachers make of them; streams only of a single one, as many are too large."""
        taught = list(chunks)
        for index, chunk in enumerate(chunks):
            if self._teachers and "teacher_embeds" not in chunk:
                found = [_encode(teacher, {}, chunk, "hidden" in self.losses) for teacher in self._teachers]
                streams = {"teacher_streams": found[0][2]} if len(chunks) == 1 else {}
                taught[index] = {**chunk, **streams, "teacher_embeds": [one[:2] for one in found]}
        return taught

    def _teacher_features(self, chunks: Sequence[Batch]) -> list[ClipFeatures]:
        embeds = [
            [(images.float(), texts.float()) for images, texts in chunk.get("teacher_embeds", ())] for chunk in chunks
        ]
        return [
            _features(of_teacher, torch.tensor(self.initial_logit_scale, device=of_teacher[0][0].device))
            for of_teacher in zip(*embeds, strict=True)
        ]

    def _encoded(self, model: nn.Module, weights: dict[str, torch.Tensor], chunk: Batch) -> tuple[torch.Tensor, ...]:
        if "hidden" not in self.losses:
            return super()._encoded(model, weights, chunk)
        images, texts, streams = self._encode(model, weights, chunk, True)
        if (theirs := chunk.get("teacher_streams")) is None:
            with torch.no_grad():
                theirs = _encode(self._teachers[0], {}, chunk, True)[2]
        errors = [
            hidden_errors([self.stream_projectors[name](one) for one in streams[name]], theirs[name], counts)
            for name, counts in (("vision", None), ("text", chunk["attention_mask"]))
        ]
        return images, texts, sum(errors)


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
        ValueError: If the student is as large as its teacher, so that nothing is mapped, for the hidden loss, whose
            projections are trained with a student, or as above.
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
        if "hidden" in losses:
            raise ValueError("The mapping stage knows no hidden loss; leave it out, or use it in distillation.")
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


def _encode(
    model: nn.Module, weights: dict[str, torch.Tensor], chunk: Batch, hidden: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Sequence[torch.Tensor]]]:
    """
    The normalized embeddings of a chunk's images and texts, and if asked for, by tower, the streams that its layers
    leave. `weights` take the place of the model's own.
    """
    inputs = {name: chunk[name] for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = normalized_pixels(chunk)
    inputs |= {"output_hidden_states": True} if hidden else {}
    output = functional_call(model, weights, args=(), kwargs=inputs) if weights else model(**inputs)
    towers = {"vision": output.vision_model_output, "text": output.text_model_output} if hidden else {}
    return *ClipFeatures.embeds(output), {name: tower.hidden_states[1:] for name, tower in towers.items()}


def _features(
    chunks: Sequence[tuple[torch.Tensor, ...]], logit_scale: torch.Tensor, logit_bias: torch.Tensor | None = None
) -> ClipFeatures:
    """What was read of chunks put together, of all processes."""
    images, texts, *errors = (gather(torch.cat(pieces)) for pieces in zip(*chunks, strict=True))
    return ClipFeatures(images, texts, logit_scale.float().exp(), *errors, logit_bias=logit_bias)


def _check_same_inputs(
    student: PretrainedConfig, teacher: PretrainedConfig, vision: Sequence[str] = ("image_size",)
) -> None:
    for tower, names in (
        ("vision", vision),
        ("text", ("vocab_size", "eos_token_id", "max_position_embeddings")),
    ):
        for name in names:
            values = [getattr(getattr(config, f"{tower}_config"), name) for config in (student, teacher)]
            if values[0] != values[1]:
                raise ValueError(
                    f"Student and teacher must read the same inputs, but {tower}_config.{name} is {values[0]} in the "
                    f"student and {values[1]} in the teacher."
                )
