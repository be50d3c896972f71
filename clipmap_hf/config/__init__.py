"""What to make: sizes of a student, presets, budgets, and the model config that follows from them."""

from clipmap_hf.config.budget import Budget
from clipmap_hf.config.clipmap_config import ClipMapConfig, TowerConfig
from clipmap_hf.config.presets import PRESETS, presets_of
from clipmap_hf.config.request import requested_config
from clipmap_hf.config.resnet import ResNetTowerConfig
from clipmap_hf.config.student import cut_towers, embedding_width, student_config


__all__ = [
    "PRESETS",
    "Budget",
    "ClipMapConfig",
    "ResNetTowerConfig",
    "TowerConfig",
    "cut_towers",
    "embedding_width",
    "presets_of",
    "requested_config",
    "student_config",
]
