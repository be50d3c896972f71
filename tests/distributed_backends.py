"""
What test_accelerate_configs.py asserts of FSDP and DeepSpeed, by two processes on the CPU: `BACKEND WORKSHOP REPORT`.

Accelerate knows both on accelerators only, so it is told that these processes are some. What the backends do to a
stage is the same: how they cut, exchange, step, save and load.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from distributed_checks import CASES, Workshop
from transformers import CLIPModel

from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.retrieval import evaluate_retrieval


ENVIRONMENTS = {
    "fsdp": {  # what `accelerate launch` makes of fsdp2.yaml; a test compares
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "CLIPEncoderLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
    },
    "deepspeed": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "DS_ACCELERATOR": "cpu",
    },
}
STAGES = ("contrastive", "distillation")


def join_as(backend: str) -> PartialState:
    """Joins the processes by gloo, and lets Accelerate take them for those of `backend`."""
    state = join_processes()
    os.environ.update(ENVIRONMENTS[backend] | {"LOCAL_SIZE": os.environ["LOCAL_WORLD_SIZE"]})
    os.environ.pop("ACCELERATE_USE_CPU")
    taken_for = DistributedType.MULTI_GPU if backend == "fsdp" else DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = taken_for
    return state


def run(shop: Workshop, stage: str, case: str) -> dict:
    """Trains, evaluates and saves; resumes from the step before the last; what came out of both."""
    trainer = shop.trainer(stage, case)
    trainer.run.save_steps = 2
    student = trainer.stage.trained
    data = replace(shop.data("pairs"), eval_data=str(shop.folder / "captions.parquet"))
    batches = evaluation_batches(data, shop.processor)
    trainer.evaluate = lambda model, watched: evaluate_retrieval(model, watched(batches))
    trainer.save = lambda folder, metrics: student.save_pretrained(folder)
    result = trainer.train()
    report = {"weights": copied(student), "metrics": result.metrics}
    report["log"] = [json.loads(line) for line in trainer.log.file.read_text().splitlines()]
    report["backend"] = trainer.accelerator.distributed_type.value
    if PartialState().is_main_process:
        report["saved"] = CLIPModel.from_pretrained(trainer.output_dir).state_dict()
        shutil.rmtree(sorted((trainer.output_dir / "checkpoints").iterdir())[-1])
    PartialState().wait_for_everyone()
    again = shop.trainer(stage, case)
    again.run.save_steps = 2
    again.train()
    return report | {"resumed": copied(again.stage.trained)}


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main() -> None:
    backend, folder, report_file = sys.argv[1], *map(Path, sys.argv[2:])
    state = join_as(backend)
    shop = Workshop(folder)
    shop.out = folder / f"trained-{backend}"
    report = {}
    for stage, cases in (*((stage, CASES) for stage in STAGES), ("mapping", ["plain"])):
        for case in cases:
            try:
                report[stage, case] = run(shop, stage, case)
            except ValueError as error:
                report[stage, case] = str(error)
    if state.is_main_process:
        torch.save(report, report_file)


if __name__ == "__main__":
    main()
