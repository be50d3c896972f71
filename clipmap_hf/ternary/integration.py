"""How transformers loads and saves packed models: its quantizer of the method `clipmap_ternary`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from clipmap_hf.ternary.config import METHOD, TernaryConfig
from clipmap_hf.ternary.layers import TERNARY, TernaryModule


__all__ = ["TernaryQuantizer", "as_float_config", "configs", "mark_as_packed", "named", "register", "swap"]

_TOWERS = ("vision_config", "text_config")
_PLACES = ("vision_model", "text_model", "visual_projection", "text_projection")  # that one tower does not have


class TernaryQuantizer(HfQuantizer):
    """
    Puts ternary modules where a config names them before weights are loaded, and checks them afterwards; makes stock
    float modules of them for `dequantize`. A float model is made ternary by recipes/ternarize.py, not on loading.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        with torch.device("meta"):
            swap(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        dtype = model.requires_grad_(False).dtype  # trits cannot be trained, and `int8` has no gradient
        for name, module in model.named_modules():
            if isinstance(module, TernaryModule):
                for kind in ("weight", "weight_scale"):  # transformers only warns, and leaves what was in memory
                    if not getattr(getattr(module, kind), "_is_hf_initialized", False):
                        raise ValueError(f"{name}.{kind} is missing in the file; it is corrupt, or another's.")
                with named(name):
                    module.ready(dtype)
        return model

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Makes a model float; `dtype` is its own, whatever its config says of what was loaded."""
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
    """Errors of values say of which module they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error


def swap(model: nn.Module, config: TernaryConfig) -> None:
    """
    Puts ternary modules in the places that `config.modules` name. A model that is one tower has only some of them.

    Raises:
        ValueError: If the model has no module of that name, or it cannot be ternary.
    """
    if not config.modules:
        raise ValueError("The quantization_config names no modules; it must be that of a packed folder.")
    children = {name for name, _ in model.named_children()}
    for name in config.modules:
        tower, _, inner = name.partition(".")
        is_bare = tower not in children and model.config.model_type.endswith(tower)
        place = inner if is_bare else name
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


def mark_as_packed(model: nn.Module, quantizer: TernaryQuantizer) -> None:
    """Lets transformers know that a model is packed, and how: in its config and in that of each tower."""
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    for config in configs(model.config):
        config.quantization_config = quantizer.quantization_config.to_dict()
        config._is_quantized = True
    model.config.quantization_config = quantizer.quantization_config


def as_float_config(config: Any) -> Any:
    """A packed model's config, as that of a float one. Its towers' say that there is something to unpack, too."""
    for part in configs(config):
        part.__dict__.pop("quantization_config", None)
        part.__dict__.pop("_is_quantized", None)
    return config


def register() -> None:
    """Makes the quantizer known to transformers, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(TernaryConfig)
        register_quantizer(METHOD)(TernaryQuantizer)


def configs(config: Any) -> list[Any]:
    """A model's config, and those of its towers."""
    return [config, *(inner for name in _TOWERS if (inner := getattr(config, name, None)) is not None)]


register()  # again, if this module was imported before any model was
