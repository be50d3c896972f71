"""Runs a tower of CLIP step by step: what its layers read, compute and write."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.families import FAMILIES, family_for


__all__ = ["Tower", "ends_at_largest_id", "pooled"]


class Tower:
    """
    One tower of a CLIP model, taken apart. The stream of a batch has the shape `(items, tokens, hidden_size)`.

    Args:
        model: A `CLIPModel`.
        name: `vision` or `text`.

    Raises:
        ValueError: If the model's family is none that this goes through.
    """

    def __init__(self, model: PreTrainedModel, name: str):
        if name not in family_for(model.config).layerwise:
            able = sorted(model_type for model_type, family in FAMILIES.items() if name in family.layerwise)
            raise ValueError(
                f"The {name} tower of a {model.config.model_type!r} cannot be gone through layer by layer; those of "
                f"{able} can."
            )
        self.config = getattr(model.config, f"{name}_config")
        self.model, self.name = getattr(model, f"{name}_model"), name
        self.layers: nn.ModuleList = self.model.encoder.layers
        self.final_norm = self.model.post_layernorm if name == "vision" else self.model.final_layer_norm
        self.projection = model.visual_projection if name == "vision" else model.text_projection

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.projection.weight.device

    def embed(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes the stream that the first layer reads."""
        if self.name == "vision":
            return self.model.pre_layrnorm(self.model.embeddings(batch["pixel_values"]))
        return self.model.embeddings(input_ids=batch["input_ids"])

    def attended(self, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        """Computes what `out_proj` reads: the heads' outputs side by side, `(items, tokens, hidden_size)`."""
        attention, read = layer.self_attn, layer.layer_norm1(stream)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return self.attend(self.config.num_attention_heads, *(project(read) for project in projections))

    def attend(self, heads: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Computes the outputs of heads side by side, from what they ask, offer and give: `(items, tokens, …)`."""
        split = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (query, key, value))
        out = F.scaled_dot_product_attention(*split, is_causal=self.name == "text")
        return out.transpose(1, 2).flatten(2)

    def activated(self, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        """Computes what `fc2` reads: the neurons' outputs, `(items, tokens, intermediate_size)`."""
        return layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(stream)))

    def middle(self, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        """Computes what `layer_norm2` reads: the stream with what the layer's attention adds."""
        return stream + layer.self_attn.out_proj(self.attended(layer, stream))

    def behind(self, layer: nn.Module, middle: torch.Tensor) -> torch.Tensor:
        """Computes the stream behind a layer from what its `layer_norm2` reads."""
        return middle + layer.mlp.fc2(self.activated(layer, middle))

    def through(self, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        """Computes the stream behind a layer from the stream before it."""
        return self.behind(layer, self.middle(layer, stream))

    def embeds(self, stream: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Embeds the stream behind the last layer as `(items, projection_dim)`, not normalized."""
        return self.projection(self.final_norm(pooled(stream, ends)))

    @torch.no_grad()
    def add_constant(self, constant: torch.Tensor) -> None:
        """
        Adds a constant to the embeddings, though the projection has no bias: what the final norm gives before a shift
        has mean zero, so along the vector of ones there is room for it.

        Args:
            constant: `(projection_dim,)`. The rows of the projection must sum to zero; the final shift is replaced.
        """
        self.final_norm.bias.fill_(1)
        self.projection.weight += constant[:, None] / self.projection.in_features

    def ends(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Finds the token that is pooled, `(items,)`; in a text, the tokens behind it are padding."""
        if self.name == "vision":
            return torch.zeros(len(batch["pixel_values"]), dtype=torch.long, device=batch["pixel_values"].device)
        ids = batch["input_ids"]
        if ends_at_largest_id(self.config):
            return ids.argmax(dim=1)
        return (ids == self.config.eos_token_id).int().argmax(dim=1)

    def counts(self, batch: Mapping[str, torch.Tensor], stream: torch.Tensor) -> torch.Tensor:
        """Marks the tokens that are no padding, `(items, tokens)`."""
        if self.name == "vision":
            return torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
        return torch.arange(stream.shape[1], device=stream.device) <= self.ends(batch)[:, None]


def ends_at_largest_id(config: PretrainedConfig) -> bool:
    """Tells whether texts end at their largest id: CLIP's old configs mean that by 2, MetaCLIP 2 means the id 2."""
    return config.eos_token_id == 2 and config.model_type == "clip_text_model"


def pooled(stream: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Picks a token of each item, `(items, hidden_size)`."""
    return stream[torch.arange(len(stream), device=stream.device), ends]
