"""What decides the result of a run, and what of it may change when the run is gone on with."""

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from clipmap_hf.data.loader import BatchPlan, PairDataset, PairStream
from clipmap_hf.training.arguments import RunArguments, StageArguments
from clipmap_hf.training.sharding import cuts_state


__all__ = ["run_identity", "what_may_change"]


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
    identity = {**asdict(arguments), "seed": run.seed, "compile": run.compile, "processes": plan.world_size}
    identity["mixed_precision"] = accelerator.mixed_precision
    if cuts_state(accelerator):
        identity["backend"] = accelerator.distributed_type.value
    if isinstance(pairs, PairStream):  # whose order depends on who reads which shard
        return identity | {"num_workers": plan.num_workers, "shards": pairs.pairs.num_shards}
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
    return {"steps", "epochs"} | ({"processes"} if any_number else set())
