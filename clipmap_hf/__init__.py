"""clipmap_hf: compress a CLIP model into a smaller, standard `transformers.CLIPModel`."""

import importlib
import importlib.abc
import importlib.util
import sys


__version__ = "0.1.0"

# Where transformers looks up what it loads, and the modules that register there what is ours. These are imported while
# modules of transformers are half imported, so they may import little of it.
_REGISTRIES = {
    "transformers.models.auto.configuration_auto": "clipmap_hf.models.clip_resnet.config",
    "transformers.quantizers.auto": "clipmap_hf.ternary.integration",
}
# Public names, imported on first use: a recipe's `--help` must not wait for torch.
_PUBLIC = {
    "Budget": "clipmap_hf.config",
    "ClipMapCompressor": "clipmap_hf.compressor",
    "ClipMapConfig": "clipmap_hf.config",
    "DistillationArguments": "clipmap_hf.pipeline.arguments",
    "DistillationTrainer": "clipmap_hf.pipeline.distillation",
    "LabelTrainer": "clipmap_hf.pipeline.labels",
    "MappingArguments": "clipmap_hf.pipeline.arguments",
    "MappingStageArguments": "clipmap_hf.training.arguments",
    "MappingTrainer": "clipmap_hf.pipeline.mapping",
    "MaskingStageArguments": "clipmap_hf.training.arguments",
    "PRESETS": "clipmap_hf.config",
    "PretrainingArguments": "clipmap_hf.pipeline.arguments",
    "PretrainingTrainer": "clipmap_hf.pipeline.pretraining",
    "ResNetTowerConfig": "clipmap_hf.config",
    "TernaryArguments": "clipmap_hf.pipeline.arguments",
    "TernaryTrainer": "clipmap_hf.pipeline.ternarization",
    "TowerConfig": "clipmap_hf.config",
    "compress": "clipmap_hf.pipeline.compression",
    "evaluate_agreement": "clipmap_hf.evaluation.agreement",
    "evaluate_retrieval": "clipmap_hf.evaluation.retrieval",
    "evaluate_zero_shot": "clipmap_hf.evaluation.zero_shot",
    "reestimate_batch_norms": "clipmap_hf.models.batch_norms",
}

__all__ = [
    "PRESETS",
    "Budget",
    "ClipMapCompressor",
    "ClipMapConfig",
    "DistillationArguments",
    "DistillationTrainer",
    "LabelTrainer",
    "MappingArguments",
    "MappingStageArguments",
    "MappingTrainer",
    "MaskingStageArguments",
    "PretrainingArguments",
    "PretrainingTrainer",
    "ResNetTowerConfig",
    "TernaryArguments",
    "TernaryTrainer",
    "TowerConfig",
    "compress",
    "evaluate_agreement",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "reestimate_batch_norms",
]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'clipmap_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


class _WhenTransformersImports(importlib.abc.MetaPathFinder):
    """
    Adds what is ours to transformers' registries as soon as these are imported, so that any `from_pretrained` loads
    our models and formats after `import clipmap_hf`, which imports neither library by itself.
    """

    def __init__(self):
        self._found = set()

    def find_spec(self, name, path, target=None):
        if name not in _REGISTRIES or name in self._found:
            return None
        self._found.add(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            _register(name)

        spec.loader.exec_module = execute_and_register
        return spec


def _register(registry: str) -> None:
    module = importlib.import_module(_REGISTRIES[registry])
    if hasattr(module, "register"):  # or it is what imports the registry, and registers when it is done
        module.register()


for _registry in _REGISTRIES:
    if _registry in sys.modules:
        _register(_registry)
sys.meta_path.insert(0, _WhenTransformersImports())
