"""Measures several model folders in one run: recall, parameters, MACs, file sizes, times and memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from clipmap_hf.costs.cost import Cost, model_cost
from clipmap_hf.costs.latency import milliseconds_by_turns, random_inputs
from clipmap_hf.costs.memory import PeakMemory, peak_memory
from clipmap_hf.costs.runtimes import RUNTIMES
from clipmap_hf.evaluation.retrieval import evaluate_towers
from clipmap_hf.models.loading import load_config


__all__ = ["BATCH_SIZES", "TOWERS", "Contender", "Measured", "contenders", "measure"]

BATCH_SIZES = (1, 8, 32)
TOWERS = ("vision", "text")


@dataclass(frozen=True)
class Contender:
    """
    A row of the comparison: a model and what runs it.

    Args:
        folder: Folder of the model.
        runtime: Name of the runtime, a key of `RUNTIMES`.
    """

    folder: Path
    runtime: str


@dataclass(frozen=True)
class Measured:
    """
    The measurements of a contender.

    Args:
        recall: Result of `evaluate_retrieval`.
        cost: Parameters and MACs, computed from the config.
        file_bytes: Size of the files that hold the weights.
        milliseconds: Times of a batch, by tower and batch size, with a value for each round:
            `{("vision", 1): […], …}`.
        memory: Memory of a process that loads the model and runs one batch of the largest size.
    """

    recall: Mapping[str, float]
    cost: Cost
    file_bytes: int
    milliseconds: Mapping[tuple[str, int], Sequence[float]]
    memory: PeakMemory

    def pair_milliseconds(self, batch_size: int) -> list[float]:
        """Returns the time of a batch of images plus that of a batch of texts, for each round."""
        return [sum(both) for both in zip(*(self.milliseconds[tower, batch_size] for tower in TOWERS), strict=True)]


def contenders(models: Sequence[str], runtimes: Sequence[str] = ("transformers",)) -> dict[str, Contender]:
    """
    Combines each model with each runtime that finds weight files in the model's folder.

    Args:
        models: Folders or Hub ids. From the Hub, only the files that transformers loads are downloaded.
        runtimes: Keys of `RUNTIMES`.

    Returns:
        The contenders by name: the name of the model, and in brackets that of the runtime unless it is transformers.

    Raises:
        OSError: If a model is missing or the Hub cannot be reached.
        ValueError: If a runtime is unknown, if it finds files for none of the models, or if a model has files for none
            of the runtimes.
    """
    if unknown := sorted(set(runtimes) - set(RUNTIMES)):
        raise ValueError(f"Unknown runtimes {unknown}; allowed are {list(RUNTIMES)}.")
    folders = {name: _find_folder(model) for name, model in zip(_name_models(models), models, strict=True)}
    found = {}
    for name, folder in folders.items():
        usable = [runtime for runtime in runtimes if RUNTIMES[runtime].files(folder)]
        if not usable:
            looked_for = {runtime: RUNTIMES[runtime].patterns for runtime in runtimes}
            raise ValueError(f"{folder} holds no weights that can be run; looked for {looked_for}.")
        for runtime in usable:
            title = name if runtime == "transformers" else f"{name} ({runtime})"
            found[title] = Contender(folder, runtime)
    if unused := sorted(set(runtimes) - {contender.runtime for contender in found.values()}):
        patterns = {runtime: RUNTIMES[runtime].patterns for runtime in unused}
        raise ValueError(f"None of {list(models)} can be run by {unused}: there must be files like {patterns}.")
    return found


def measure(
    rows: Mapping[str, Contender],
    pairs: Callable[[Path], Iterable[Mapping]],
    rounds: int = 5,
    device: str = "cpu",
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, Measured]:
    """
    Measures all contenders. Times are measured in turns, see `milliseconds_by_turns`.

    Args:
        rows: The contenders by name, as `contenders` returns them.
        pairs: Function that returns the evaluation pairs for a model's folder, collated by the model's processor.
        rounds: Number of measurements of each time.
        device: Device that the models run on.
        batch_sizes: Batch sizes that are measured. Memory is measured at the largest.

    Returns:
        The measurements by name.
    """
    towers = {name: RUNTIMES[row.runtime].load(row.folder, device) for name, row in rows.items()}
    configs = {name: load_config(str(row.folder)) for name, row in rows.items()}
    recalls = {name: evaluate_towers(towers[name], pairs(row.folder)) for name, row in rows.items()}
    runs = {
        (name, tower, size): run
        for size in batch_sizes
        for name in rows
        for tower, run in towers[name].passes(random_inputs(configs[name], size)).items()
    }
    times = milliseconds_by_turns(runs, rounds)
    return {
        name: Measured(
            recall=recalls[name],
            cost=model_cost(configs[name]),
            file_bytes=sum(path.stat().st_size for path in RUNTIMES[row.runtime].files(row.folder)),
            milliseconds={(tower, size): times[name, tower, size] for tower in TOWERS for size in batch_sizes},
            memory=peak_memory(row.folder, row.runtime, max(batch_sizes), device),
        )
        for name, row in rows.items()
    }


def _name_models(models: Sequence[str]) -> list[str]:
    """Names folders by the last part of their path. If two names were equal, all models have their full path."""
    short = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    names = short if len(set(short)) == len(short) else list(models)
    if len(set(names)) < len(names):
        raise ValueError(f"A model is named twice in {names}; name each model once.")
    return names


def _find_folder(model: str) -> Path:
    load_config(model)  # raises a helpful error if the name is wrong
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"]))
