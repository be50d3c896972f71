"""The table of axes of `CLIPResNetModel`: CLIP's text tower, and OpenAI's modified ResNet."""

from clipmap_hf.families.base import Family, TensorRule
from clipmap_hf.families.clip import CLIP


__all__ = ["CLIP_RESNET"]

_TOWER = r"(?P<tower>vision)_model\."
_BLOCK = _TOWER + r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."
_FIRST = _TOWER + r"layer(?P<stage>[1-4])\.(?P<block>0)\."
_OTHER = _TOWER + r"layer(?P<stage>[1-4])\.(?P<block>[1-9]\d*)\."
_STAGES = {"stem3": "stem_widths.2"} | {f"stream{stage}": f"stream_widths.{stage - 1}" for stage in (1, 2, 3, 4)}
# What the first block of a stage reads: the stream of the stage before.
_BEFORE = dict(zip("1234", _STAGES, strict=False))


def _batch_norm(name: str, space: str) -> tuple[TensorRule, ...]:
    """
    The rules of a BatchNorm, whose vectors have one axis. A student's first variance goes through the squares of an
    operator: of channels that are independent, that is the variance of their sum, and of a channel that is selected it
    is its own. What is right for any operator is to measure it on the student, as training and `measured` do.
    """
    return (
        TensorRule(name + r"\.(weight|bias)", (space,)),
        TensorRule(name + r"\.running_mean", (space,), statistic=True),
        TensorRule(name + r"\.running_var", (space,), squared=True, statistic=True),
        TensorRule(name + r"\.num_batches_tracked", (), statistic=True),
    )


# A channel is read through the operator that writes it: ReLU and BatchNorm stand between, and know no other basis.
CLIP_RESNET = Family(
    name="clip_resnet",
    model_types=("clip_resnet",),
    spaces={
        **{name: size for name, size in CLIP.spaces.items() if name != "patch"},
        "stem1": "stem_widths.0",
        "stem2": "stem_widths.1",
        **_STAGES,
        # `x.N` is a space of its own of the block N, as large as `x`.
        **{f"inner{stage}{place}": f"stage_widths.{stage - 1}" for stage in (1, 2, 3, 4) for place in "ab"},
        "pool_query": "hidden_size",
        "pool_key": "hidden_size",
        "pool_value": "hidden_size",
    },
    shared_spaces=CLIP.shared_spaces,
    layer_spaces=CLIP.layer_spaces,
    head_spaces=CLIP.head_spaces | {"pool_query", "pool_key", "pool_value"},
    rules=(
        # CLIP's rules for layers cover both towers, but they match none of a ResNet's, which have other names.
        *(rule for rule in CLIP.rules if "vision)_model" not in rule.pattern and rule.tower != "vision"),
        TensorRule(_TOWER + r"conv1\.weight", ("stem1", None, None, None)),
        TensorRule(_TOWER + r"conv2\.weight", ("stem2", "stem1", None, None)),
        TensorRule(_TOWER + r"conv3\.weight", ("stem3", "stem2", None, None)),
        *(rule for place in "123" for rule in _batch_norm(_TOWER + rf"bn{place}", f"stem{place}")),
        # A stage's stream is shared by its blocks and its downsample; what is within a block is its own.
        *(
            TensorRule(_FIRST.replace("[1-4]", stage) + name, (space, before, None, None))
            for stage, before in _BEFORE.items()
            for name, space in (
                (r"conv1\.weight", "inner{stage}a.{block}"),
                (r"downsample\.0\.weight", "stream{stage}"),
            )
        ),
        TensorRule(_OTHER + r"conv1\.weight", ("inner{stage}a.{block}", "stream{stage}", None, None)),
        TensorRule(_BLOCK + r"conv2\.weight", ("inner{stage}b.{block}", "inner{stage}a.{block}", None, None)),
        TensorRule(_BLOCK + r"conv3\.weight", ("stream{stage}", "inner{stage}b.{block}", None, None)),
        *_batch_norm(_BLOCK + "bn1", "inner{stage}a.{block}"),
        *_batch_norm(_BLOCK + "bn2", "inner{stage}b.{block}"),
        *_batch_norm(_BLOCK + r"(bn3|downsample\.1)", "stream{stage}"),
        TensorRule(_TOWER + r"attnpool\.positional_embedding", (None, "stream4")),
        *(
            rule
            for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
            for rule in (
                TensorRule(_TOWER + rf"attnpool\.{letter}_proj\.weight", (f"pool_{name}", "stream4")),
                TensorRule(_TOWER + rf"attnpool\.{letter}_proj\.bias", (f"pool_{name}",)),
            )
        ),
        TensorRule(_TOWER + r"attnpool\.c_proj\.weight", ("embed", "pool_value")),
        TensorRule(_TOWER + r"attnpool\.c_proj\.bias", ("embed",)),
    ),
    layerwise=False,
    transformers=False,
)
