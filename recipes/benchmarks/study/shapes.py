"""The shapes of students, as studies write them down."""

from collections.abc import Sequence

from clipmap_hf.config import TowerConfig


def tower_configs(towers: Sequence[Sequence[int]]) -> list[TowerConfig]:
    """
    Reads towers: of each the width, the depth and, where it is not four times the width, the FFN width; and the heads,
    where they are not those of the rule.
    """
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    return [TowerConfig(**dict(zip(names, sizes, strict=False))) for sizes in towers]
