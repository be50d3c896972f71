"""
What test_distributed.py asserts, computed by one process or, under torchrun, by several: `FOLDER REPORT`.

The folder is the one that test_distributed.py calls a workshop; the report is written by `torch.save`.
"""

import copy
import dataclasses
import hashlib
import json
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from distributed_processes import RECIPES

import clipmap_hf.data.calibration_pairs
from clipmap_hf import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.loader import PairDataset
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.sources import evaluation_batches, stage_seed, training_collator
from clipmap_hf.distributed import average_gradients, gather, join_processes, process_count, process_index
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.starts import start_mapper
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.teacher_cache.make import make_teacher_cache
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.mapping import MappingStage
from clipmap_hf.training.stages.masking import MaskingStage
from clipmap_hf.training.trainer import Trainer


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)
STAGES = ("contrastive", "mapping", "distillation", "cached", "projected", "masking")
# name -> micro_batch_size, learn_logit_scale, data
CASES = {
    "plain": (None, False, "pairs"),
    "in chunks, learned scale": (2, True, "pairs"),
    "bad rows, learned scale": (None, True, "bad"),
    "in chunks, bad rows": (2, False, "bad"),
}
STEPS, BATCH = 5, 8
# name -> what a calibrated start is told
STARTS = {
    "mapped": {"refit": False},
    "refitted": {"refit_steps": 0},
    "refitted in steps": {"refit_steps": 5},
    "importance": {"initializer": "importance"},
    "within a budget": {"vision": TowerConfig(), "text": TowerConfig(), "budget": {"params": "100k"}, "refit": False},
    "the same pairs in steps": {"refit_steps": 20},
}


# Exchanges of tensors


def local(rows: torch.Tensor) -> torch.Tensor:
    """The rows of this process: of two, the first has five eighths of them."""
    cut = 5 * len(rows) // 8
    return rows if process_count() == 1 else (rows[:cut], rows[cut:])[process_index()]


def gathered() -> dict[str, torch.Tensor]:
    """Rows of all processes, and the gradients by a loss over all of them, averaged as DDP does."""
    rows, weight = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.eye(6)
    weight, scale = (one.double().requires_grad_() for one in (weight, torch.tensor(2.0)))
    features = gather(local(rows) @ weight)
    (scale * features @ features.T).logsumexp(dim=1).pow(2).mean().backward()
    for tensor in (weight, scale):
        if process_count() > 1:
            dist.all_reduce(tensor.grad)
            tensor.grad /= process_count()
    empty = torch.arange(3.0) if process_index() == 0 else torch.zeros(0)  # a process may have none
    counted = gather(local(torch.arange(8)))
    return {"rows": counted, "rest": gather(empty), "weight": weight.grad, "scale": scale.grad}


def averaged() -> dict[str, torch.Tensor]:
    """Gradients through `average_gradients`, of a loss that differs between the processes."""
    first, second = torch.arange(6.0).reshape(2, 3).requires_grad_(), torch.ones(3).requires_grad_()
    one, two = average_gradients([first.t(), second])  # not contiguous
    loss = (process_index() + 1) * ((one**2).sum() + 10 * two.sum())
    loss.backward()
    return {"values": one.detach().t(), "first": first.grad, "second": second.grad}


# Starts


def started(shop: "Workshop", name: str) -> dict[str, Any]:
    """
    A student started from 23 pairs, of which two processes have 12 and 11, or two batches and one; of "the same
    pairs", each has all.
    """
    clipmap_hf.data.calibration_pairs._BATCH_SIZE = 11
    rows = load_pairs(str(shop.folder / "odd.parquet"))
    config = dataclasses.replace(SMALL, **{"initializer": "calibrated"} | STARTS[name])
    pairs = CalibrationPairs(rows, shop.processor, 23)
    if name == "the same pairs in steps":
        pairs = [pairs.collator(list(rows.select(range(start, start + 8)))) for start in (0, 8)]
    compressor = ClipMapCompressor.from_pretrained(shop.folder / "teacher", config, calibration_data=pairs)
    state, student = compressor.mapper.state_dict(), compressor.export()
    return {
        "batches": gather_object([[len(batch["pixel_values"]) for batch in pairs]]),
        "weights": {name: tensor.clone() for name, tensor in student.state_dict().items()},
        "equal": len(set(gather_object([digest(state)]))) == 1,
    }


# Training


class Workshop:
    """Stages and data, read from the folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processor = load_processor(str(folder / "teacher"))
        self.pairs = {name: PairDataset(load_pairs(str(folder / f"{name}.parquet"))) for name in ("pairs", "bad")}
        self.out = folder / f"trained-{process_count()}"

    def teacher(self) -> Teacher:
        return Teacher.load(str(self.folder / "teacher"))

    def data(self, name: str) -> DataArguments:
        path = str(self.folder / f"{name}.parquet")
        return DataArguments(train_data=path, crop_scale=[0.5, 1.0], max_bad_fraction=1.0)

    def cache(self, name: str, folder: str):
        """The teacher cache in `folder`, built if it is not there."""
        arguments = TeacherCacheArguments(teacher_cache=str(self.folder / folder), views=2)
        return make_teacher_cache([self.teacher()], self.processor, self.data(name), arguments)

    def trainer(self, stage_name: str, case: str) -> Trainer:
        micro, learned, data = CASES[case]
        teacher = load_model(str(self.folder / "teacher"))
        mapper = start_mapper(teacher, SMALL)
        collator = training_collator(self.data(data), self.processor, stage_seed("distillation", 0))
        if stage_name == "mapping":
            stage = MappingStage(mapper, logit_scale=20.0, learn_logit_scale=learned)
        elif stage_name == "contrastive":
            stage = ContrastiveStage(mapper.export(), logit_scale=20.0, learn_logit_scale=learned)
        elif stage_name == "projected":  # streams of another width than the student's
            stage = DistillationStage(
                mapper.export(),
                teachers=[teacher],
                logit_scale=20.0,
                learn_logit_scale=learned,
                losses={"affinity": 1.0, "hidden": 0.1},
            )
        elif stage_name == "masking":
            stage = MaskingStage(
                copy.deepcopy(teacher),
                teachers=[teacher],
                logit_scale=20.0,
                learn_logit_scale=learned,
                student=SMALL,
                ramp_steps=3,
            )
        else:
            cached = stage_name == "cached"
            stage = DistillationStage(
                mapper.export(),
                teachers=[] if cached else [teacher],
                logit_scale=20.0,
                learn_logit_scale=learned,
                losses={"affinity": 0.7, "contrastive": 0.3},
            )
            if cached:  # always the one that a single process has made: it rounds to half precision
                collator.teacher_cache = self.cache(data, f"cache-{data}")
                collator.views = collator.teacher_cache.views
        arguments = StageArguments(
            max_steps=STEPS,
            batch_size=BATCH,
            micro_batch_size=micro,
            learning_rate=1e-3,
            warmup_steps=1,
            max_grad_norm=0.5,
        )
        run = RunArguments(output_dir=str(self.out / f"{stage_name}-{case}"), logging_steps=1, save_steps=1000)
        return Trainer(
            stage=stage, arguments=arguments, run=run, pairs=self.pairs[data], collator=collator, max_bad_fraction=1.0
        )


def trained(shop: Workshop, stage_name: str, case: str) -> dict[str, Any]:
    """What a training logged and left, what it sent, and whether all processes hold the same in the end."""
    trainer = shop.trainer(stage_name, case)
    stage, rows, wrappers = trainer.stage, [], []
    with counted_traffic() as sent:
        step = trainer._step

        def watched(wrapped, optimizer, chunks):
            rows.append([len(chunk["input_ids"]) for chunk in chunks])
            wrappers[:] = [wrapped]
            return step(wrapped, optimizer, chunks)

        trainer._step = watched
        trainer.train()
    state = stage.state_dict()
    (wrapper,) = wrappers
    report = {
        "log": [json.loads(line) for line in trainer.log.file.read_text().splitlines()],
        "rows": gather_object([rows]),
        "weights": {name: tensor.clone() for name, tensor in stage.student().state_dict().items()},
        "equal": len(set(gather_object([digest(state)]))) == 1,
        "sent": dict(sent),
        "student_bytes": sum(p.nbytes for p in stage.student().parameters()),
        "teacher_bytes": sum(p.nbytes for p in load_model(str(shop.folder / "teacher")).parameters()),
    }
    if isinstance(wrapper, torch.nn.parallel.DistributedDataParallel):
        report["reduced_by_ddp"] = wrapper._get_ddp_logging_data()["total_parameter_size_bytes"]
    return report


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()


class counted_traffic:
    """A context that counts the bytes which this process sends by each function of torch.distributed."""

    NAMES = {"all_reduce": 0, "all_gather": 1, "broadcast": 0, "_broadcast_coalesced": 1, "reduce_scatter": 1}

    def __enter__(self) -> dict[str, int]:
        self.sent, self.originals = defaultdict(int), {name: getattr(dist, name) for name in self.NAMES}
        for name, position in self.NAMES.items():
            setattr(dist, name, self.counting(name, self.originals[name], position))
        return self.sent

    def counting(self, name: str, function, position: int):
        def count(*args, **kwargs):
            tensors = args[position] if isinstance(args[position], (list, tuple)) else [args[position]]
            self.sent[name] += sum(tensor.nbytes for tensor in tensors)
            return function(*args, **kwargs)

        return count

    def __exit__(self, *_):
        for name, function in self.originals.items():
            setattr(dist, name, function)


# Evaluation and recipes


def evaluated(shop: Workshop) -> dict[str, Any]:
    """Retrieval on a set that divides, on one that does not, and on one with several captions per image."""
    model = load_model(str(shop.folder / "teacher"))
    report = {}
    for name in ("pairs", "odd", "captions"):
        data = DataArguments(train_data="unused", eval_data=str(shop.folder / f"{name}.parquet"))
        report[name] = evaluate_retrieval(model, evaluation_batches(data, shop.processor))
    try:
        data = DataArguments("unused", eval_data=str(shop.folder / "one.parquet"))
        evaluation_batches(data, shop.processor)
        report["one"] = None
    except ValueError as error:
        report["one"] = str(error)
    return report


def recipe(name: str, *argv) -> None:
    """Runs a recipe in this process."""
    before, sys.argv = sys.argv, [name, *map(str, argv)]
    try:
        runpy.run_path(str(RECIPES / name), run_name="__main__")
    finally:
        sys.argv = before


def by_recipes(shop: Workshop) -> None:
    """map.py, cache.py, distill.py and evaluate.py, one after the other."""
    out, pairs = shop.folder / f"recipes-{process_count()}", shop.folder / "odd.parquet"
    teacher = ("--teacher", shop.folder / "teacher")
    numbers = ("steps", 3, "batch_size", 8, "warmup_steps", 0, "logit_scale", 20)
    mapping, distillation = (
        [f"--{stage}_{one}" if isinstance(one, str) else one for one in numbers]
        for stage in ("mapping", "distillation")
    )
    data = ("--train_data", pairs)
    cache = ("--teacher_cache", out / "cache", "--views", 2)
    sizes = ("--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16)
    run = ("--log_every", 1, "--eval_data", shop.folder / "captions.parquet")
    # Gradient steps of a calibrated start go over each process's own pairs; starts are compared by themselves.
    sizes += ("--initializer", "diagonal")
    recipe("map.py", *teacher, *sizes, *data, *mapping, *run, "--output_dir", out / "mapped")
    recipe("cache.py", *teacher, *data, *cache)
    recipe(
        "distill.py",
        *("--student_model", out / "mapped", *teacher, *data, *cache, *distillation, *run),
        *("--output_dir", out / "student"),
    )
    recipe(
        "evaluate.py",
        *("--model", out / "student", "--eval_data", shop.folder / "captions.parquet"),
        *("--output", out / "results.json"),
    )


def main() -> None:
    folder, report_file = map(Path, sys.argv[1:])
    state = join_processes()
    shop = Workshop(folder)
    report = {
        "processes": process_count(),
        "gathered": gathered(),
        "averaged": averaged(),
        "started": {name: started(shop, name) for name in STARTS},
        "trained": {(stage, case): trained(shop, stage, case) for stage in STAGES for case in CASES},
        "evaluated": evaluated(shop),
    }
    by_recipes(shop)
    if state.is_main_process:
        torch.save(report, report_file)


if __name__ == "__main__":
    main()
