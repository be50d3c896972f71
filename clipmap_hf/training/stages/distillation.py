"""The stage that trains all weights of a student against frozen teachers."""

from collections.abc import Callable, Mapping, Sequence
from itertools import starmap

import torch
from torch import nn
from transformers import PretrainedConfig

from clipmap_hf.config import embedding_width
from clipmap_hf.families import family_for
from clipmap_hf.losses import EMBEDDING_LOSSES, LOSSES, check_losses, loss_weights
from clipmap_hf.losses.hidden import hidden_errors
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.training.stages.base import AFFINITY, Batch, Stage, encode_chunk, joined_features
from clipmap_hf.training.stages.logits import learn_bias
from clipmap_hf.training.stages.projectors import EmbeddingProjector, stream_projectors


__all__ = ["DistillationStage"]


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
        losses: Weights by name, a key of `LOSSES`, or functions of your own, as `check_losses` takes them.
        logit_scale: As in `Stage`.
        learn_logit_scale: As in `Stage`.
        teacher_dims: Widths of the teachers' embeddings, if chunks bring them.

    Raises:
        ValueError: If a loss is unknown, its weight negative or its teacher missing, or the models read different
            inputs.
    """

    def __init__(
        self,
        trained: nn.Module,
        *,
        teachers: Sequence[nn.Module] = (),
        losses: Mapping[str, float | Callable] = AFFINITY,
        logit_scale: float = 50.0,
        learn_logit_scale: bool = False,
        teacher_dims: Sequence[int] = (),
    ):
        super().__init__(trained, logit_scale=logit_scale, learn_logit_scale=learn_logit_scale)
        check_losses(losses)
        if learn_bias(trained, losses) and not learn_logit_scale:
            self._set_scale(learn=False)  # a bias that is learned belongs to the scale that it is learned with
        config = trained.config
        for teacher in teachers:
            _check_same_inputs(config, teacher.config)
        self.losses = loss_weights(losses)
        self._functions = LOSSES | {name: value for name, value in losses.items() if callable(value)}
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
            for one in (config, teachers[0].config):
                if not family_for(one).transformers:
                    raise ValueError(
                        "The hidden loss compares the tokens of transformers, which a vision tower of a model of type "
                        f"{one.model_type!r} does not have; leave it out."
                    )
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
            value = self._functions[name](student, *teachers)
            if not isinstance(value, torch.Tensor) or value.ndim:
                raise ValueError(f"The loss {name!r} must return a tensor with a single number, got {value!r}.")
            return value
        projected = [projector(student) for projector in self.projectors]
        return sum(starmap(LOSSES[name], zip(projected, teachers, strict=True))) / len(teachers)

    @torch.no_grad()
    def _taught(self, chunks: Sequence[Batch]) -> list[Batch]:
        """Adds to chunks what the teachers embed; streams are added to a single chunk only, for many are too large."""
        taught = list(chunks)
        for index, chunk in enumerate(chunks):
            if self._teachers and "teacher_embeds" not in chunk:
                found = [self.encoder(teacher, {}, chunk, "hidden" in self.losses) for teacher in self._teachers]
                streams = {"teacher_streams": found[0][2]} if len(chunks) == 1 else {}
                taught[index] = {**chunk, **streams, "teacher_embeds": [embeds[:2] for embeds in found]}
        return taught

    def _teacher_features(self, chunks: Sequence[Batch]) -> list[ClipFeatures]:
        embeds = [
            [(images.float(), texts.float()) for images, texts in chunk.get("teacher_embeds", ())] for chunk in chunks
        ]
        return [
            joined_features(found, torch.tensor(self.initial_logit_scale, device=found[0][0].device))
            for found in zip(*embeds, strict=True)
        ]

    def _encoded(self, model: nn.Module, weights: dict[str, torch.Tensor], chunk: Batch) -> tuple[torch.Tensor, ...]:
        if "hidden" not in self.losses:
            return super()._encoded(model, weights, chunk)
        images, texts, streams = self._encode(model, weights, chunk, True)
        if (theirs := chunk.get("teacher_streams")) is None:
            with torch.no_grad():
                theirs = encode_chunk(self._teachers[0], {}, chunk, True)[2]
        errors = [
            hidden_errors([self.stream_projectors[name](stream) for stream in streams[name]], theirs[name], counts)
            for name, counts in (("vision", None), ("text", chunk["attention_mask"]))
        ]
        return images, texts, sum(errors)


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
