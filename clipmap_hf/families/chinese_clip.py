"""The table of axes of `ChineseCLIPModel`, which has CLIP's vision tower and a BERT as its text tower."""

from clipmap_hf.families.base import Family, TensorRule
from clipmap_hf.families.clip import CLIP


__all__ = ["CHINESE_CLIP"]

_LAYER = r"(?P<tower>text)_model\.encoder\.layer\.(?P<layer>\d+)\."

CHINESE_CLIP = Family(
    name="chinese_clip",
    model_types=("chinese_clip",),
    spaces=CLIP.spaces,
    shared_spaces=CLIP.shared_spaces,
    layer_spaces=CLIP.layer_spaces,
    rules=(
        # CLIP's rules for layers cover both towers, but they match no layer of the BERT, which has other names.
        *(rule for rule in CLIP.rules if not rule.pattern.startswith("(?P<tower>text)")),
        TensorRule(_LAYER + r"attention\.self\.query\.weight", ("query", "residual.in")),
        TensorRule(_LAYER + r"attention\.self\.query\.bias", ("query",)),
        TensorRule(_LAYER + r"attention\.self\.key\.weight", ("key", "residual.in")),
        TensorRule(_LAYER + r"attention\.self\.key\.bias", ("key",)),
        TensorRule(_LAYER + r"attention\.self\.value\.weight", ("value", "residual.in")),
        TensorRule(_LAYER + r"attention\.self\.value\.bias", ("value",)),
        TensorRule(_LAYER + r"attention\.output\.dense\.weight", ("residual", "value.in")),
        TensorRule(_LAYER + r"attention\.output\.dense\.bias", ("residual",)),
        TensorRule(_LAYER + r"intermediate\.dense\.weight", ("ffn", "residual.in")),
        TensorRule(_LAYER + r"intermediate\.dense\.bias", ("ffn",)),
        TensorRule(_LAYER + r"output\.dense\.weight", ("residual", "ffn.in")),
        TensorRule(_LAYER + r"output\.dense\.bias", ("residual",)),
        TensorRule(_LAYER + r"(attention\.)?output\.LayerNorm\.(weight|bias)", ("residual",)),
        TensorRule(r"(?P<tower>text)_model\.embeddings\.word_embeddings\.weight", (None, "residual"), lookup=True),
        TensorRule(r"(?P<tower>text)_model\.embeddings\.(position|token_type)_embeddings\.weight", (None, "residual")),
        TensorRule(r"(?P<tower>text)_model\.embeddings\.LayerNorm\.(weight|bias)", ("residual",)),
    ),
    # A BERT normalizes after each residual addition, and its attention looks in both directions.
    layerwise=frozenset(),
)
