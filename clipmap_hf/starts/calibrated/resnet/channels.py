"""Which channels of a ResNet its students keep: those that the layers behind them need most."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.distributed import sum_over_processes
from clipmap_hf.families import Family, family_for
from clipmap_hf.starts.calibrated.choice import most_needed
from clipmap_hf.starts.calibrated.moments import Moments
from clipmap_hf.starts.calibrated.resnet.convolutions import PlaceDraw, folded, units
from clipmap_hf.starts.selection.channels import ChannelScores, keep_channels


__all__ = ["ChannelStatistics", "LayerSpace", "calibrate_channels", "count_images", "layer_space"]

LayerSpace = tuple[str, int | None]  # a space and, if every layer has its own, the layer


@dataclass
class ChannelStatistics:
    """
    What calibration measures in a ResNet tower.

    Args:
        read: Moments of the channels of each space, where layers read them.
        readers: What these layers compute of these channels, `(outputs, channels)`.
        changed: How far each block but a stage's first turns the stream, by stack: 1 minus the mean cosine of its
            input and output, `(blocks - 1,)`.
        embeds: Second moment of the normalized embeddings, `(projection_dim, projection_dim)`.
    """

    read: Mapping[LayerSpace, Moments]
    readers: Mapping[LayerSpace, torch.Tensor]
    changed: Mapping[str, torch.Tensor]
    embeds: torch.Tensor

    def operators(self, teacher: PretrainedConfig, student: PretrainedConfig) -> dict[str, torch.Tensor]:
        """
        One-hot width operators. Each convolution gets the channels that it needs most (`most_needed`): from them, a
        linear layer tells best what the teacher's layers compute of all. A channel that several layers read counts in
        all of them. Of the attention pool, the heads are kept that add most to the embeddings.

        Args:
            teacher: The teacher's config.
            student: The student's config.

        Returns:
            The operators by name, `(small, big)` or `(layers, small, big)`.
        """
        family, found = family_for(teacher), {}
        for (space, layer), moments in self.read.items():
            weight = self.readers[space, layer]
            if space == "pool_value":
                score = moments.variance * weight.square().sum(dim=0)
            else:
                kept = most_needed(moments.read_by(weight), family.size(space, "vision", student))
                score = torch.zeros_like(moments.input).index_fill(0, kept, 1)
            found.setdefault(space, {})[layer] = score
        scores = {
            space: of_layers[None] if None in of_layers else torch.stack([of_layers[key] for key in sorted(of_layers)])
            for space, of_layers in found.items()
        }
        scores |= {space: torch.zeros_like(scores["pool_value"]) for space in ("pool_query", "pool_key")}
        return keep_channels(ChannelScores(scores), family, teacher, student)


@torch.no_grad()
def calibrate_channels(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> ChannelStatistics:
    """
    Measures the ResNet of a model. The sums are fp64, and those of several processes are added up.

    Args:
        model: The teacher, a `CLIPResNetModel`.
        batches: As `calibration_batch` gives them.

    Raises:
        ValueError: If there are no images, or an embedding is not finite.
    """
    sums = _ChannelSums(model, count_images(batches, model.device))
    with ExitStack() as hooks:
        for handle in sums.hooks():
            hooks.enter_context(handle)
        for batch in batches:
            embeds = model.vision_model(batch["pixel_values"].to(model.device)).pooler_output
            sums.embeds.add(F.normalize(embeds, dim=-1))
    return sums.statistics()


def count_images(batches: Iterable[Mapping[str, torch.Tensor]], device: torch.device) -> int:
    """
    The number of images in the batches of all processes.

    Raises:
        ValueError: If there are none.
    """
    count = torch.tensor([sum(len(batch["pixel_values"]) for batch in batches)], device=device)
    sum_over_processes([count])
    if not count:
        raise ValueError("There are no pairs to calibrate with.")
    return int(count)


def layer_space(family: Family, name: str, axis: int) -> LayerSpace | None:
    """
    What a convolution writes or reads; `None` for the image.

    Args:
        family: The table.
        name: Of the convolution, within the tower.
        axis: 0 for what it writes, 1 for what it reads.
    """
    spec = family.match(f"vision_model.{name}.weight")
    if (space := spec.rule.axes[axis]) is None:
        return None
    space = space.removesuffix(".in")
    return space, spec.layer if space in family.layer_spaces else None


class _ChannelSums:
    """The running sums of a tower."""

    def __init__(self, model: PreTrainedModel, images: int):
        self.tower, self.family, device = model.vision_model, family_for(model.config), model.device
        self.modules: list[tuple[nn.Module, LayerSpace]] = []
        self.readers: dict[LayerSpace, torch.Tensor] = {}
        for name, (conv, norm) in units(self.tower).items():
            if where := layer_space(self.family, name, axis=1):
                weight = folded(conv, norm)[0].unflatten(1, (conv.in_channels, -1))
                self._add_reader(conv, where, weight.movedim(1, 2).flatten(0, 1))
        pool = self.tower.attnpool
        projections = (pool.q_proj, pool.k_proj, pool.v_proj)
        self._add_reader(pool.k_proj, ("stream4", None), torch.cat([one.weight for one in projections]))
        self._add_reader(pool.c_proj, ("pool_value", None), pool.c_proj.weight)
        self.read = {where: Moments(weight.shape[1], device=device) for where, weight in self.readers.items()}
        self.draws = {where: PlaceDraw(images, weight.shape[1]) for where, weight in self.readers.items()}
        self.turned = {
            f"vision_layers_{index}": torch.zeros(len(stage), dtype=torch.float64, device=device)
            for index, stage in enumerate(self.tower.stages)
        }
        self.embeds = Moments(pool.c_proj.out_features, device=device)

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for module, where in self.modules:
            yield module.register_forward_pre_hook(partial(self._add_read, where))
        for turned, stage in zip(self.turned.values(), self.tower.stages, strict=True):
            for index in range(1, len(stage)):
                yield stage[index].register_forward_hook(partial(self._add_turn, turned[index]))

    def statistics(self) -> ChannelStatistics:
        for moments in (*self.read.values(), self.embeds):
            moments.sum_over_processes()
        sum_over_processes(self.turned.values())
        if not self.embeds.input_input.isfinite().all():
            raise ValueError(
                "What the teacher's vision tower computes on the calibration pairs is not finite. Look for NaN and "
                "infinity in their pixel_values, and compute in fp32."
            )
        changed = {name: 1 - turned[1:] / self.embeds.weight for name, turned in self.turned.items()}
        return ChannelStatistics(self.read, self.readers, changed, self.embeds.second_moment)

    def _add_reader(self, module: nn.Module, where: LayerSpace, weight: torch.Tensor) -> None:
        self.modules.append((module, where))
        self.readers[where] = torch.cat([self.readers[where], weight]) if where in self.readers else weight

    def _add_read(self, where: LayerSpace, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (stream,) = inputs
        if isinstance(module, nn.Conv2d):
            stream = stream[:, :, *self.draws[where](stream)].movedim(1, -1)
        self.read[where].add(stream.flatten(0, -2))

    def _add_turn(
        self, turned: torch.Tensor, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> None:
        turned += F.cosine_similarity(inputs[0], output).mean(dim=(1, 2)).double().sum()
