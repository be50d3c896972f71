"""Says which evaluated state of a run is the best, keeps it, and puts it back at the end."""

import json
import logging
from pathlib import Path

from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from clipmap_hf.files.atomic import atomic_files
from clipmap_hf.training.checkpoints import Progress
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.base import Stage


__all__ = ["START_STAYS", "BestState"]

logger = logging.getLogger(__name__)

START_STAYS = (
    "No state of the training was better on held-out data than its start, so the weights are those of the start."
)
_NAME = "best.safetensors"


class BestState:
    """
    The best evaluated state of a run. It is kept beside the checkpoints if the run ends with it.

    Args:
        output_dir: The folder of the run.
        run: Says which metric decides, and whether the run ends with the best.
        accelerator: Says whether this is the main process, which writes.

    Attributes:
        is_start: Whether a run that has trained ended with its start, because no evaluated state was better.
    """

    def __init__(self, output_dir: Path, run: RunArguments, accelerator: Accelerator):
        self.file, self.run, self.accelerator = output_dir / "checkpoints" / _NAME, run, accelerator
        self.is_start = False

    @property
    def exists(self) -> bool:
        """Whether a state is kept."""
        return self.file.exists()

    def note(self, metrics: dict[str, float], progress: Progress, state: TrainerState) -> bool:
        """
        Notes an evaluation and returns whether it is the best so far. If a run neither has an `eval_strategy` nor ends
        with the best, none is.

        Args:
            metrics: What was measured; empty without evaluation data.
            progress: Takes the best metrics.
            state: Takes them in transformers' words.

        Raises:
            ValueError: If the metric that decides is not among them.
        """
        if not metrics or (self.run.evaluation == "no" and not self.run.load_best_model_at_end):
            return False
        name = self.run.deciding_metric.removeprefix("eval_")
        if name not in metrics:
            raise ValueError(f"metric_for_best_model={name!r} was not measured; there are {sorted(metrics)}.")
        if self.run.load_best_model_at_end and not self.exists:
            progress.best = None  # of a part of the run that kept no state
        value, before = metrics[name], (progress.best or {}).get(name)  # another may have decided before
        if before is not None and not (value > before if self.run.rises else value < before):
            return False
        progress.best = dict(metrics)
        state.best_metric, state.best_global_step = value, state.global_step
        state.best_model_checkpoint = str(self.file.parents[1] / "best")
        return True

    def keep(self, stage: Stage, metrics: dict[str, float], step: int) -> None:
        """Writes a state with its metrics and its step, if the run ends with the best."""
        if self.run.load_best_model_at_end and self.accelerator.is_main_process:
            weights = {name: value.detach().cpu().clone().contiguous() for name, value in stage.state_dict().items()}
            with atomic_files(self.file.parent) as temporary:
                save_file(weights, temporary / _NAME, {"metrics": json.dumps(metrics), "step": str(step)})

    def restore(self, stage: Stage, progress: Progress) -> dict[str, float] | None:
        """Puts the best state back, if the run ends with it, and returns its metrics; `None` if it does not."""
        if not self.run.load_best_model_at_end or progress.best is None:
            return None
        self.accelerator.wait_for_everyone()  # until it is written
        stage.load_state_dict(load_file(self.file))
        with safe_open(self.file, "pt") as file:
            kept = file.metadata()
        metrics = json.loads(kept["metrics"])
        self.is_start = progress.step > 0 and kept.get("step") == "0"
        if self.is_start and self.accelerator.is_main_process:
            name = self.run.deciding_metric.removeprefix("eval_")
            logger.warning("%s By %s, it has %.4f.", START_STAYS, name, metrics[name])
        return metrics
