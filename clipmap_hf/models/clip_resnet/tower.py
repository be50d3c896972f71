"""OpenAI's modified ResNet: a stem of three convolutions, anti-aliased bottlenecks, and an attention pool."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clipmap_hf.models.clip_resnet.config import CLIPResNetVisionConfig


__all__ = ["AttentionPool", "Bottleneck", "ModifiedResNet"]


class Bottleneck(nn.Module):
    """
    A residual block. Where it halves the image, an average pool does it and no strided convolution, so that nothing is
    left out (anti-aliasing).

    Args:
        read: Channels of what it reads.
        inner: Channels within.
        written: Channels of what it writes.
        stride: 2 if it halves height and width, else 1.
    """

    def __init__(self, read: int, inner: int, written: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(read, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(inner, written, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(written)
        self.downsample = None
        if stride > 1 or read != written:
            # OpenAI's names: the pool, which has no tensors, is "-1".
            parts = {"-1": nn.AvgPool2d(stride), "0": nn.Conv2d(read, written, 1, bias=False)}
            self.downsample = nn.Sequential()
            for name, part in {**parts, "1": nn.BatchNorm2d(written)}.items():
                self.downsample.add_module(name, part)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """Computes `(images, written, height / stride, width / stride)` from `(images, read, height, width)`."""
        return F.relu(self.added(stream) + self.skipped(stream))

    def added(self, stream: torch.Tensor) -> torch.Tensor:
        """Computes what the convolutions add, in the shape of what is written."""
        inner = F.relu(self.bn1(self.conv1(stream)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return self.bn3(self.conv3(self.avgpool(inner)))

    def skipped(self, stream: torch.Tensor) -> torch.Tensor:
        """Computes what goes past the convolutions, in the shape of what is written."""
        return stream if self.downsample is None else self.downsample(stream)


class AttentionPool(nn.Module):
    """
    Pools the places of an image by attention, in which the mean of all places is the only query.

    Args:
        config: Of the tower.
    """

    def __init__(self, config: CLIPResNetVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.positional_embedding = nn.Parameter(torch.randn(config.grid**2 + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, config.projection_dim)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """Computes `(images, projection_dim)` from `(images, channels, grid, grid)`."""
        return self.c_proj(self.attended(self.places(stream)))

    def places(self, stream: torch.Tensor) -> torch.Tensor:
        """Lines up the mean of all places and the places, with their positions: `(images, 1 + places, channels)`."""
        places = stream.flatten(2).transpose(1, 2)
        return torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + self.positional_embedding

    def attended(self, places: torch.Tensor) -> torch.Tensor:
        """Computes what `c_proj` reads, the heads' outputs side by side, `(images, channels)`."""
        projected = (self.q_proj(places[:, :1]), self.k_proj(places), self.v_proj(places))
        query, key, value = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in projected)
        pooled = F.scaled_dot_product_attention(query, key, value)  # (images, heads, 1, channels of a head)
        return pooled.flatten(1)


class ModifiedResNet(nn.Module):
    """
    The vision tower. Its tensors have OpenAI's names.

    Args:
        config: Of the tower.
    """

    def __init__(self, config: CLIPResNetVisionConfig):
        super().__init__()
        self.config = config
        first, second, read = config.stem_widths
        self.conv1 = nn.Conv2d(config.num_channels, first, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, read, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(read)
        self.avgpool = nn.AvgPool2d(2)
        for stage, (blocks, inner, written) in enumerate(
            zip(config.layers, config.stage_widths, config.stream_widths, strict=True)
        ):
            first = Bottleneck(read, inner, written, stride=1 if stage == 0 else 2)
            others = (Bottleneck(written, inner, written, stride=1) for _ in range(1, blocks))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *others))
            read = written
        self.attnpool = AttentionPool(config)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The four stages of bottlenecks."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes what the first stage reads, `(images, width, image_size / 4, image_size / 4)`."""
        stream = F.relu(self.bn1(self.conv1(pixel_values)))
        stream = F.relu(self.bn2(self.conv2(stream)))
        return self.avgpool(F.relu(self.bn3(self.conv3(stream))))

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> BaseModelOutputWithPooling:
        """
        Embeds images.

        Args:
            pixel_values: `(images, channels, image_size, image_size)`.
            output_hidden_states: Whether to return what the stem and each stage write, too.

        Returns:
            The last stage's `(images, channels, grid, grid)` as `last_hidden_state`, and the image embeddings
            `(images, projection_dim)`, not normalized, as `pooler_output`.

        Raises:
            ValueError: If the images have another size than the tower's.
        """
        size = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"Images of {pixel_values.shape[-2]} × {pixel_values.shape[-1]} pixels do not fit this model, whose "
                f"attention pool has positions for {size} × {size}."
            )
        streams = [self.stem(pixel_values)]
        for stage in self.stages:
            streams.append(stage(streams[-1]))
        return BaseModelOutputWithPooling(
            last_hidden_state=streams[-1],
            pooler_output=self.attnpool(streams[-1]),
            hidden_states=tuple(streams) if output_hidden_states else None,
        )
