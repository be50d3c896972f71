"""The table of axes of `SiglipModel`: CLIP's layers, an attention-pooling head for images, and a logit bias."""

from clipmap_hf.families.base import Family, TensorRule
from clipmap_hf.families.clip import CLIP, LAYER_RULES


__all__ = ["SIGLIP"]

_HEAD = r"(?P<tower>vision)_model\.head\."

SIGLIP = Family(
    name="siglip",
    model_types=("siglip",),
    # The pooling head has spaces of its own for its attention and its MLP, outside the layers.
    spaces={**CLIP.spaces, "pool": "hidden_size", "pool_ffn": "intermediate_size"},
    # Images have no projection: the head writes the joint embedding, which is as wide as the vision tower.
    shared_spaces={"embed": "vision_config.hidden_size"},
    layer_spaces=CLIP.layer_spaces,
    rules=(
        *LAYER_RULES,
        TensorRule(r"(?P<tower>vision)_model\.embeddings\.patch_embedding\.weight", ("patch", None, None, None)),
        TensorRule(r"(?P<tower>vision)_model\.embeddings\.patch_embedding\.bias", ("patch",)),
        TensorRule(r"(?P<tower>vision)_model\.embeddings\.position_embedding\.weight", (None, "patch")),
        TensorRule(r"(?P<tower>vision)_model\.post_layernorm\.(weight|bias)", ("residual",)),
        # `in_proj_weight` reads both the probe and the residual stream, so both lie in the same space.
        TensorRule(_HEAD + r"probe", (None, None, "residual")),
        TensorRule(_HEAD + r"attention\.in_proj_weight", ("pool", "residual.in"), stacked=3),
        TensorRule(_HEAD + r"attention\.in_proj_bias", ("pool",), stacked=3),
        TensorRule(_HEAD + r"attention\.out_proj\.weight", ("embed", "pool.in")),
        TensorRule(_HEAD + r"attention\.out_proj\.bias", ("embed",)),
        TensorRule(_HEAD + r"layernorm\.(weight|bias)", ("embed",)),
        TensorRule(_HEAD + r"mlp\.fc1\.weight", ("pool_ffn", "embed.in")),
        TensorRule(_HEAD + r"mlp\.fc1\.bias", ("pool_ffn",)),
        TensorRule(_HEAD + r"mlp\.fc2\.weight", ("embed", "pool_ffn.in")),
        TensorRule(_HEAD + r"mlp\.fc2\.bias", ("embed",)),
        TensorRule(r"(?P<tower>text)_model\.embeddings\.token_embedding\.weight", (None, "residual"), lookup=True),
        TensorRule(r"(?P<tower>text)_model\.embeddings\.position_embedding\.weight", (None, "residual")),
        TensorRule(r"(?P<tower>text)_model\.final_layer_norm\.(weight|bias)", ("residual",)),
        TensorRule(r"(?P<tower>text)_model\.head\.weight", ("embed", "residual.in")),
        TensorRule(r"(?P<tower>text)_model\.head\.bias", ("embed",)),
        TensorRule(r"logit_(scale|bias)", (None,)),
    ),
    ties={"embed.in": "embed", "pool.in": "pool", "pool_ffn.in": "pool_ffn"},
    # Text attention looks in both directions, texts end in padding, and the head pools many tokens.
    layerwise=frozenset(),
)
