"""The sizes of students that papers publish, by name."""

from clipmap_hf.config.clipmap_config import ClipMapConfig, TowerConfig
from clipmap_hf.config.resnet import ResNetTowerConfig


__all__ = ["PRESETS", "presets_of"]


def _preset(vision_width: int, vision_depth: int, text_width: int, text_depth: int) -> ClipMapConfig:
    return ClipMapConfig(
        vision=TowerConfig(hidden_size=vision_width, num_hidden_layers=vision_depth),
        text=TowerConfig(hidden_size=text_width, num_hidden_layers=text_depth),
        heads="whole",
    )


def _resnet(width: int, text_depth: int) -> ClipMapConfig:
    return ClipMapConfig(vision=ResNetTowerConfig(width=width), text=TowerConfig(num_hidden_layers=text_depth))


PRESETS = {
    # The paper's three students of ViT-B/16 (Table 6; its rows for tiny and base are misprints, see Table 12).
    "base": _preset(512, 12, 512, 6),
    "small": _preset(256, 10, 256, 3),
    "tiny": _preset(128, 4, 128, 2),
    # TinyCLIP's two students of RN50.
    "resnet-30m": _resnet(56, 9),
    "resnet-19m": _resnet(44, 6),
}


def presets_of(kind: type[TowerConfig] | type[ResNetTowerConfig]) -> list[str]:
    """Names the presets of teachers whose vision tower is of a kind, a transformer or a ResNet."""
    return [name for name, preset in PRESETS.items() if isinstance(preset.vision, kind)]
