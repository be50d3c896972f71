"""Sequential refit of a ResNet: its convolutions are solved front to back, each on what the ones before leave."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from clipmap_hf.files.tensor_store import TensorStore
from clipmap_hf.models.clip_resnet.config import CLIPResNetVisionConfig
from clipmap_hf.models.clip_resnet.tower import Bottleneck
from clipmap_hf.starts.calibrated.progress import layer_progress
from clipmap_hf.starts.calibrated.resnet.blocks import block_segments, block_sources
from clipmap_hf.starts.calibrated.resnet.channels import count_images
from clipmap_hf.starts.calibrated.resnet.convolutions import (
    Example,
    Run,
    input_of,
    output_of,
    solve_from,
    solve_units,
)
from clipmap_hf.starts.calibrated.resnet.descent import descend_resnet
from clipmap_hf.starts.calibrated.resnet.norms import take_statistics
from clipmap_hf.starts.calibrated.statistics import POOLED_WEIGHT


__all__ = ["refit_resnet"]

Batch = Mapping[str, torch.Tensor]

_RIDGE = 1e-3
_PROJECTION_RIDGE = 1e-2  # larger, for only one row of each image reaches the projection


class _Part(NamedTuple):
    """A part of a tower: the module whose layers it has, and what runs it."""

    owner: nn.Module
    run: Run


@dataclass
class ImageStreams:
    """A batch where the current part of the tower begins, in the teacher and in the student."""

    teacher: torch.Tensor
    student: torch.Tensor


@torch.no_grad()
def refit_resnet(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    operators: Mapping[str, torch.Tensor],
    layers: Mapping[str, Sequence[int]],
    batches: Iterable[Batch],
    steps: int = 0,
) -> None:
    """
    Solves a student's ResNet by ridge regression, front to back. Each convolution reads what the student has computed
    before it, and is solved for what the teacher's BatchNorm gives at the channels that are kept. So it corrects what
    the ones before it left wrong:

    1. The convolutions of the stem, and the first two of each block, are solved one by one.
    2. The last convolution of a block is solved for what the teacher's last block of a segment hands to its ReLU, less
       what goes past the student's convolutions. That of a stage's first block is solved together with the one that
       goes past it. A segment goes from one kept block to the next.
    3. The attention pool's queries, keys and values are solved for the teacher's, at the heads that are kept, and then
       what they are projected by, for the teacher's embeddings.

    The ridge pulls to the teacher's own weights. Kept are the streams of the current block, in memory or in temporary
    files; of large images, some places are drawn to solve by. Gradient descent on the whole tower then repairs what
    solving layers one by one cannot (`descend_resnet`). At last, the BatchNorms get the statistics of what they read
    (`take_statistics`).

    Args:
        student: Changed in place; mapped by `operators`.
        teacher: The teacher.
        operators: One-hot, as `ChannelStatistics.operators` gives them.
        layers: The teacher's blocks, without the first, that those of each stage start from, by stack.
        batches: As `calibration_batch` gives them, at least one in each process.
        steps: Steps of gradient descent.
    """
    tower = _ResNetRefit(student.vision_model, teacher.vision_model, operators, batches)
    with layer_progress(student.config.vision_config.num_hidden_layers) as block_is_done:
        tower.refit_stem()
        for stage in range(len(student.vision_model.stages)):
            for line in tower.refit_stage(stage, layers.get(f"vision_layers_{stage}", ())):
                block_is_done(line)
        tower.refit_pool(operators.get("embed"))
    if steps:
        descend_resnet(student.vision_model, teacher.vision_model, tower.kept, operators.get("embed"), batches, steps)
    take_statistics(student, batches)


class _ResNetRefit:
    """The student's tower, and how far its refit has come."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, operators: Mapping[str, torch.Tensor], batches: Iterable[Batch]
    ):
        self.student, self.teacher = student, teacher
        self.device = teacher.conv1.weight.device
        self.kept = {
            name.removeprefix("vision_"): operator.argmax(dim=-1)
            for name, operator in operators.items()
            if name.startswith("vision_")
        }
        self.images = count_images(batches, self.device)
        self.streams, self.store = [], TensorStore()
        largest = max(_stream_sizes(teacher.config)) + max(_stream_sizes(student.config))
        for batch in batches:
            pixels = batch["pixel_values"]
            self.store.expect(2 * largest * len(pixels) * pixels.element_size())  # those before a block and behind it
            self.streams.append(ImageStreams(pixels, pixels))

    def refit_stem(self) -> None:
        """Solves the stem, and goes on behind it."""
        part, source = _Part(self.student, self.student.stem), _Part(self.teacher, self.teacher.stem)
        for place in "123":
            self._solve_within(part, source, place, self.kept[f"stem{place}"])
        self._go_on(part.run, source.run)

    def refit_stage(self, stage: int, begins: Sequence[int]) -> Iterable[str]:
        """Solves the blocks of a stage, and goes on behind them; yields a line about each."""
        sources, blocks = self.teacher.stages[stage], self.student.stages[stage]
        parts = zip(blocks, block_sources(begins), block_segments(begins, len(sources)), strict=True)
        for index, (block, source, segment) in enumerate(parts):
            for before in sources[segment.start : source]:
                self._go_on(None, before)
            for place, letter in zip("12", "ab", strict=True):
                kept = self.kept[f"{'inner' if index else 'first'}{stage + 1}{letter}"]
                kept = kept[source - 1] if index else kept
                self._solve_within(_Part(block, block), _Part(sources[source], sources[source]), place, kept)
            for before in sources[source : segment.stop - 1]:
                self._go_on(None, before)
            last = sources[segment.stop - 1]
            self._solve_sum(block, last, self.kept[f"stream{stage + 1}"])
            self._go_on(block, last)
            yield f"vision stage {stage + 1}, block {index + 1} of {len(blocks)}, stands for {_names(segment)}"

    def refit_pool(self, embed: torch.Tensor | None) -> None:
        """Solves the attention pool; `embed` maps the teacher's embeddings, if the student's are smaller."""
        pool, source, heads = self.student.attnpool, self.teacher.attnpool, self.kept["pool_value"]
        linears, sources = ([one.q_proj, one.k_proj, one.v_proj] for one in (pool, source))

        def lined_up() -> Iterable[Example]:
            for student, teacher in self._loaded():
                inputs, places = pool.places(student), source.places(teacher)
                weights = torch.ones_like(inputs[..., 0])
                weights[:, 0] = POOLED_WEIGHT
                targets = torch.cat([linear(places)[..., heads] for linear in sources], dim=-1)
                yield inputs.flatten(0, 1), targets.flatten(0, 1), weights.flatten()

        def pooled() -> Iterable[Example]:
            for student, teacher in self._loaded():
                embeds = source(teacher) if embed is None else source(teacher) @ embed.T
                yield pool.attended(pool.places(student)), embeds, embeds.square().sum(dim=1).reciprocal()

        weight, bias = solve_from(torch.cat([linear.weight for linear in linears]), lined_up(), _RIDGE)
        for linear, *own in zip(linears, weight.chunk(3), bias.chunk(3), strict=True):
            _set_linear(linear, *own)
        _set_linear(pool.c_proj, *solve_from(pool.c_proj.weight, pooled(), _PROJECTION_RIDGE))

    def _solve_within(self, part: _Part, source: _Part, place: str, kept: torch.Tensor) -> None:
        """Solves a convolution for what the norm behind the teacher's gives."""
        conv, norm = (getattr(part.owner, f"{name}{place}") for name in ("conv", "bn"))
        target = getattr(source.owner, f"bn{place}")
        examples = (
            ([input_of(conv, part.run, student)], output_of(target, source.run, teacher)[:, kept])
            for student, teacher in self._loaded()
        )
        solve_units([(conv, norm)], examples, self.images)

    def _solve_sum(self, block: Bottleneck, source: Bottleneck, kept: torch.Tensor) -> None:
        """Solves what a block adds up for what the teacher's adds up."""
        solved = [(block.conv3, block.bn3)]
        if block.downsample is not None:
            solved.append((getattr(block.downsample, "0"), getattr(block.downsample, "1")))

        def examples() -> Iterable[tuple[list[torch.Tensor], torch.Tensor]]:
            for student, teacher in self._loaded():
                target = (source.added(teacher) + source.skipped(teacher))[:, kept]
                target = target - student if block.downsample is None else target
                yield [input_of(conv, block, student) for conv, _ in solved], target

        solve_units(solved, examples(), self.images)

    def _go_on(self, part: Run | None, source: Run) -> None:
        """Goes on behind a part of the teacher, and of the student if that is done, too."""
        for streams in self.streams:
            streams.teacher = self.store.keep(source(streams.teacher.to(self.device)))
            if part is not None:
                streams.student = self.store.keep(part(streams.student.to(self.device)))

    def _loaded(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """The streams of the student and of the teacher."""
        for streams in self.streams:
            yield streams.student.to(self.device), streams.teacher.to(self.device)


def _set_linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _stream_sizes(config: CLIPResNetVisionConfig) -> list[int]:
    """Numbers of an image and of what the stem and each stage make of it."""
    channels = [config.num_channels, config.stem_widths[-1], *config.stream_widths]
    edges = [config.image_size // scale for scale in (1, 4, 4, 8, 16, 32)]
    return [count * edge**2 for count, edge in zip(channels, edges, strict=True)]


def _names(segment: range) -> str:
    """The teacher's blocks of a segment, counted from 1."""
    first, last = segment.start + 1, segment.stop
    return f"the teacher's {first}" if first == last else f"the teacher's {first} to {last}"
