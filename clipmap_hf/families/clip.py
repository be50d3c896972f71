"""The table of axes of `CLIPModel`, which is also that of MetaCLIP 2."""

from clipmap_hf.families.base import Family, NormRule, TensorRule


__all__ = ["CLIP", "LAYER_RULES"]

_LAYER = r"(?P<tower>vision|text)_model\.encoder\.layers\.(?P<layer>\d+)\."

_LAYER_NORMS = {
    "layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "layer_norm2": ("mlp.fc1",),
}

LAYER_RULES = (
    TensorRule(_LAYER + r"self_attn\.q_proj\.weight", ("query", "residual.in")),
    TensorRule(_LAYER + r"self_attn\.q_proj\.bias", ("query",)),
    TensorRule(_LAYER + r"self_attn\.k_proj\.weight", ("key", "residual.in")),
    TensorRule(_LAYER + r"self_attn\.k_proj\.bias", ("key",)),
    TensorRule(_LAYER + r"self_attn\.v_proj\.weight", ("value", "residual.in")),
    TensorRule(_LAYER + r"self_attn\.v_proj\.bias", ("value",)),
    TensorRule(_LAYER + r"self_attn\.out_proj\.weight", ("residual", "value.in")),
    TensorRule(_LAYER + r"self_attn\.out_proj\.bias", ("residual",)),
    TensorRule(_LAYER + r"mlp\.fc1\.weight", ("ffn", "residual.in")),
    TensorRule(_LAYER + r"mlp\.fc1\.bias", ("ffn",)),
    TensorRule(_LAYER + r"mlp\.fc2\.weight", ("residual", "ffn.in")),
    TensorRule(_LAYER + r"mlp\.fc2\.bias", ("residual",)),
    TensorRule(_LAYER + r"layer_norm[12]\.(weight|bias)", ("residual",)),
)

CLIP = Family(
    name="clip",
    model_types=("clip", "metaclip_2"),
    spaces={
        "residual": "hidden_size",
        "patch": "hidden_size",
        "query": "hidden_size",
        "key": "hidden_size",
        "value": "hidden_size",
        "ffn": "intermediate_size",
    },
    shared_spaces={"embed": "projection_dim"},
    layer_spaces=frozenset({"query", "key", "value", "ffn"}),
    rules=(
        *LAYER_RULES,
        TensorRule(r"(?P<tower>vision)_model\.embeddings\.patch_embedding\.weight", ("patch", None, None, None)),
        TensorRule(r"(?P<tower>vision)_model\.embeddings\.class_embedding", ("patch",)),
        TensorRule(r"(?P<tower>vision)_model\.embeddings\.position_embedding\.weight", (None, "patch")),
        TensorRule(r"(?P<tower>vision)_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)", ("residual",)),
        TensorRule(r"(?P<tower>text)_model\.embeddings\.token_embedding\.weight", (None, "residual"), lookup=True),
        TensorRule(r"(?P<tower>text)_model\.embeddings\.position_embedding\.weight", (None, "residual")),
        TensorRule(r"(?P<tower>text)_model\.final_layer_norm\.(weight|bias)", ("residual",)),
        TensorRule(r"visual_projection\.weight", ("embed", "residual.in"), tower="vision"),
        TensorRule(r"text_projection\.weight", ("embed", "residual.in"), tower="text"),
        TensorRule(r"logit_scale", ()),
    ),
    norms=(
        *(
            NormRule(
                f"{tower}_model.encoder.layers.*.{norm}",
                tuple(f"{tower}_model.encoder.layers.*.{reader}" for reader in readers),
            )
            for tower in ("vision", "text")
            for norm, readers in _LAYER_NORMS.items()
        ),
        NormRule("vision_model.post_layernorm", ("visual_projection",)),
        NormRule("text_model.final_layer_norm", ("text_projection",)),
    ),
)
