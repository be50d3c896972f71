"""Prepares a stage for Accelerate's backends: DDP, FSDP on a copy in shards, DeepSpeed, or none."""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from clipmap_hf.data.loader import BatchPlan
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.optimization import adamw
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.stages.logits import logit_parameters


__all__ = ["can_step", "check_options", "cuts_state", "prepare_stage", "update_whole"]


def prepare_stage(
    stage: Stage, accelerator: Accelerator, arguments: StageArguments, local_size: int
) -> tuple[Stage, nn.Module, torch.optim.Optimizer]:
    """
    What is trained: `stage`, or under FSDP a copy of it; that as the backend wraps it; and its optimizer.

    Args:
        stage: What to train.
        accelerator: Knows the backend.
        arguments: The stage's numbers.
        local_size: Pairs of a process in a step.

    Raises:
        ValueError: If the stage exchanges gradients itself, and the backend would too, or swaps weights under FSDP.
    """
    kind = accelerator.distributed_type
    if stage.averages_gradients:
        if cuts_state(accelerator):
            raise ValueError(
                f"The {type(stage).__name__} exchanges gradients itself and cannot run under {kind.value}; launch it "
                "with recipes/accelerate_configs/multi_gpu.yaml."
            )
        optimizer = adamw(stage, arguments)
        return stage, accelerator.prepare_model(stage, evaluation_mode=True), accelerator.prepare(optimizer)
    if stage.swaps_weights and kind == DistributedType.FSDP:
        raise ValueError(
            f"The {type(stage).__name__} computes with other weights than it trains, which FSDP would put back; "
            "launch it with recipes/accelerate_configs/multi_gpu.yaml."
        )
    if kind == DistributedType.DEEPSPEED:
        _tell_deepspeed(stage, accelerator, arguments, local_size)
    trained = _copy_to_shard(stage, accelerator) if kind == DistributedType.FSDP else stage
    return trained, *accelerator.prepare(trained, adamw(trained, arguments))


def check_options(stage: Stage, run: RunArguments, plan: BatchPlan) -> None:
    """
    Checks that a stage can be trained as its run says.

    Raises:
        ValueError: If what the run asks for would compute a layer twice, in two ways or with two weights.
    """
    if run.torch_compile and plan.micro_batch_size:
        raise ValueError(
            "torch_compile and micro_batch_size do not go together: a chunk must be computed twice in the same way, "
            "and torch.compile may change the way in between. Leave one of them out."
        )
    if run.gradient_checkpointing and (stage.averages_gradients or stage.swaps_weights):
        raise ValueError(
            f"The {type(stage).__name__} computes with other weights than its model's, which gradient_checkpointing "
            "would not find again in the backward pass; take micro_batch_size (gradient caching) to save memory."
        )


@torch.no_grad()
def update_whole(stage: Stage, trained: Stage) -> None:
    """Gives `stage` the weights of its copy in shards, if there is one; all processes take part."""
    if trained is stage:
        return
    for whole, part in zip(stage.parameters(), trained.parameters(), strict=True):
        whole.copy_(part.full_tensor() if isinstance(part, DTensor) else part)


def cuts_state(accelerator: Accelerator) -> bool:
    """Whether the backend cuts weights or the optimizer's state into a part for each process."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def can_step(chunks: torch.Tensor, accelerator: Accelerator) -> bool:
    """
    Whether all processes can take a step together: each needs a chunk, and under FSDP, which exchanges weights in each
    chunk, as many as the others.

    Args:
        chunks: How many each process has `(processes,)`.
        accelerator: Knows the backend.
    """
    enough = bool((chunks > 0).all())
    return enough and (accelerator.distributed_type != DistributedType.FSDP or bool((chunks == chunks[0]).all()))


def _copy_to_shard(stage: Stage, accelerator: Accelerator) -> Stage:
    """Copies a stage for FSDP to cut into shards; the stage itself stays whole."""
    shared = getattr(stage, "_teachers", [])
    copied = copy.deepcopy(stage, {id(shared): shared})  # frozen teachers need no copy
    # FSDP takes no scalars. They stay out of it, and need nothing: every process has their whole gradient.
    scalars = logit_parameters(copied.trained)
    accelerator.state.fsdp_plugin.ignored_modules = [nn.ParameterList(scalars)]
    for scalar in scalars:
        scalar.data = scalar.data.to(accelerator.device)
    return copied


def _tell_deepspeed(stage: Stage, accelerator: Accelerator, arguments: StageArguments, local_size: int) -> None:
    """Gives DeepSpeed the numbers of a step, which it takes by itself."""
    numbers = {"train_micro_batch_size_per_gpu": local_size, "gradient_accumulation_steps": 1}
    accelerator.deepspeed_plugin.deepspeed_config.update(numbers | {"gradient_clipping": arguments.max_grad_norm})
    # It broadcasts all parameters byte by byte, which fails for a scalar, but for those with this mark.
    for scalar in logit_parameters(stage.trained):
        scalar.ds_optim_param = True
