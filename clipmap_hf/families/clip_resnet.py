"""The table of axes of `CLIPResNetModel`: CLIP's text tower, and OpenAI's modified ResNet."""

from typing import Any

from clipmap_hf.families.base import Family, TensorRule
from clipmap_hf.families.clip import CLIP


__all__ = ["CLIP_RESNET"]

_TOWER = r"(?P<tower>vision)_model\."
_STAGES = {"stem3": "stem_widths.2"} | {f"stream{stage}": f"stream_widths.{stage - 1}" for stage in (1, 2, 3, 4)}
# What the first block of a stage reads: the stream of the stage before.
_BEFORE = dict(zip((1, 2, 3, 4), _STAGES, strict=False))


def _batch_norm(name: str, space: str, **layers: Any) -> tuple[TensorRule, ...]:
    """
    The rules of a BatchNorm, whose vectors have one axis. A student's first variance goes through the squares of an
    operator: of channels that are independent, that is the variance of their sum, and of a channel that is selected it
    is its own. What is right for any operator is to measure it on the student, as training and `measured` do.
    """
    return (
        TensorRule(name + r"\.(weight|bias)", (space,), **layers),
        TensorRule(name + r"\.running_mean", (space,), statistic=True, **layers),
        TensorRule(name + r"\.running_var", (space,), squared=True, statistic=True, **layers),
        TensorRule(name + r"\.num_batches_tracked", (), statistic=True, **layers),
    )


def _block(name: str, read: str, inner: str, written: str, **layers: Any) -> tuple[TensorRule, ...]:
    """The rules of a bottleneck. A stage's stream is shared by its blocks, and what is within a block is its own."""
    return (
        TensorRule(name + r"conv1\.weight", (f"{inner}a", f"{read}.in", None, None), **layers),
        TensorRule(name + r"conv2\.weight", (f"{inner}b", f"{inner}a.in", None, None), **layers),
        TensorRule(name + r"conv3\.weight", (written, f"{inner}b.in", None, None), **layers),
        *_batch_norm(name + "bn1", f"{inner}a", **layers),
        *_batch_norm(name + "bn2", f"{inner}b", **layers),
        *_batch_norm(name + "bn3", written, **layers),
    )


def _stage(stage: int) -> tuple[TensorRule, ...]:
    """The rules of a stage. Its first block is like no other. The others are its layers, mixed over depth."""
    name, before, stream = _TOWER + rf"layer{stage}\.", _BEFORE[stage], f"stream{stage}"
    layers = {"depth": f"layers.{stage - 1}", "first": 1}
    return (
        *_block(name + r"0\.", before, f"first{stage}", stream),
        TensorRule(name + r"0\.downsample\.0\.weight", (stream, f"{before}.in", None, None)),
        *_batch_norm(name + r"0\.downsample\.1", stream),
        *_block(name + r"(?P<layer>[1-9]\d*)\.", stream, f"inner{stage}", stream, **layers),
    )


_SPACES = {
    "stem1": "stem_widths.0",
    "stem2": "stem_widths.1",
    **_STAGES,
    **{
        f"{block}{stage}{place}": f"stage_widths.{stage - 1}"
        for block in ("first", "inner")
        for stage in (1, 2, 3, 4)
        for place in "ab"
    },
    "pool_query": "hidden_size",
    "pool_key": "hidden_size",
    "pool_value": "hidden_size",
}

CLIP_RESNET = Family(
    name="clip_resnet",
    model_types=("clip_resnet",),
    spaces={name: size for name, size in CLIP.spaces.items() if name != "patch"} | _SPACES,
    shared_spaces=CLIP.shared_spaces,
    layer_spaces=CLIP.layer_spaces | {f"inner{stage}{place}" for stage in (1, 2, 3, 4) for place in "ab"},
    head_spaces=CLIP.head_spaces | {"pool_query", "pool_key", "pool_value"},
    rules=(
        # CLIP's rules for layers cover both towers, but they match none of a ResNet's, which have other names.
        *(rule for rule in CLIP.rules if "vision)_model" not in rule.pattern and rule.tower != "vision"),
        TensorRule(_TOWER + r"conv1\.weight", ("stem1", None, None, None)),
        TensorRule(_TOWER + r"conv2\.weight", ("stem2", "stem1.in", None, None)),
        TensorRule(_TOWER + r"conv3\.weight", ("stem3", "stem2.in", None, None)),
        *(rule for place in "123" for rule in _batch_norm(_TOWER + rf"bn{place}", f"stem{place}")),
        *(rule for stage in (1, 2, 3, 4) for rule in _stage(stage)),
        TensorRule(_TOWER + r"attnpool\.positional_embedding", (None, "stream4")),
        *(
            rule
            for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
            for rule in (
                TensorRule(_TOWER + rf"attnpool\.{letter}_proj\.weight", (f"pool_{name}", "stream4.in")),
                TensorRule(_TOWER + rf"attnpool\.{letter}_proj\.bias", (f"pool_{name}",)),
            )
        ),
        TensorRule(_TOWER + r"attnpool\.c_proj\.weight", ("embed", "pool_value.in")),
        TensorRule(_TOWER + r"attnpool\.c_proj\.bias", ("embed",)),
    ),
    norms=tuple(rule for rule in CLIP.norms if rule.norm.startswith("text_model.")),
    # A channel is read through the operator that writes it: ReLU and BatchNorm stand between, and know no other basis.
    ties={f"{space}.in": space for space in _SPACES},
    layerwise=frozenset({"text"}),
    transformers=False,
)
