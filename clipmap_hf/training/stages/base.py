"""What all training stages have in common: a student, chunks of a batch, gradient caching, the logit scale."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from clipmap_hf.data.collate import normalized_pixels
from clipmap_hf.distributed import gather, process_count
from clipmap_hf.models.batch_norms import batch_norms, statistics_of
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.training.stages.logits import clamp_scale, logit_parameters, set_scale


__all__ = ["AFFINITY", "CONTRASTIVE", "Batch", "Stage", "encode_chunk", "joined_features"]

AFFINITY = MappingProxyType({"affinity": 1.0})
CONTRASTIVE = MappingProxyType({"contrastive": 1.0})
Batch = Mapping[str, torch.Tensor]


def encode_chunk(
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


class Stage(nn.Module):
    """
    A training stage. The loop calls it on the chunks of a batch and knows nothing else of it.

    Of several chunks, only the embeddings are kept; the loss spans them all, and those of all processes, and in its
    backward pass every chunk is computed once more, with the same random numbers, for its gradient (gradient caching).
    So a step needs the memory of one chunk, a third more time, and has the gradient of the whole batch.

    Args:
        trained: The module whose parameters are trained; it has a `logit_scale` (the logarithm).
        logit_scale: Reciprocal temperature of all logits, the teacher's included (Tables 8 and 9: 50). It is that
            of the losses: the model keeps its own, which it has from its teacher.
        learn_logit_scale: Whether to train the model's from there, clamped at 100 as CLIP's.
    """

    averages_gradients = False  # whether backward leaves the mean of all processes, so that no wrapper has to
    swaps_weights = False  # whether the forward pass has others in their place, which FSDP would put back
    encoder = staticmethod(encode_chunk)  # of what student and teachers read of a chunk

    def __init__(self, trained: nn.Module, *, logit_scale: float = 50.0, learn_logit_scale: bool = False):
        super().__init__()
        self.trained = trained
        self._norms = batch_norms(trained)
        self.initial_logit_scale = math.log(logit_scale)
        self._uses_own_scale = False
        trained.logit_scale.requires_grad_(False)
        if learn_logit_scale:
            self._set_scale(learn=True)
        self._encode = self.encoder

    def forward(self, chunks: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Returns `{"loss": …}` over the chunks of all processes, and the scalars to log."""
        raise NotImplementedError

    def student(self) -> nn.Module:
        """Returns the `CLIPModel` as it stands, to evaluate."""
        return self.trained

    def export(self) -> nn.Module:
        """Returns the model as it stands, to write."""
        return self.student()

    def statistics(self) -> list[torch.Tensor]:
        """Returns what a forward pass in training changes by itself: the statistics of BatchNorms."""
        return statistics_of(self._norms)

    def after_step(self) -> None:
        """Keeps a learned logit scale within CLIP's bound; called after every optimizer step."""
        clamp_scale(self.trained)

    def compile_encoder(self) -> None:
        """Lets `torch.compile` make the student's forward and backward pass faster, which takes a while at first."""
        self._encode = torch.compile(self.encoder)

    def _student_model(self, chunks: Sequence[Batch]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """Returns the module that encodes these chunks, and weights that take the place of its own."""
        return self.trained, {}

    def _student_features(self, chunks: Sequence[Batch]) -> ClipFeatures:
        if self.training and (len(chunks) > 1 or process_count() > 1) and self.statistics():
            raise ValueError(
                "A model with BatchNorms is trained on whole batches in one process: chunks, or processes, would each "
                "have statistics of their own, and the gradient would not be the batch's. Leave micro_batch_size out, "
                "and start one process."
            )
        model = self._student_model(chunks)
        if len(chunks) == 1:
            embeds = [self._encoded(*model, chunks[0])]
        else:
            embeds = [checkpoint(self._encoded, *model, chunk, use_reentrant=False) for chunk in chunks]
        scale, *bias = logit_parameters(self.trained)
        if not self._uses_own_scale:
            scale = torch.tensor(self.initial_logit_scale, device=embeds[0][0].device)
        return joined_features(embeds, scale, *bias)

    def _set_scale(self, learn: bool) -> None:
        """Gives the model the scale of the losses, for good."""
        self._uses_own_scale = True
        set_scale(self.trained, math.exp(self.initial_logit_scale), learn)

    def _encoded(self, model: nn.Module, weights: dict[str, torch.Tensor], chunk: Batch) -> tuple[torch.Tensor, ...]:
        """Encodes a chunk to what the loss reads, in rows that are pairs: the first fields of `ClipFeatures`."""
        return self._encode(model, weights, chunk)[:2]


def joined_features(
    chunks: Sequence[tuple[torch.Tensor, ...]], logit_scale: torch.Tensor, logit_bias: torch.Tensor | None = None
) -> ClipFeatures:
    """Joins what was read of all chunks and processes."""
    images, texts, *errors = (gather(torch.cat(pieces)) for pieces in zip(*chunks, strict=True))
    return ClipFeatures(images, texts, logit_scale.float().exp(), *errors, logit_bias=logit_bias)
