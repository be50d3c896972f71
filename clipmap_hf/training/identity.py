"""What decides the result of a run, and what of it may change when the run is gone on with."""

from typing import Any

from accelerate import Accelerator

from clipmap_hf.config.json_values import json_values
from clipmap_hf.data.loader import BatchPlan, PairDataset, PairStream
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.sharding import cuts_state


__all__ = ["run_identity", "what_may_change"]

# Two ways to say the same, which a plan has resolved.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "warmup_ratio")


def run_identity(
    arguments: StageArguments,
    run: RunArguments,
    pairs: PairDataset | PairStream,
    plan: BatchPlan,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """
    All that decides the result of training, as JSON values. No checkpoint of anything else is gone on with.

    Args:
        arguments: The stage's numbers.
        run: How it runs.
        pairs: What it is trained on.
        plan: How the pairs are split over processes.
        accelerator: Knows the backend and the precision.
    """
    identity = {name: value for name, value in json_values(arguments).items() if name not in _BATCH}
    identity |= {"batch_size": plan.batch_size, "micro_batch_size": plan.micro_batch_size}
    identity |= {"seed": run.seed, "torch_compile": run.torch_compile, "processes": plan.world_size}
    identity["mixed_precision"] = accelerator.mixed_precision
    if cuts_state(accelerator):
        identity["backend"] = accelerator.distributed_type.value
    if isinstance(pairs, PairStream):  # whose order depends on who reads which shard
        return identity | {"dataloader_num_workers": plan.num_workers, "shards": pairs.pairs.num_shards}
    return identity | {"rows": len(pairs)}


def what_may_change(pairs: PairDataset | PairStream, accelerator: Accelerator) -> set[str]:
    """
    The entries of `run_identity` with which a run may be gone on with. It may be made longer, and it may have more or
    fewer processes where these see the same batches and each has the whole state.

    Args:
        pairs: What the run is trained on.
        accelerator: Knows the backend.
    """
    any_number = isinstance(pairs, PairDataset) and not cuts_state(accelerator)
    return {"max_steps", "num_train_epochs"} | ({"processes"} if any_number else set())
