"""Sequential refit: a student's layers are solved front to back, each on the stream that the layers before leave."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from clipmap_hf.distributed import process_count
from clipmap_hf.files.tensor_store import TensorStore
from clipmap_hf.models.towers import Tower, pooled
from clipmap_hf.starts.calibrated.choice import explained, most_needed
from clipmap_hf.starts.calibrated.descent import descend, share_lost, watched_layers
from clipmap_hf.starts.calibrated.heads import by_head, narrow_scores, value_axes
from clipmap_hf.starts.calibrated.moments import Moments
from clipmap_hf.starts.calibrated.progress import layer_progress
from clipmap_hf.starts.calibrated.readings import reading, set_linear
from clipmap_hf.starts.calibrated.statistics import TowerStatistics, normalized, token_weights
from clipmap_hf.starts.calibrated.streams import SegmentPass, Streams, segments
from clipmap_hf.starts.selection.scores import strongest


__all__ = ["refit"]

Batch = Mapping[str, torch.Tensor]

_RIDGE = 1e-3
_CANDIDATES = 3  # times as many neurons as are kept are looked at, those with most energy
_TOKENS = 16  # per candidate are enough to choose among them
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
    *,
    classic: bool = False,
) -> None:
    """
    Solves all linear layers of both towers by ridge regression, front to back, and their final LayerNorms. A student
    layer stands for a segment of the teacher's, from one kept layer to the next, and corrects what the layers before
    it left wrong:

    1. Of all heads in the segment, those with most energy are kept. They read the student's stream through a lift: the
       least-squares guess of what they read in the teacher. If the student's heads are narrower, they keep those
       combinations of their channels that say most (`narrow_scores`, `narrow_values`).
    2. `out_proj` is solved for the mapped stream with all that the segment's attention adds.
    3. Of all neurons in the segment, those that `fc2` needs most are kept (`most_needed`), and read in the same way.
    4. `fc2` is solved for the mapped stream behind the segment.

    Last, the projection is solved for the teacher's normalized embeddings. Gradient descent on all of a tower behind
    its embeddings then repairs what solving layers one by one cannot. It looks at the normalized embeddings and at the
    streams behind up to four layers, for embeddings alone are soon learned by heart. Kept are the streams that the
    towers begin with, these, and those of the current segment, in memory or in temporary files; several processes
    share the pairs.

    Args:
        student: Changed in place; its embeddings and `pre_layrnorm` are mapped already.
        teacher: Folded.
        statistics: Of the teacher, by tower.
        operators: As `calibrated_operators` gives them.
        layers: The teacher's layers that the segments begin with, by tower, ascending; the first begins at 0 always.
        batches: As `calibration_batch` gives them, at least one in each process.
        steps: Steps of gradient descent on each tower.
        classic: As the start was first made: the neurons with most energy are kept; and half of the steps are made on
            each layer by itself, after it was solved, the others on the tower, for its embeddings alone.
    """
    count = sum(len(layers[name]) for name in statistics)
    with layer_progress(count) as layer_is_done:
        for name, found in statistics.items():
            towers = (Tower(teacher, name), Tower(student, name))
            parts = segments(layers[name], len(towers[0].layers))
            longest = max(map(len, parts))
            tower = _TowerRefit(*towers, operators[f"{name}_residual"], found, batches, longest, steps, classic)
            for index, segment in enumerate(parts):
                tower.refit_layer(index, segment)
                layer_is_done(f"{name} layer {index + 1} of {len(parts)} stands for {_names(segment)}")
            tower.refit_projection(operators.get("embed"))
            tower.descend()


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
        steps: int,
        classic: bool,
    ):
        self.teacher, self.student, self.residual, self.statistics = teacher, student, residual, statistics
        self.classic, self.steps = classic, steps // 2 if classic else steps
        self.watched = watched_layers(len(student.layers)) if steps and not classic else ()
        self.epsilon = student.config.layer_norm_eps
        self.streams, self.store = [], TensorStore()
        for batch in batches:
            batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
            big, small = teacher.embed(batch), student.embed(batch)
            weights = token_weights(teacher, batch, big)
            self.store.expect((1 + longest_segment) * big.nbytes + (4 + len(self.watched)) * small.nbytes)
            first = self.store.keep(small)
            self.streams.append(Streams(weights, teacher.ends(batch), first, self.store.keep(big), first))

    def refit_layer(self, index: int, segment: range) -> None:
        """Solves a layer of the student for a segment of the teacher's, and goes on behind both."""
        layer = self.student.layers[index]
        for norm in (layer.layer_norm1, layer.layer_norm2):
            norm.weight.fill_(1)
            norm.bias.zero_()
        self._refit_attention(layer, segment, self._follow_teacher(segment))
        self._refit_mlp(layer, segment)
        if self.steps and self.classic:
            descend(layer, self.streams, self.steps, partial(self._error_behind, layer))
        for streams in self.streams:
            if index in self.watched:
                streams.watched[index] = streams.behind
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

    def descend(self) -> None:
        """Brings the student's embeddings and watched streams nearer to the teacher's, with all layers at once."""
        student = self.student
        parts = nn.ModuleList([student.layers, student.final_norm, student.projection])
        if self.steps:
            descend(parts, self.streams, self.steps, self._error)

    def _follow_teacher(self, segment: range) -> Moments:
        """
        Takes the teacher's streams behind the segment, and keeps what the student's layer is to be solved for there.
        Returns the moments of what the student's attention reads, with what the teacher's reads in each layer.
        """
        width = self.teacher.config.hidden_size
        moments = Moments(self.student.config.hidden_size, len(segment) * width, device=self.teacher.device)
        for streams in self.streams:
            passed = self._pass_segment(self._load(streams.teacher), segment)
            streams.add_to(moments, normalized(self._load(streams.student), self.epsilon), passed.attention_reads)
            streams.attended = self.store.keep(passed.attended @ self.residual.T)
            streams.reads = self.store.keep(passed.mlp_reads)
            streams.behind = self.store.keep(passed.behind @ self.residual.T)
            streams.teacher = self.store.keep(passed.behind)
        moments.sum_over_processes()
        return moments

    def _pass_segment(self, stream: torch.Tensor, segment: range) -> SegmentPass:
        """Runs the teacher's layers of a segment on streams, of which nothing changes."""
        attended, attention_reads, mlp_reads = stream, [], []
        for index in segment:
            layer = self.teacher.layers[index]
            middle = self.teacher.middle(layer, stream)
            attention_reads.append(normalized(stream, self.epsilon))
            mlp_reads.append(normalized(middle, self.epsilon))
            attended = attended + (middle - stream)
            stream = self.teacher.behind(layer, middle)
        return SegmentPass(torch.cat(attention_reads, dim=-1), torch.cat(mlp_reads, dim=-1), attended, stream)

    def _refit_attention(self, layer: nn.Module, segment: range, moments: Moments) -> None:
        attention, sources = layer.self_attn, [self.teacher.layers[index].self_attn for index in segment]
        lifts, heads = moments.solve(_RIDGE), self._strongest("head", segment, attention.num_heads)
        width, count = attention.head_dim, len(sources) * sources[0].num_heads
        query, key, value = (
            by_head(reading(lifts, [getattr(source, name) for source in sources]), count)[heads]
            for name in ("q_proj", "k_proj", "v_proj")
        )  # (heads, the teacher's head width, hidden_size + 1)
        seen = moments.with_constant
        of_query, of_key = narrow_scores(query @ seen @ query.mT, key @ seen @ key.mT, width)
        given = [self.statistics.attended[index].covariance for index in segment]
        of_value = torch.cat([value_axes(*one, self.residual, width) for one in zip(sources, given, strict=True)])
        set_linear(attention.q_proj, (of_query @ query).flatten(0, 1))
        set_linear(attention.k_proj, (of_key @ key).flatten(0, 1))
        set_linear(attention.v_proj, (of_value[heads] @ value).flatten(0, 1))
        inputs = ((streams, self._load(streams.student)) for streams in self.streams)
        examples = (
            (streams, self.student.attended(layer, x), self._load(streams.attended) - x) for streams, x in inputs
        )
        set_linear(attention.out_proj, self._solve(examples))

    def _refit_mlp(self, layer: nn.Module, segment: range) -> None:
        mlp, sources = layer.mlp, [self.teacher.layers[index].mlp.fc1 for index in segment]
        middles = self._middles(layer)
        examples = ((streams, normalized(x, self.epsilon), self._load(streams.reads)) for streams, x in middles)
        read = reading(self._moments(examples).solve(_RIDGE), sources)
        set_linear(mlp.fc1, read[self._neurons(layer, segment, read)])
        middles = self._middles(layer)
        examples = (
            (streams, self.student.activated(layer, x), self._load(streams.behind) - x) for streams, x in middles
        )
        set_linear(mlp.fc2, self._solve(examples))

    def _neurons(self, layer: nn.Module, segment: range, read: torch.Tensor) -> torch.Tensor:
        """Which neurons of the segment's are kept, of which `read` says how they read the student's stream."""
        count = layer.mlp.fc1.out_features
        strongest_ones = self._strongest("neuron", segment, count)
        if self.classic or count == len(read):
            return strongest_ones
        candidates = self._strongest("neuron", segment, _CANDIDATES * count)
        fc1 = nn.Linear(read.shape[1] - 1, len(candidates), device=self.teacher.device)
        set_linear(fc1, read[candidates])
        examples = (
            (streams, layer.mlp.activation_fn(fc1(layer.layer_norm2(x))), self._load(streams.behind) - x)
            for streams, x in self._middles(layer)
        )
        found = self._moments(examples, _TOKENS * len(candidates))
        choices = (most_needed(found, count), torch.isin(candidates, strongest_ones).nonzero().flatten())
        return candidates[max(choices, key=partial(explained, found))]

    def _strongest(self, part: str, segment: range, count: int) -> torch.Tensor:
        """The heads or neurons of the segment's layers together that have most energy; ascending."""
        energy = getattr(self.statistics, f"{part}_energy")
        return strongest(energy[segment.start : segment.stop].flatten(), count)

    def _middles(self, layer: nn.Module) -> Iterator[tuple[Streams, torch.Tensor]]:
        """What the student's `layer_norm2` reads."""
        for streams in self.streams:
            yield streams, self.student.middle(layer, self._load(streams.student))

    def _solve(self, examples: Examples) -> torch.Tensor:
        """Weight, and beside it the bias, of the linear layer that gives the targets from the inputs."""
        weight, bias = self._moments(examples).solve(_RIDGE)
        return torch.cat([weight, bias[:, None]], dim=1)

    def _moments(self, examples: Examples, tokens: float = torch.inf) -> Moments:
        """The moments of inputs and targets; of the first batches alone that have so many tokens together."""
        moments, count = None, 0
        for streams, inputs, targets in examples:
            if moments is None:
                moments = Moments(inputs.shape[-1], targets.shape[-1], device=inputs.device)
            streams.add_to(moments, inputs, targets)
            count += int((streams.weights > 0).sum()) * process_count()
            if count >= tokens:
                break
        moments.sum_over_processes()
        return moments

    def _error(self, streams: Streams, items: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of some items' normalized embeddings, and the mean share of the watched streams."""
        stream, weights, lost = self._load(streams.first[items]), streams.weights[items], []
        for index, layer in enumerate(self.student.layers):
            stream = self.student.through(layer, stream)
            if index in streams.watched:
                lost.append(share_lost(stream, self._load(streams.watched[index][items]), weights))
        embeds = self.student.embeds(stream, streams.ends[items])
        error = (F.normalize(embeds, dim=-1) - streams.embeds[items]).square().sum(dim=-1).mean()
        return error + torch.stack(lost).mean() if lost else error

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
