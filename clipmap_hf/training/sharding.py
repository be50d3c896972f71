"""FSDP: a copy of a stage is trained in shards, and the whole one is brought up to it whenever it is looked at."""

import copy

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from clipmap_hf.training.stages import Stage


__all__ = ["copy_to_shard", "update_whole"]


def copy_to_shard(stage: Stage, accelerator: Accelerator) -> Stage:
    """
    What `accelerator` may cut into shards in place of `stage`, which stays whole.

    FSDP takes no scalars. The logit scale stays out of it, and needs nothing: every process has its whole gradient.
    """
    shared = getattr(stage, "_teachers", [])
    copied = copy.deepcopy(stage, {id(shared): shared})  # frozen teachers need no copy
    accelerator.state.fsdp_plugin.ignored_modules = [nn.ParameterList([copied.trained.logit_scale])]
    copied.trained.logit_scale.data = copied.trained.logit_scale.data.to(accelerator.device)
    return copied


@torch.no_grad()
def update_whole(stage: Stage, sharded: Stage) -> None:
    """Gives `stage` the weights of its copy; all processes take part."""
    for whole, part in zip(stage.parameters(), sharded.parameters(), strict=True):
        whole.copy_(part.full_tensor() if isinstance(part, DTensor) else part)
