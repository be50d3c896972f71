"""The sizes of students that the paper publishes, by name."""

from clipmap_hf.config.clipmap_config import ClipMapConfig, TowerConfig


__all__ = ["PRESETS"]


def _preset(vision_width: int, vision_depth: int, text_width: int, text_depth: int) -> ClipMapConfig:
    return ClipMapConfig(
        vision=TowerConfig(hidden_size=vision_width, num_hidden_layers=vision_depth),
        text=TowerConfig(hidden_size=text_width, num_hidden_layers=text_depth),
        heads="whole",
    )


# The paper's three students of ViT-B/16 (Table 6; its rows for tiny and base are misprints, see Table 12).
PRESETS = {
    "base": _preset(512, 12, 512, 6),
    "small": _preset(256, 10, 256, 3),
    "tiny": _preset(128, 4, 128, 2),
}
