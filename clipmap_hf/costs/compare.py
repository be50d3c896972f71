"""Several model folders measured in one run: retrieval, parameters, MACs, files, times and memory of each."""

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
    A row of the comparison.

    Args:
        folder: Of the model.
        runtime: What runs it, one of `RUNTIMES`.
    """

    folder: Path
    runtime: str


@dataclass(frozen=True)
class Measured:
    """
    What was measured of one contender.

    Args:
        recall: Of `evaluate_retrieval`.
        cost: By the config: parameters and MACs.
        file_bytes: Of the files that hold the weights.
        milliseconds: Of a batch, of each round: `{("vision", 1): […], …}`, by tower and batch size.
        memory: Of a process that loads it and runs one batch of the largest size.
    """

    recall: Mapping[str, float]
    cost: Cost
    file_bytes: int
    milliseconds: Mapping[tuple[str, int], Sequence[float]]
    memory: PeakMemory

    def pair_milliseconds(self, batch_size: int) -> list[float]:
        """Of a batch of images and one of texts, of each round."""
        return [sum(both) for both in zip(*(self.milliseconds[tower, batch_size] for tower in TOWERS), strict=True)]


def contenders(models: Sequence[str], runtimes: Sequence[str] = ("transformers",)) -> dict[str, Contender]:
    """
    Each model by each runtime that finds its files there, by name: the folder's, and the runtime's if it is another
    than transformers.

    Args:
        models: Folders or Hub ids; of the Hub, only what transformers loads is downloaded.
        runtimes: Of `RUNTIMES`.

    Raises:
        OSError: If a model is missing or the Hub cannot be reached.
        ValueError: If a runtime is unknown or finds files in none of the models, or a model has none for any runtime.
    """
    if unknown := sorted(set(runtimes) - set(RUNTIMES)):
        raise ValueError(f"Unknown runtimes {unknown}; allowed are {list(RUNTIMES)}.")
    folders = {name: _folder(model) for name, model in zip(_names(models), models, strict=True)}
    found = {}
    for name, folder in folders.items():
        here = [runtime for runtime in runtimes if RUNTIMES[runtime].files(folder)]
        if not here:
            looked_for = {runtime: RUNTIMES[runtime].patterns for runtime in runtimes}
            raise ValueError(f"{folder} holds no weights that can be run; looked for {looked_for}.")
        for runtime in here:
            title = name if runtime == "transformers" else f"{name} ({runtime})"
            found[title] = Contender(folder, runtime)
    if idle := sorted(set(runtimes) - {one.runtime for one in found.values()}):
        patterns = {runtime: RUNTIMES[runtime].patterns for runtime in idle}
        raise ValueError(f"None of {list(models)} can be run by {idle}: there must be {patterns}.")
    return found


def measure(
    rows: Mapping[str, Contender],
    pairs: Callable[[Path], Iterable[Mapping]],
    rounds: int = 5,
    device: str = "cpu",
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, Measured]:
    """
    Measures all of them, by turns where it is time.

    Args:
        rows: As `contenders` gives them.
        pairs: From a folder to the evaluation pairs, collated by its processor.
        rounds: Measurements of each time.
        device: What the models run on.
        batch_sizes: Whose times are taken.
    """
    towers = {name: RUNTIMES[one.runtime].load(one.folder, device) for name, one in rows.items()}
    configs = {name: load_config(str(one.folder)) for name, one in rows.items()}
    recalls = {name: evaluate_towers(towers[name], pairs(one.folder)) for name, one in rows.items()}
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
            file_bytes=sum(path.stat().st_size for path in RUNTIMES[one.runtime].files(one.folder)),
            milliseconds={(tower, size): times[name, tower, size] for tower in TOWERS for size in batch_sizes},
            memory=peak_memory(one.folder, one.runtime, max(batch_sizes), device),
        )
        for name, one in rows.items()
    }


def _names(models: Sequence[str]) -> list[str]:
    """The last parts of their paths; where two have the same, all in full."""
    short = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    names = short if len(set(short)) == len(short) else list(models)
    if len(set(names)) < len(names):
        raise ValueError(f"A model is named twice in {names}; name each once.")
    return names


def _folder(model: str) -> Path:
    load_config(model)  # says what is wrong with a name
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"]))
