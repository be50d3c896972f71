"""Sequential refit: a student's layers solved in order, each from what its own, already smaller, past gives it."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, starmap

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from clipmap_hf.distributed import process_count, sum_over_processes
from clipmap_hf.mapping.calibration import TowerStatistics, normalized, token_weights
from clipmap_hf.mapping.moments import Moments
from clipmap_hf.mapping.scores import head_channels, strongest
from clipmap_hf.mapping.towers import Tower, pooled


__all__ = ["refit"]

Batch = Mapping[str, torch.Tensor]

IN_MEMORY = 2**31  # bytes of a process's streams; what is more is kept in files
_RIDGE = 1e-3
_PROJECTION_RIDGE = 1e-2  # one token of each pair speaks for it
_LEARNING_RATE = 1e-3
_STEP_TOKENS = 2048  # about as many are in a step of gradient descent


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    statistics: Mapping[str, TowerStatistics],
    operators: Mapping[str, torch.Tensor],
    layers: Mapping[str, list[int]],
    batches: Iterable[Batch],
    steps: int = 0,
) -> None:
    """
    Solves all linear layers of both towers by ridge regression, front to back, and their final LayerNorms. A student
    layer stands for a segment of the teacher's, from one kept layer to the next, and corrects what the layers before
    it left wrong:

    1. Of all heads in the segment, those with most energy are kept. They read the student's stream through a lift: the
       least-squares guess of what they read in the teacher.
    2. `out_proj` is solved for the mapped stream with all that the segment's attention adds.
    3. Of all neurons in the segment, those with most energy are kept, and read in the same way.
    4. `fc2` is solved for the mapped stream behind the segment.

    Last, the projection is solved for the teacher's normalized embeddings. Gradient descent then repairs what solving
    one layer after another cannot. No activations are kept but the streams that the towers begin with and those of the
    current segment, in memory or in temporary files; several processes share the pairs.

    Args:
        student: Changed in place; its embeddings and `pre_layrnorm` are mapped already.
        teacher: Folded.
        statistics: Of the teacher, by tower.
        operators: As `calibrated` gives them.
        layers: The teacher's layers that the segments begin with, by tower, ascending; the first begins at 0 always.
        batches: As `calibration_batch` gives them, at least one in each process; read once for each tower.
        steps: Steps of gradient descent on each layer after it was solved, for the mapped stream behind the segment,
            and last on all of a tower behind its embeddings, for the teacher's normalized embeddings.
    """
    for name, of_tower in statistics.items():
        towers = (Tower(teacher, name), Tower(student, name))
        segments = list(starmap(range, pairwise([0, *layers[name][1:], len(towers[0].layers)])))
        longest = max(len(segment) for segment in segments)
        tower = _TowerRefit(*towers, operators[f"{name}_residual"], of_tower, batches, longest)
        for layer, segment in zip(towers[1].layers, segments, strict=True):
            tower.refit_layer(layer, segment, steps)
        tower.refit_projection(operators.get("embed"))
        if steps:
            tower.descend(steps)


@dataclass
class _Streams:
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


Examples = Iterable[tuple[_Streams, torch.Tensor, torch.Tensor]]  # inputs and targets, (items, tokens, width)


class _TowerRefit:
    """One tower, as far as it is refitted."""

    def __init__(
        self,
        teacher: Tower,
        student: Tower,
        residual: torch.Tensor,
        statistics: TowerStatistics,
        batches: Iterable[Batch],
        longest_segment: int,
    ):
        self.teacher, self.student, self.residual, self.statistics = teacher, student, residual, statistics
        self.epsilon = student.config.layer_norm_eps
        self.streams, self.held = [], 0
        for batch in batches:
            batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
            big, small = teacher.embed(batch), student.embed(batch)
            weights = token_weights(teacher, batch, big)
            self.held += (1 + longest_segment) * big.nbytes + 4 * small.nbytes
            kept = self._keep(small)
            self.streams.append(_Streams(weights, teacher.ends(batch), kept, self._keep(big), kept))

    def refit_layer(self, layer: nn.Module, segment: range, steps: int) -> None:
        """Solves one layer of the student for a segment of the teacher's, and goes on behind both."""
        config, attention, mlp = self.student.config, layer.self_attn, layer.mlp
        heads = _strongest_of(self.statistics.head_energy, segment, config.num_attention_heads)
        neurons = _strongest_of(self.statistics.neuron_energy, segment, config.intermediate_size)
        for norm in (layer.layer_norm1, layer.layer_norm2):
            norm.weight.fill_(1)
            norm.bias.zero_()
        lifts = _solve(self._go_through(segment, list(heads), list(neurons)))
        channels = {index: head_channels(of_layer, attention.head_dim) for index, of_layer in heads.items()}
        for name in ("q_proj", "k_proj", "v_proj"):
            sources = {index: getattr(self.teacher.layers[index].self_attn, name) for index in heads}
            _set(getattr(attention, name), _reading(lifts, sources, channels))
        students = ((one, self._load(one.student)) for one in self.streams)
        examples = ((one, self.student.attended(layer, x), self._load(one.attended) - x) for one, x in students)
        _set(attention.out_proj, _solve(examples))
        middles = self._middles(layer)
        lifts = _solve((one, normalized(x, self.epsilon), self._load(one.reads)) for one, x in middles)
        _set(mlp.fc1, _reading(lifts, {index: self.teacher.layers[index].mlp.fc1 for index in neurons}, neurons))
        middles = self._middles(layer)
        examples = ((one, self.student.activated(layer, x), self._load(one.behind) - x) for one, x in middles)
        _set(mlp.fc2, _solve(examples))
        if steps:
            self._descend(layer, steps, partial(self._error_behind, layer))
        for one, x in self._middles(layer):
            one.student = self._keep(self.student.behind(layer, x))

    def refit_projection(self, embed: torch.Tensor | None) -> None:
        """Solves the projection; `embed` maps the teacher's embeddings, if the student's are smaller."""
        projection = self.student.projection
        moments = Moments(projection.in_features, projection.out_features, device=self.teacher.device)
        for one in self.streams:
            targets = F.normalize(self.teacher.embeds(self._load(one.teacher), one.ends), dim=-1)
            targets = targets if embed is None else targets @ embed.T
            moments.add(normalized(pooled(self._load(one.student), one.ends), self.epsilon), targets)
            one.embeds = F.normalize(targets, dim=-1)
        moments.sum_over_processes()
        weight, bias = moments.solve(_PROJECTION_RIDGE)
        projection.weight.copy_(weight)
        self.student.final_norm.weight.fill_(1)
        self.student.add_constant(bias)

    def descend(self, steps: int) -> None:
        """Brings the student's embeddings nearer to the teacher's, with all layers at once."""
        student = self.student
        self._descend(nn.ModuleList([student.layers, student.final_norm, student.projection]), steps, self._error)

    def _error(self, one: _Streams, items: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of some items' normalized embeddings."""
        stream = self._load(one.first[items])
        for layer in self.student.layers:
            stream = self.student.through(layer, stream)
        embeds = self.student.embeds(stream, one.ends[items])
        return (F.normalize(embeds, dim=-1) - one.embeds[items]).square().sum(dim=-1).mean()

    def _error_behind(self, layer: nn.Module, one: _Streams, items: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the stream behind a layer, of some items."""
        stream, target, weights = self._load(one.student[items]), self._load(one.behind[items]), one.weights[items]
        behind = self.student.through(layer, stream)
        return ((behind - target).square().mean(dim=-1) * weights).sum() / weights.sum()

    def _go_through(self, segment: range, heads: list[int], neurons: list[int]) -> Examples:
        """Takes the teacher's streams behind the segment; yields what its attention reads beside the student's."""
        for one in self.streams:
            student, stream = self._load(one.student), self._load(one.teacher)
            attended, reads, middles = stream, [], []
            for index in segment:
                layer = self.teacher.layers[index]
                middle = self.teacher.middle(layer, stream)
                reads += [normalized(stream, self.epsilon)] * (index in heads)
                middles += [normalized(middle, self.epsilon)] * (index in neurons)
                attended = attended + (middle - stream)
                stream = self.teacher.behind(layer, middle)
            one.attended = self._keep(attended @ self.residual.T)
            one.reads = self._keep(torch.cat(middles, dim=-1))
            one.behind, one.teacher = self._keep(stream @ self.residual.T), self._keep(stream)
            yield one, normalized(student, self.epsilon), torch.cat(reads, dim=-1)

    def _middles(self, layer: nn.Module) -> Iterator[tuple[_Streams, torch.Tensor]]:
        """What the student's `layer_norm2` reads."""
        for one in self.streams:
            yield one, self.student.middle(layer, self._load(one.student))

    @torch.enable_grad()
    def _descend(self, module: nn.Module, steps: int, error: Callable[[_Streams, torch.Tensor], torch.Tensor]) -> None:
        parameters = list(module.requires_grad_(True).parameters())
        optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            one = self.streams[int(torch.randint(len(self.streams), (), generator=generator))]
            items = torch.randperm(len(one.weights), generator=generator)[: _STEP_TOKENS // one.weights.shape[1] + 1]
            gradients = torch.autograd.grad(error(one, items), parameters)
            sum_over_processes(gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient / process_count()
            optimizer.step()
            schedule.step()
        module.requires_grad_(False).zero_grad()

    def _keep(self, stream: torch.Tensor) -> torch.Tensor:
        if self.held <= IN_MEMORY:
            return stream.cpu()
        with tempfile.TemporaryFile() as file:  # without a name; its space is free when the tensor is
            array = np.memmap(file, np.float32, "w+", shape=tuple(stream.shape))
        kept = torch.from_numpy(array)
        return kept.copy_(stream)

    def _load(self, stream: torch.Tensor) -> torch.Tensor:
        return stream.to(self.teacher.device)


def _solve(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the linear layer that gives the targets from the inputs."""
    moments = None
    for one, inputs, targets in examples:
        if moments is None:
            moments = Moments(inputs.shape[-1], targets.shape[-1], device=inputs.device)
        counted = one.weights > 0
        moments.add(inputs[counted], targets[counted], one.weights[counted])
    moments.sum_over_processes()
    return moments.solve(_RIDGE)


def _reading(
    lifts: tuple[torch.Tensor, torch.Tensor], sources: Mapping[int, nn.Linear], rows: Mapping[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias that read through lifts, side by side for the sources, what some rows of these read."""
    weights, biases = [], []
    for index, weight, bias in zip(sources, *(lift.chunk(len(sources)) for lift in lifts), strict=True):
        kept = sources[index].weight[rows[index]]
        weights.append(kept @ weight)
        biases.append(sources[index].bias[rows[index]] + kept @ bias)
    return torch.cat(weights), torch.cat(biases)


def _set(linear: nn.Linear, solved: tuple[torch.Tensor, torch.Tensor]) -> None:
    linear.weight.copy_(solved[0])
    linear.bias.copy_(solved[1])


def _strongest_of(energy: torch.Tensor, segment: range, count: int) -> dict[int, torch.Tensor]:
    """The most energetic entries of a segment's layers together, by layer, where a layer has any; ascending."""
    size = energy.shape[1]
    kept = strongest(energy[segment.start : segment.stop].flatten(), count)
    of_layers = {index: kept[kept // size == index - segment.start] % size for index in segment}
    return {index: entries for index, entries in of_layers.items() if len(entries)}
