"""Makes transformers load and save packed models, by a quantizer for the method `clipmap_ternary`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from clipmap_hf.ternary.config import METHOD, TernaryConfig
from clipmap_hf.ternary.layers import TERNARY, TernaryModule


__all__ = ["TernaryQuantizer", "as_float_config", "configs", "mark_as_packed", "named", "register", "swap"]

_TOWERS = ("vision_config", "text_config")
_KINDS = ("weight", "weight_scale")  # tensors that a ternary module cannot be without
_MISSING = "is missing in the file; the file is corrupt or belongs to another model."
# Modules of a whole model. A model that is a single tower lacks some of them.
_PLACES = ("vision_model", "text_model", "visual_projection", "text_projection")


class TernaryQuantizer(HfQuantizer):
    """
    The quantizer of packed models. It puts ternary modules in the places that the config names before weights are
    loaded, and checks the loaded weights afterwards. For `dequantize`, it replaces ternary modules by stock float
    modules. It does not make a float model ternary; recipes/ternarize.py does.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs
    ) -> None:
        with torch.device("meta"):
            places = swap(model, self.quantization_config)
        if checkpoint_files:
            _check_complete(places, checkpoint_files)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        dtype = model.requires_grad_(False).dtype  # trits cannot be trained, and `int8` has no gradient
        for name, module in model.named_modules():
            if isinstance(module, TernaryModule):
                for kind in _KINDS:  # transformers would only warn, and use uninitialized memory
                    if not getattr(getattr(module, kind), "_is_hf_initialized", False):
                        raise ValueError(f"{name}.{kind} {_MISSING}")
                with named(name):
                    module.ready(dtype)
        return model

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Makes a model float. The default of `dtype` is the model's own, even if its config names another dtype."""
        return super().dequantize(model, dtype or model.dtype)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, TernaryModule)]
        for name, module in found:
            model.set_submodule(name, module.float_module(dtype))
        for config in configs(model.config):
            config.dtype = dtype
        return model.to(dtype).requires_grad_(True)

    def remove_quantization_config(self, model: nn.Module) -> None:
        super().remove_quantization_config(model)
        as_float_config(model.config)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@contextmanager
def named(module: str) -> Iterator[None]:
    """Adds the name of a module to the `ValueError`s that are raised in the context."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error


def swap(model: nn.Module, config: TernaryConfig) -> dict[str, str]:
    """
    Replaces the modules that `config.modules` names by ternary modules. If the model is a single tower, only its own
    modules are replaced.

    Args:
        model: The model, which is changed in place.
        config: The options.

    Returns:
        The names of the modules that were replaced, in `config.modules`, and what the model calls them.

    Raises:
        ValueError: If the model does not have a module, or the module cannot be ternary.
    """
    if not config.modules:
        raise ValueError("The quantization_config names no modules; it must be that of a packed folder.")
    children, places = {name for name, _ in model.named_children()}, {}
    for name in config.modules:
        tower, _, inner = name.partition(".")
        is_tower = tower not in children and model.config.model_type.endswith(tower)  # the model is that tower
        place = inner if is_tower else name
        if place.partition(".")[0] not in children:
            if tower not in _PLACES:
                raise ValueError(f"The quantization_config names {name}, which the model does not have.")
            continue
        try:
            module = model.get_submodule(place)
        except AttributeError as error:
            raise ValueError(f"The quantization_config names {name}, which the model does not have.") from error
        if type(module) not in TERNARY:
            raise ValueError(f"{name} is a {type(module).__name__}, which cannot be ternary.")
        model.set_submodule(place, TERNARY[type(module)](module, config))
        places[name] = place
    return places


def _check_complete(places: Mapping[str, str], files: Sequence[str]) -> None:
    """
    Checks that files hold all packed tensors. transformers would draw random weights for missing ones, and fail with a
    message about bytes.

    Args:
        places: What `swap` returns.
        files: The model's safetensors files.

    Raises:
        ValueError: If a tensor is missing.
    """
    found = set()
    for path in files:
        with safe_open(path, "pt") as opened:
            found.update(opened.keys())
    for name, place in places.items():
        for kind in _KINDS:
            if not {f"{name}.{kind}", f"{place}.{kind}"} & found:
                raise ValueError(f"{name}.{kind} {_MISSING}")


def mark_as_packed(model: nn.Module, quantizer: TernaryQuantizer) -> None:
    """Records, for transformers, that a model is packed and how: in the model, its config and its towers' configs."""
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    for config in configs(model.config):
        config.quantization_config = quantizer.quantization_config.to_dict()
        config._is_quantized = True
    model.config.quantization_config = quantizer.quantization_config


def as_float_config(config: Any) -> Any:
    """Turns a packed model's config into that of a float model, in place, together with its towers' configs."""
    for part in configs(config):
        part.__dict__.pop("quantization_config", None)
        part.__dict__.pop("_is_quantized", None)
    return config


def register() -> None:
    """Registers the quantizer in transformers, unless it is registered already."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(TernaryConfig)
        register_quantizer(METHOD)(TernaryQuantizer)


def configs(config: Any) -> list[Any]:
    """Returns a model's config and those of its towers."""
    return [config, *(inner for name in _TOWERS if (inner := getattr(config, name, None)) is not None)]


register()  # `clipmap_hf` cannot call it while this module is still being imported
