"""clipmap_hf: compress a CLIP model into a smaller, standard `transformers.CLIPModel`."""

import importlib


__version__ = "0.1.0.dev0"

# Public names, imported on first use: a recipe's `--help` must not wait for torch.
_PUBLIC = {
    "Budget": "clipmap_hf.budget",
    "ClipMapCompressor": "clipmap_hf.compressor",
    "ClipMapConfig": "clipmap_hf.config",
    "PRESETS": "clipmap_hf.config",
    "TowerConfig": "clipmap_hf.config",
}

__all__ = ["PRESETS", "Budget", "ClipMapCompressor", "ClipMapConfig", "TowerConfig"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'clipmap_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
