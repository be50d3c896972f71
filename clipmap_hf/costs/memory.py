"""Measures the peak memory of a model, which is loaded and run once in a separate process."""

import re
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
    The peak memory of a process that ran a model.

    Args:
        bytes: Most bytes that were resident at any time. On a GPU, most bytes that torch had allocated there.
        libraries: Bytes that were resident before the model was loaded. They are part of `bytes`.
    """

    bytes: int
    libraries: int


def peak_memory(folder: Path, runtime: str, batch_size: int, device: str = "cpu") -> PeakMemory:
    """
    Loads a model and runs one batch through each tower, in a separate process.

    Args:
        folder: Folder of the model.
        runtime: Name of the runtime, a key of `RUNTIMES`.
        batch_size: Number of images, and of texts of full length.
        device: Device that the model runs on.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_run_once, folder, runtime, batch_size, device).result()


def _run_once(folder: Path, runtime: str, batch_size: int, device: str) -> PeakMemory:
    before = _peak_bytes(device)
    batch = random_inputs(load_config(str(folder)), batch_size)
    with torch.no_grad():
        for run in RUNTIMES[runtime].load(folder, device).passes(batch).values():
            run()
    return PeakMemory(_peak_bytes(device), before)


def _peak_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux: not `ru_maxrss`, which would include the peak of the parent process
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)[1])
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
