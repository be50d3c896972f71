"""
What does a batch that does not fit into memory cost? Times whole optimizer steps (forward, backward, clipping, AdamW)
of a large batch, in chunks whose embeddings alone are kept (gradient caching), and of plain batches of a chunk's size,
each in a process of its own, on random weights and data: a student of a ViT-B/16.

    python recipes/benchmarks/batch.py --student tiny --batch_size 4096 --micro_batch_size 256

`s/pair` is the median of all rounds. Memory is the largest that a process had at any time, Python, libraries, weights,
AdamW's state and the pixels of its whole batch (bytes, as the loader makes them) included: its resident set, or on a
GPU what is allocated there. `at first` is what it had before its first step.

On a CPU, the resident set grows with every chunk under glibc's allocator, though what is in use does not. It gives
memory back (and without the second variable is a good deal slower) under

    MALLOC_MMAP_THRESHOLD_=1048576 THP_MEM_ALLOC_ENABLE=1 python recipes/benchmarks/batch.py
"""

import argparse
import resource
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import torch
from mapping_step import random_chunks, take_step
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import PRESETS, TowerConfig, presets_of, student_config
from clipmap_hf.starts import start_mapper
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.optimization import adamw
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.mapping import MappingStage


STAGES = ("contrastive", "mapping", "distillation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=["contrastive", "mapping"], help="what to train")
    parser.add_argument("--student", choices=presets_of(TowerConfig), default="tiny", help="preset of the student")
    parser.add_argument("--batch_size", type=int, default=4096, help="pairs per step of the large batch")
    parser.add_argument("--micro_batch_size", type=int, default=256, help="pairs per chunk, and per plain batch")
    parser.add_argument("--plain_steps", type=int, default=4, help="timed steps of plain batches, in each round")
    parser.add_argument("--rounds", type=int, default=1, help="rounds; in each, a process for each batch")
    arguments = parser.parse_args()
    if arguments.batch_size % arguments.micro_batch_size:
        parser.error(f"--batch_size must be a multiple of --micro_batch_size, {arguments.micro_batch_size}")
    sizes = arguments.micro_batch_size, arguments.batch_size
    print(f"{arguments}, {'cuda' if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads")
    print("| stage | pairs | chunks | s/pair | from | to | ratio | at first (GB) | peak (GB) | ratio |")
    print("| --- |" + " ---: |" * 9, flush=True)
    for stage in arguments.stage:
        runs = [[in_own_process(arguments, stage, size) for size in sizes] for _ in range(arguments.rounds)]
        plain, large = (merged(of_size) for of_size in zip(*runs, strict=True))
        for size, measured in zip(sizes, (plain, large), strict=True):
            times, middle = measured["seconds"], statistics.median(measured["seconds"])
            ratios = middle / statistics.median(plain["seconds"]), measured["peak"] / plain["peak"]
            print(
                f"| {stage} | {size} | {size // sizes[0]} | {middle:.4f} | {min(times):.4f} | {max(times):.4f} "
                f"| {ratios[0]:.3f} | {measured['at_first']:.2f} | {measured['peak']:.2f} | {ratios[1]:.3f} |",
                flush=True,
            )


def in_own_process(arguments: argparse.Namespace, stage: str, batch_size: int) -> dict:
    """Runs `measure` in a new process: the peak of a process never falls."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, argparse.Namespace(**vars(arguments) | {"batch_size": batch_size}), stage).result()


def measure(arguments: argparse.Namespace, name: str) -> dict:
    """Measures seconds per pair in every step, and GB of memory at first and at most."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    stage = make_stage(name, arguments.student).to(device).train()
    chunks = random_chunks(arguments, stage.student().config, device)
    optimizer = adamw(stage, StageArguments(learning_rate=1e-6))
    at_first, seconds = memory(device)[0], []
    take_step(stage, optimizer, chunks[:2])  # not counted, but for memory: it makes AdamW's state
    for _ in range(arguments.plain_steps if len(chunks) == 1 else 1):
        start = time.perf_counter()
        take_step(stage, optimizer, chunks)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / arguments.batch_size)
    return {"seconds": seconds, "at_first": at_first, "peak": memory(device)[1]}


def merged(runs: Iterable[dict]) -> dict:
    """Joins the times of all runs, and takes the largest memory of any."""
    runs = list(runs)
    largest = {name: max(run[name] for run in runs) for name in ("at_first", "peak")}
    return {"seconds": [seconds for run in runs for seconds in run["seconds"]], **largest}


def make_stage(name: str, student: str) -> Stage:
    """Makes a stage that trains a random student of a ViT-B/16."""
    config, settings = CLIPConfig(vision_config={"patch_size": 16}), {"logit_scale": 50.0, "learn_logit_scale": False}
    if name == "mapping":
        return MappingStage(start_mapper(CLIPModel(config), PRESETS[student]), **settings)
    trained = CLIPModel(student_config(config, PRESETS[student]))
    if name == "contrastive":
        return ContrastiveStage(trained, **settings)
    return DistillationStage(trained, teachers=[CLIPModel(config)], **settings)


def memory(device: torch.device) -> tuple[float, float]:
    """Reads the GB in use now, and at most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux: kB
    return psutil.Process().memory_info().rss / 1e9, peak / 1e9


if __name__ == "__main__":
    main()
