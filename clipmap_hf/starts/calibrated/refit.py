"""Sequential refit: a student's layers are solved front to back, each on the stream that the layers before leave."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise, starmap

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from clipmap_hf.files.tensor_store import TensorStore
from clipmap_hf.models.towers import Tower, pooled
from clipmap_hf.starts.calibrated.descent import descend
from clipmap_hf.starts.calibrated.moments import Moments
from clipmap_hf.starts.calibrated.progress import layer_progress
from clipmap_hf.starts.calibrated.statistics import TowerStatistics, normalized, token_weights
from clipmap_hf.starts.calibrated.streams import SegmentPass, Streams
from clipmap_hf.starts.selection.scores import head_channels, strongest


__all__ = ["refit"]

Batch = Mapping[str, torch.Tensor]

_RIDGE = 1e-3
_PROJECTION_RIDGE = 1e-2  # larger, for only one token of each pair reaches the projection


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
    layers one by one cannot. No activations are kept but the streams that the towers begin with and those of the
    current segment, in memory or in temporary files; several processes share the pairs.

    Args:
        student: Changed in place; its embeddings and `pre_layrnorm` are mapped already.
        teacher: Folded.
        statistics: Of the teacher, by tower.
        operators: As `calibrated_operators` gives them.
        layers: The teacher's layers that the segments begin with, by tower, ascending; the first begins at 0 always.
        batches: As `calibration_batch` gives them, at least one in each process.
        steps: Steps of gradient descent on each layer after it was solved, for the mapped stream behind the segment,
            and last on all of a tower behind its embeddings, for the teacher's normalized embeddings.
    """
    count = sum(len(layers[name]) for name in statistics)
    with layer_progress(count) as layer_is_done:
        for name, found in statistics.items():
            towers = (Tower(teacher, name), Tower(student, name))
            segments = list(starmap(range, pairwise([0, *layers[name][1:], len(towers[0].layers)])))
            longest = max(len(segment) for segment in segments)
            tower = _TowerRefit(*towers, operators[f"{name}_residual"], found, batches, longest)
            for index, (layer, segment) in enumerate(zip(towers[1].layers, segments, strict=True)):
                tower.refit_layer(layer, segment, steps)
                layer_is_done(f"{name} layer {index + 1} of {len(segments)} stands for {_names(segment)}")
            tower.refit_projection(operators.get("embed"))
            if steps:
                tower.descend(steps)


Examples = Iterable[tuple[Streams, torch.Tensor, torch.Tensor]]  # inputs and targets, (items, tokens, width)


class _TowerRefit:
    """A tower of the student, and how far its refit has come."""

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
        self.streams, self.store = [], TensorStore()
        for batch in batches:
            batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
            big, small = teacher.embed(batch), student.embed(batch)
            weights = token_weights(teacher, batch, big)
            self.store.expect((1 + longest_segment) * big.nbytes + 4 * small.nbytes)
            first = self.store.keep(small)
            self.streams.append(Streams(weights, teacher.ends(batch), first, self.store.keep(big), first))

    def refit_layer(self, layer: nn.Module, segment: range, steps: int) -> None:
        """Solves a layer of the student for a segment of the teacher's, and goes on behind both."""
        config = self.student.config
        heads = _strongest_of(self.statistics.head_energy, segment, config.num_attention_heads)
        neurons = _strongest_of(self.statistics.neuron_energy, segment, config.intermediate_size)
        for norm in (layer.layer_norm1, layer.layer_norm2):
            norm.weight.fill_(1)
            norm.bias.zero_()
        lifts = self._follow_teacher(segment, list(heads), list(neurons)).solve(_RIDGE)
        self._refit_attention(layer, heads, lifts)
        self._refit_mlp(layer, neurons)
        if steps:
            descend(layer, self.streams, steps, partial(self._error_behind, layer))
        for streams in self.streams:
            streams.student = self.store.keep(self.student.through(layer, self._load(streams.student)))

    def refit_projection(self, embed: torch.Tensor | None) -> None:
        """Solves the projection; `embed` maps the teacher's embeddings, if the student's are smaller."""
        projection = self.student.projection
        moments = Moments(projection.in_features, projection.out_features, device=self.teacher.device)
        for streams in self.streams:
            targets = F.normalize(self.teacher.embeds(self._load(streams.teacher), streams.ends), dim=-1)
            targets = targets if embed is None else targets @ embed.T
            moments.add(normalized(pooled(self._load(streams.student), streams.ends), self.epsilon), targets)
            streams.embeds = F.normalize(targets, dim=-1)
        moments.sum_over_processes()
        weight, bias = moments.solve(_PROJECTION_RIDGE)
        projection.weight.copy_(weight)
        self.student.final_norm.weight.fill_(1)
        self.student.add_constant(bias)

    def descend(self, steps: int) -> None:
        """Brings the student's embeddings nearer to the teacher's, with all layers at once."""
        student = self.student
        parts = nn.ModuleList([student.layers, student.final_norm, student.projection])
        descend(parts, self.streams, steps, self._error)

    def _follow_teacher(self, segment: range, heads: list[int], neurons: list[int]) -> Moments:
        """
        Takes the teacher's streams behind the segment, and keeps what the student's layer is to be solved for there.
        Returns the moments of what the teacher's attention reads beside what the student's reads.
        """
        moments = Moments(
            self.student.config.hidden_size,
            len(heads) * self.teacher.config.hidden_size,
            device=self.teacher.device,
        )
        for streams in self.streams:
            passed = self._pass_segment(self._load(streams.teacher), segment, heads, neurons)
            streams.add_to(moments, normalized(self._load(streams.student), self.epsilon), passed.attention_reads)
            streams.attended = self.store.keep(passed.attended @ self.residual.T)
            streams.reads = self.store.keep(passed.mlp_reads)
            streams.behind = self.store.keep(passed.behind @ self.residual.T)
            streams.teacher = self.store.keep(passed.behind)
        moments.sum_over_processes()
        return moments

    def _pass_segment(self, stream: torch.Tensor, segment: range, heads: list[int], neurons: list[int]) -> SegmentPass:
        """Runs the teacher's layers of a segment on streams, of which nothing changes."""
        attended, attention_reads, mlp_reads = stream, [], []
        for index in segment:
            layer = self.teacher.layers[index]
            middle = self.teacher.middle(layer, stream)
            attention_reads += [normalized(stream, self.epsilon)] * (index in heads)
            mlp_reads += [normalized(middle, self.epsilon)] * (index in neurons)
            attended = attended + (middle - stream)
            stream = self.teacher.behind(layer, middle)
        return SegmentPass(torch.cat(attention_reads, dim=-1), torch.cat(mlp_reads, dim=-1), attended, stream)

    def _refit_attention(
        self, layer: nn.Module, heads: Mapping[int, torch.Tensor], lifts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        attention = layer.self_attn
        channels = {index: head_channels(kept, attention.head_dim) for index, kept in heads.items()}
        for name in ("q_proj", "k_proj", "v_proj"):
            sources = {index: getattr(self.teacher.layers[index].self_attn, name) for index in heads}
            _set(getattr(attention, name), _reading(lifts, sources, channels))
        inputs = ((streams, self._load(streams.student)) for streams in self.streams)
        examples = (
            (streams, self.student.attended(layer, x), self._load(streams.attended) - x) for streams, x in inputs
        )
        _set(attention.out_proj, self._solve(examples))

    def _refit_mlp(self, layer: nn.Module, neurons: Mapping[int, torch.Tensor]) -> None:
        mlp = layer.mlp
        middles = self._middles(layer)
        examples = ((streams, normalized(x, self.epsilon), self._load(streams.reads)) for streams, x in middles)
        lifts = self._solve(examples)
        _set(mlp.fc1, _reading(lifts, {index: self.teacher.layers[index].mlp.fc1 for index in neurons}, neurons))
        middles = self._middles(layer)
        examples = (
            (streams, self.student.activated(layer, x), self._load(streams.behind) - x) for streams, x in middles
        )
        _set(mlp.fc2, self._solve(examples))

    def _middles(self, layer: nn.Module) -> Iterator[tuple[Streams, torch.Tensor]]:
        """What the student's `layer_norm2` reads."""
        for streams in self.streams:
            yield streams, self.student.middle(layer, self._load(streams.student))

    def _solve(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the linear layer that gives the targets from the inputs."""
        moments = None
        for streams, inputs, targets in examples:
            if moments is None:
                moments = Moments(inputs.shape[-1], targets.shape[-1], device=inputs.device)
            streams.add_to(moments, inputs, targets)
        moments.sum_over_processes()
        return moments.solve(_RIDGE)

    def _error(self, streams: Streams, items: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of some items' normalized embeddings."""
        stream = self._load(streams.first[items])
        for layer in self.student.layers:
            stream = self.student.through(layer, stream)
        embeds = self.student.embeds(stream, streams.ends[items])
        return (F.normalize(embeds, dim=-1) - streams.embeds[items]).square().sum(dim=-1).mean()

    def _error_behind(self, layer: nn.Module, streams: Streams, items: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the stream behind a layer, of some items."""
        stream, target = self._load(streams.student[items]), self._load(streams.behind[items])
        weights = streams.weights[items]
        behind = self.student.through(layer, stream)
        return ((behind - target).square().mean(dim=-1) * weights).sum() / weights.sum()

    def _load(self, stream: torch.Tensor) -> torch.Tensor:
        return stream.to(self.teacher.device)


def _names(segment: range) -> str:
    """The teacher's layers of a segment, counted from 1."""
    first, last = segment.start + 1, segment.stop
    return f"the teacher's layer {first}" if first == last else f"the teacher's layers {first} to {last}"


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
    by_layer = {index: kept[kept // size == index - segment.start] % size for index in segment}
    return {index: entries for index, entries in by_layer.items() if len(entries)}
