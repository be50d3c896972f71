"""Packs the weights of a whole model, selects the backend of a packed model, and measures its sparsity."""

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from clipmap_hf.families import FAMILIES
from clipmap_hf.models.loading import check_float
from clipmap_hf.ternary.config import BACKENDS, TernaryConfig
from clipmap_hf.ternary.integration import TernaryQuantizer, configs, mark_as_packed, named, swap
from clipmap_hf.ternary.layers import TERNARY, TernaryModule
from clipmap_hf.ternary.quantizers import ternarized


__all__ = ["pack_model", "set_backend", "sparsity", "ternary_modules"]


def ternary_modules(model: PreTrainedModel, config: TernaryConfig) -> list[str]:
    """
    Returns the names of the modules that `config` selects in a model.

    Raises:
        ValueError: If the model has no modules of a part, or a tower is no transformer.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is not None and not family.transformers:
        raise ValueError(
            f"Ternary weights are those of transformers; the vision tower of a model of type "
            f"{model.config.model_type!r} cannot have them."
        )
    return config.modules or config.select(name for name, module in model.named_modules() if type(module) in TERNARY)


@torch.no_grad()
def pack_model(
    model: PreTrainedModel,
    config: TernaryConfig,
    levels: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """
    Makes a copy of a model with packed ternary weights, which `save_pretrained` writes and `from_pretrained` loads.

    Args:
        model: A float model. Weights that are ternary already keep their trits if `levels` has their levels.
        config: The options. Its `modules` are filled in.
        levels: Learned levels `(rows, groups)` by module name. They replace those that the quantizer computes.
        dtype: Dtype of everything that is not ternary.

    Raises:
        ValueError: If the model is packed already, has no modules of a part, or has weights that are too large or too
            small for fp16.
    """
    check_float(model, "Packing")
    config = dataclasses.replace(config, modules=ternary_modules(model, config))
    packed = copy.deepcopy(model).to(dtype)
    swap(packed, config)
    for name in config.modules:
        weight = model.get_submodule(name).weight.detach().float()
        module, level = packed.get_submodule(name), (levels or {}).get(name)
        trits, level = ternarized(weight, config.quantizer, config.granularity, config.block_size, level)
        with named(name):
            if weight.any() and not level.any():
                raise ValueError("All levels are less than the smallest fp16 number; the weights are too small.")
            module.store(trits, level)
            module.ready(dtype)
    _check_finite(model, packed)
    mark_as_packed(packed.requires_grad_(False), TernaryQuantizer(config))
    for part in configs(packed.config):
        part.dtype = dtype
    return packed


def _check_finite(model: nn.Module, packed: nn.Module) -> None:
    """Raises a `ValueError` if the cast of float parameters has made finite values infinite."""
    before = dict(model.named_parameters())
    for name, parameter in packed.named_parameters():
        if before[name].isfinite().all() and not parameter.isfinite().all():
            raise ValueError(
                f"{name} has values too large for {parameter.dtype}; keep what is not ternary in float32."
            )


def set_backend(model: nn.Module, backend: str) -> None:
    """
    Selects how all linear layers of a packed model run:

    - `float`: exactly; the float weights are kept in memory.
    - `packed`: exactly; the weights are unpacked at every call.
    - `int8`: with tokens rounded to 8 bits. Every row must have one level.
    - `auto`: like `int8` where this is possible (every row has one level, and no gradient is needed) and expected to
      be faster (large layers on CPUs with AVX2), otherwise like `float`.

    Args:
        model: The packed model.
        backend: One of `BACKENDS`.

    Raises:
        ValueError: If the backend is unknown, the model has no ternary modules, or `int8` is selected but blocks have
            levels of their own.
    """
    modules = [module for module in model.modules() if isinstance(module, TernaryModule)]
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it must be one of {BACKENDS}.")
    if not modules:
        raise ValueError(f"A {type(model).__name__} without ternary modules has no backends; load a packed folder.")
    if backend == "int8" and any(module.weight_scale.shape[1] > 1 for module in modules):
        raise ValueError("backend='int8' needs one level per row or tensor, not blocks; use 'float' or 'packed'.")
    for module in modules:
        module.set_backend(backend)


def sparsity(model: nn.Module) -> float:
    """
    Returns the share of zeros among the ternary weights of a packed model.

    Raises:
        ValueError: If the model has no ternary modules.
    """
    trits = [module.trits() for module in model.modules() if isinstance(module, TernaryModule)]
    if not trits:
        raise ValueError(f"A {type(model).__name__} without ternary modules has no trits; load a packed folder.")
    return sum(int((tensor == 0).sum()) for tensor in trits) / sum(tensor.numel() for tensor in trits)
