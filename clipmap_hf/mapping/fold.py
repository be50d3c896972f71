"""An exact reparametrization: LayerNorms without scale and shift, a residual stream without mean.

A stream of that kind can be mapped linearly: up to a scalar for each token, LayerNorm commutes with any map whose rows
and columns sum to zero.
"""

import re
from collections.abc import Mapping

import torch

from clipmap_hf.families import Family


__all__ = ["fold"]

_SMALLEST_SCALE = 1e-3  # of a LayerNorm's largest; dividing a shift by less would cost precision


def fold(tensors: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """
    Weights of a model with the same outputs (what SliceGPT does to language models), in which

    * every LayerNorm that linear layers read has scale 1 and shift 0, for these layers have taken them over. The final
      ones keep a shift, because the projections have no bias; and where their scale is all but zero, scale and shift.
    * these layers do not read the mean of their input, which is zero;
    * whatever adds to the residual stream adds nothing to its mean, which nobody reads.

    `pre_layrnorm` writes the stream and stays as it is.

    Args:
        tensors: A state dict.
        family: Its table.

    Returns:
        A state dict of new tensors.
    """
    folded = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in tensors:
        spec = family.match(name)
        for rule in family.norms:
            if spec.kind == f"{rule.norm}.weight":
                readers = [reader.replace("*", str(spec.layer)) for reader in rule.readers]
                _fold_norm(folded, name.removesuffix(".weight"), readers)
    for name, tensor in folded.items():
        axes = family.match(name).rule.axes
        if "residual" in axes and not re.search(r"norm\d?\.", name):
            tensor -= tensor.mean(dim=axes.index("residual"), keepdim=True)
    return folded


def _fold_norm(tensors: dict[str, torch.Tensor], norm: str, readers: list[str]) -> None:
    scale, shift = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
    if all(f"{reader}.bias" in tensors for reader in readers):
        for reader in readers:
            weight = tensors[f"{reader}.weight"]
            tensors[f"{reader}.bias"] += weight @ shift
            weight *= scale
            weight -= weight.mean(dim=1, keepdim=True)
        scale.fill_(1)
        shift.zero_()
        return
    large = scale.abs() > _SMALLEST_SCALE * scale.abs().max()
    for reader in readers:
        tensors[f"{reader}.weight"] *= torch.where(large, scale, 1)
    shift /= torch.where(large, scale, 1)
    scale.masked_fill_(large, 1)
