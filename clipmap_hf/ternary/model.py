"""A whole model, made ternary: weights replaced by what trits stand for, packed, or made float again."""

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from clipmap_hf.models.loading import check_float
from clipmap_hf.ternary.config import BACKENDS, TernaryConfig
from clipmap_hf.ternary.integration import TernaryQuantizer, configs, mark_as_packed, named, swap
from clipmap_hf.ternary.layers import TERNARY, TernaryModule
from clipmap_hf.ternary.quantizers import ternarized


__all__ = ["pack_model", "set_backend", "sparsity", "ternary_modules"]


def ternary_modules(model: nn.Module, config: TernaryConfig) -> list[str]:
    """
    The names of the modules that `config` asks for.

    Raises:
        ValueError: If there are none of a part.
    """
    return config.modules or config.select(name for name, module in model.named_modules() if type(module) in TERNARY)


@torch.no_grad()
def pack_model(
    model: PreTrainedModel,
    config: TernaryConfig,
    levels: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """
    A copy of a model with packed ternary weights, which `save_pretrained` writes and `from_pretrained` loads.

    Args:
        model: A float model; weights that are ternary already keep their trits if `levels` say theirs.
        config: The options; `modules` are filled in.
        levels: Learned levels `(rows, groups)` by module name, instead of those that the quantizer finds.
        dtype: Of all that is not ternary.

    Raises:
        ValueError: If the model is packed already, has nothing of a part, or has weights that are too large or too
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
    """Whether a cast left what is not ternary finite."""
    before = dict(model.named_parameters())
    for name, parameter in packed.named_parameters():
        if before[name].isfinite().all() and not parameter.isfinite().all():
            raise ValueError(f"{name} has values too large for {parameter.dtype}; keep the rest in float32.")


def set_backend(model: nn.Module, backend: str) -> None:
    """
    Says how a packed model's linear layers are run, all of them: `float`, exactly, with the float weights in memory;
    `packed`, exactly, unpacked at every call; `int8`, with tokens rounded to 8 bits; or `auto`: `int8` where it is
    possible (every row has one level, and no gradient is asked for) and expected to be faster (large layers, on CPUs
    with AVX2), else `float`.

    Raises:
        ValueError: If the backend is unknown, the model has nothing ternary, or its levels are those of blocks, of
            which there is no `int8`.
    """
    modules = [module for module in model.modules() if isinstance(module, TernaryModule)]
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it must be one of {BACKENDS}.")
    if not modules:
        raise ValueError(f"A {type(model).__name__} without ternary modules has no backends; load a packed folder.")
    if backend == "int8" and any(module.weight_scale.shape[1] > 1 for module in modules):
        raise ValueError("backend='int8' needs one level a row or tensor, not blocks; take 'float' or 'packed'.")
    for module in modules:
        module.set_backend(backend)


def sparsity(model: nn.Module) -> float:
    """
    The share of zeros among a packed model's ternary weights.

    Raises:
        ValueError: If it has none.
    """
    trits = [module.trits() for module in model.modules() if isinstance(module, TernaryModule)]
    if not trits:
        raise ValueError(f"A {type(model).__name__} without ternary modules has no trits; load a packed folder.")
    return sum(int((one == 0).sum()) for one in trits) / sum(one.numel() for one in trits)
