"""How much memory a model needs at most: loaded and run once in a process of its own."""

import re
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from clipmap_hf.costs.latency import random_inputs
from clipmap_hf.costs.runtimes import RUNTIMES
from clipmap_hf.models.loading import load_config


__all__ = ["PeakMemory", "peak_memory"]


@dataclass(frozen=True)
class PeakMemory:
    """
    Of a process that ran a model.

    Args:
        bytes: The most that was resident at a time; on a GPU, the most that torch had allocated there.
        libraries: Of them, what was so before the model was loaded.
    """

    bytes: int
    libraries: int


def peak_memory(folder: Path, runtime: str, batch_size: int, device: str = "cpu") -> PeakMemory:
    """
    Loads a model and takes one batch through each tower, in a process of its own.

    Args:
        folder: Of the model.
        runtime: One of `RUNTIMES`.
        batch_size: Images, and texts of full length.
        device: Where.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_run_once, folder, runtime, batch_size, device).result()


def _run_once(folder: Path, runtime: str, batch_size: int, device: str) -> PeakMemory:
    before = _high_water_mark(device)
    batch = random_inputs(load_config(str(folder)), batch_size)
    with torch.no_grad():
        for run in RUNTIMES[runtime].load(folder, device).passes(batch).values():
            run()
    return PeakMemory(_high_water_mark(device), before)


def _high_water_mark(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at what the process that started this one had resident
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
