"""Checkpoints of a run: written whole or not at all, taken up by the same command, refused by another."""

import json
import logging
import shutil
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipmap_hf.files.atomic import atomic_folder, temporary_folder
from clipmap_hf.files.differences import differences


__all__ = ["Checkpoints", "Progress"]

logger = logging.getLogger(__name__)

_STATE = "progress.json"


@dataclass
class Progress:
    """
    How far a run is.

    Args:
        step: Optimizer steps taken, those skipped among them.
        pairs: Pairs trained on, of all processes.
        bad_rows: Rows left out, by reason.
        skipped: Steps skipped because the loss or its gradient was not finite.
        skipped_in_a_row: How many of them lie directly behind.
        seconds: Time of training, in seconds; evaluations and checkpoints left out.
        evaluation_due: Whether this step is evaluated, which comes after its checkpoint.
        best: The metrics of the best evaluation so far.
        stopped: How many steps the run had when a callback ended it before them.
        state: Of the callbacks (`Events.export`).
        log_bytes: Length of `metrics.jsonl`.
        time_used: Seconds since the run began, all of its parts together, for `max_time`.
    """

    step: int = 0
    pairs: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    evaluation_due: bool = False
    best: dict[str, float] | None = None
    stopped: int | None = None
    state: dict[str, Any] | None = None
    log_bytes: int = 0
    time_used: float = 0.0


class Checkpoints:
    """
    The checkpoints of a run, of which the last are kept.

    Args:
        folder: Where they lie.
        accelerator: Knows what is trained.
        config: All that decides the result; JSON values.
        may_change: Entries of `config` with which a run may be gone on with all the same, because the result stays
            well-defined. It is then that of neither run alone, which is logged.
        kept: How many.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        config: dict[str, Any],
        may_change: Collection[str] = (),
        kept: int = 2,
    ):
        self.folder, self.accelerator, self.config, self.may_change = folder, accelerator, config, may_change
        self.kept = kept
        accelerator.register_save_state_pre_hook(_save_unwrapped)
        accelerator.register_load_state_pre_hook(_load_unwrapped)

    def save(self, progress: Progress) -> None:
        """Writes the state of all processes, on return safely on disk; then removes older checkpoints."""
        accelerator, path = self.accelerator, self.folder / f"step-{progress.step:08d}"
        is_main = accelerator.is_main_process
        with atomic_folder(path) if is_main else nullcontext(temporary_folder(path)) as folder:
            accelerator.wait_for_everyone()
            accelerator.save_state(str(folder))
            accelerator.wait_for_everyone()
            if is_main:
                files = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
                state = {"progress": asdict(progress), "config": self.config, "files": files}
                (folder / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if is_main:
            older = [other for other in self._paths() if other < path]  # later ones must be damaged
            for old in {*self._paths()} - {path, *older[len(older) - self.kept + 1 :]}:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def clear(self) -> None:
        """Removes all there are, which would otherwise outlive those of a run that starts anew."""
        if self.accelerator.is_main_process and self.folder.exists():
            shutil.rmtree(self.folder)
        self.accelerator.wait_for_everyone()

    def resume(self) -> Progress | None:
        """
        Loads the last good checkpoint and returns how far it is; `None` if there is none.

        Raises:
            ValueError: If it was made by a run with another configuration, which is named; if all are damaged; or if
                the processes do not see the same.
        """
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover)  # of a process that was killed while it wrote
        states = {path: _read_state(path) for path in reversed(self._paths())}
        good = [path for path, state in states.items() if state is not None]
        steps = gather_object([good[0].name if good else None])
        if len(set(steps)) > 1:
            raise ValueError(
                f"The processes see different checkpoints, {steps}; they must share the folder {self.folder}."
            )
        if states and not good:
            raise ValueError(
                f"All checkpoints in {self.folder} are damaged: {[path.name for path in states]}. Restore one, or "
                "start anew with resume=never."
            )
        if not good:
            return None
        for path in list(states)[: list(states).index(good[0])]:
            logger.warning("Checkpoint %s is damaged; the one before it is used.", path)
        self._check_config(good[0], states[good[0]]["config"])
        self.accelerator.load_state(str(good[0]))
        return Progress(**states[good[0]]["progress"])

    def _check_config(self, path: Path, config: dict[str, Any]) -> None:
        found = differences(config, self.config)
        changed = {name: f"{name} was {old}, is {new}" for name, (old, new) in found.items()}
        refused = [change for name, change in changed.items() if name not in self.may_change]
        if refused:
            raise ValueError(
                f"{path} belongs to a run with another configuration: {'; '.join(refused)}. Take that again, name "
                "another output_dir, or start anew with resume=never."
            )
        if changed and self.accelerator.is_main_process:
            logger.warning(
                "%s is gone on with: %s. The result is bit for bit that of neither run.",
                path,
                "; ".join(changed.values()),
            )

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _save_unwrapped(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
    """Saves models without the prefix that DDP gives their weights, so that any number of processes can load them."""
    for model, state in zip(models, weights, strict=False):  # backends that cut models save them by themselves
        if isinstance(model, DistributedDataParallel):
            nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")


def _load_unwrapped(models: list[nn.Module], folder: str) -> None:
    models[:] = [model.module if isinstance(model, DistributedDataParallel) else model for model in models]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _read_state(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, `None` if files of it are missing or cut off."""
    if not (path / _STATE).is_file():
        return None
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    files = {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}
    return state if state["files"].items() <= files.items() else None
