"""The one Accelerate loop: step, log, checkpoint, evaluate, save. It knows stages only by their `forward(chunks)`."""

import logging
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers.trainer_callback import CallbackHandler

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.loader import BatchPlan, PairDataset, PairStream
from clipmap_hf.distributed import gather, join_processes
from clipmap_hf.models.batch_norms import put_back
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.best import BestState
from clipmap_hf.training.callbacks import callback_arguments, callback_handler
from clipmap_hf.training.checkpoints import Checkpoints, Progress
from clipmap_hf.training.events import Events
from clipmap_hf.training.faults import check_student, check_trained, count_skipped, usable_chunks
from clipmap_hf.training.identity import run_identity, what_may_change
from clipmap_hf.training.optimization import learning_rate_at, step_count, warn_of_warmup
from clipmap_hf.training.preemption import Preempted, watch_sigterm
from clipmap_hf.training.result import TrainResult
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.run_log import RunLog
from clipmap_hf.training.sharding import check_options, prepare_stage, update_whole
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.time_limit import TimeLimit


__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """
    Trains a stage on pairs.

    Args:
        stage: What to train.
        arguments: The stage's numbers.
        run: Where and how to run.
        pairs: Training pairs.
        collator: Makes batches of them.
        evaluate: Called in every process with the current `CLIPModel`, and a function through which its batches go so
            that callbacks can follow; returns metrics, of which `metric_for_best_model` decides what is best.
        save: Called in the main process with a folder and the last metrics: `output_dir` for the last state,
            `output_dir/best` for the best evaluated state.
        max_bad_fraction: Share of bad rows above which training stops.
        name: Names the stage in logs.
        config: What else decides the result, as JSON values; a checkpoint of another `config` is refused.
        recipe: What was asked, as YAML, for `output_dir/arguments.yaml`.
        handler: Holds the callbacks; by default those of `callback_handler(run)`.

    Raises:
        ValueError: If batch, steps and data do not fit each other, or a tracker cannot be used.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        arguments: StageArguments,
        run: RunArguments,
        pairs: PairDataset | PairStream,
        collator: PairCollator,
        evaluate: Callable[[torch.nn.Module, Callable], dict[str, float]] | None = None,
        save: Callable[[Path, dict[str, float]], None] | None = None,
        max_bad_fraction: float = 0.01,
        name: str = "train",
        config: dict[str, Any] | None = None,
        recipe: str | None = None,
        handler: CallbackHandler | None = None,
    ):
        self.stage, self.arguments, self.run = stage, arguments, run
        self.pairs, self.collator = pairs, collator
        self.evaluate, self.save = evaluate, save
        self.max_bad_fraction, self.name, self.config = max_bad_fraction, name, config or {}
        self.recipe = recipe
        self.output_dir = Path(run.output_dir)
        self.handler = callback_handler(run) if handler is None else handler
        join_processes()
        self.steps = step_count(arguments, pairs)
        self.progress, self.metrics, self.time_share, self.evaluated = Progress(), {}, 0.0, None
        self.best = None

    def train(self) -> TrainResult:
        """
        Runs the steps that are left and returns what came out; writes `metrics.jsonl` as it goes.

        Raises:
            Preempted: After SIGTERM, when the step is finished and a checkpoint written.
            FloatingPointError: If more than `max_skipped` steps in a row, or all, had no finite gradient; if the
                student's weights are no longer finite.
            ValueError: If too many rows are bad, or the checkpoints are those of a run with another configuration.
        """
        self.accelerator = self._accelerator()
        if self.accelerator.is_main_process:
            warn_of_warmup(self.arguments, self.steps)
        plan = self._plan()
        stage, optimizer = self._prepare(plan)
        checkpoints, self.progress = self._resume(plan)
        progress = self.progress
        self.events = self._events(plan, optimizer)
        self.best = BestState(self.output_dir, self.run, self.accelerator)
        self.time = TimeLimit(self.run.max_time, progress.time_used)
        self.time_share = self.time.agreed_share(self.accelerator.device)
        self.log = RunLog(self.output_dir, self.accelerator.is_main_process)
        self.log.open(progress.log_bytes, self.recipe)
        stage.train()
        self.events.call("on_train_begin")
        with watch_sigterm() as terminated:
            if self.run.load_best_model_at_end and self.evaluate is not None and self.steps:
                self._consider_start(checkpoints)
            self._steps(stage, optimizer, plan, checkpoints, terminated)
            check_trained(progress)
            if self.evaluated != progress.step:
                self._evaluate_and_save()
            if self._any_process(terminated.is_set())[0]:  # or a stage that follows would run on until it is killed
                raise Preempted
        if best := self.best.restore(self.stage, progress):
            self.metrics = best
            if self.save is not None and self.accelerator.is_main_process:
                self.save(self.output_dir, self.metrics)
        self.events.call("on_train_end")
        return TrainResult(
            progress.step, progress.pairs, progress.seconds, progress.bad_rows, progress.skipped, self.metrics
        )

    def _steps(self, stage, optimizer, plan: BatchPlan, checkpoints: Checkpoints, terminated) -> None:
        """Takes the steps that are left."""
        progress, first = self.progress, self.progress.step
        due = not self._is_over()  # without which no batch is looked for
        chunks_of_steps = self.pairs.steps(plan, self.collator, progress.step) if due else iter(())
        if due and progress.evaluation_due:
            self._evaluate_on_the_way(checkpoints)
        while not self._is_over():
            self.events.begin_step(progress.step, progress.step == first)
            start = time.perf_counter()
            chunks = usable_chunks(next(chunks_of_steps), progress, self.accelerator, self.max_bad_fraction)
            values = self._step(stage, optimizer, chunks)
            progress.seconds += time.perf_counter() - start
            self.time_share = self.time.agreed_share(self.accelerator.device)
            self.events.end_step(progress.step, self._is_over())
            control = self.events.control
            flags = (terminated.is_set(), control.should_training_stop, control.should_save, control.should_evaluate)
            terminate, stop, save, evaluate = self._any_process(*flags)
            if stop and not self._is_over():
                progress.stopped = self.steps
            is_last = self._is_over()
            if control.should_log or is_last:
                self._log(values)
            if save or terminate or is_last:
                self._save_checkpoint(checkpoints, evaluation_due=evaluate)
            if terminate:
                logger.warning("Stopped by SIGTERM at step %d; resume=auto goes on from there.", progress.step)
                raise Preempted
            if evaluate and not is_last:
                self._evaluate_on_the_way(checkpoints)

    def _consider_start(self, checkpoints: Checkpoints) -> None:
        """Evaluates what is about to be trained, which may stay the best."""
        if not self.progress.step:
            self._evaluate_on_the_way(checkpoints)
        elif not self.best.exists:
            logger.warning("The start was not evaluated when it was there, so the best is one of the later states.")

    def _evaluate_on_the_way(self, checkpoints: Checkpoints) -> None:
        """Evaluates before the end, which a callback may bring about by that."""
        self._evaluate_and_save()
        if self._any_process(self.events.control.should_training_stop)[0]:
            self.progress.stopped = self.steps
            self._save_checkpoint(checkpoints)

    def _save_checkpoint(self, checkpoints: Checkpoints, evaluation_due: bool = False) -> None:
        progress = self.progress
        progress.log_bytes, progress.time_used = self.log.length, self.time.used
        progress.state, progress.evaluation_due = self.events.export(), evaluation_due
        checkpoints.save(progress)
        self.events.call("on_save")

    def _accelerator(self) -> Accelerator:
        return Accelerator(
            mixed_precision=self.run.precision,
            project_dir=self.run.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )

    def _plan(self) -> BatchPlan:
        processes = self.accelerator.num_processes
        return BatchPlan(
            *self.arguments.batch_sizes(processes),
            self.run.seed,
            self.run.dataloader_num_workers,
            self.accelerator.process_index,
            processes,
        )

    def _events(self, plan: BatchPlan, optimizer: torch.optim.Optimizer) -> Events:
        self.handler.model, self.handler.optimizer = self.stage.trained, optimizer
        arguments = callback_arguments(self.arguments, self.run, plan, self.accelerator.device)
        has_length = isinstance(self.pairs, PairDataset)
        steps_per_epoch = len(self.pairs) // plan.batch_size if has_length else self.steps
        return Events(self.handler, arguments, self.steps, steps_per_epoch, self.progress.state)

    def _resume(self, plan: BatchPlan) -> tuple[Checkpoints, Progress]:
        run, accelerator = self.run, self.accelerator
        identity = {"stage": self.name, **self.config}
        identity |= run_identity(self.arguments, run, self.pairs, plan, accelerator)
        may_change = what_may_change(self.pairs, accelerator)
        folder = self.output_dir / "checkpoints"
        checkpoints = Checkpoints(folder, accelerator, identity, may_change, run.save_total_limit)
        if run.resume == "never":
            checkpoints.clear()
        progress = checkpoints.resume() or Progress()
        if progress.step > self.steps:
            raise ValueError(f"{run.output_dir} holds {progress.step} steps; ask for no fewer, or set resume=never.")
        return checkpoints, progress

    def _prepare(self, plan: BatchPlan) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        check_options(self.stage, self.run, plan)
        if self.run.torch_compile:
            self.stage.compile_encoder()
        if self.run.gradient_checkpointing:
            model = self.stage.trained  # whose method has another name since transformers 5.24
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.trained, *wrapped = prepare_stage(self.stage, self.accelerator, self.arguments, plan.local_size)
        return wrapped

    def _step(self, stage: torch.nn.Module, optimizer: torch.optim.Optimizer, chunks: list) -> dict[str, float]:
        args, accelerator, progress = self.arguments, self.accelerator, self.progress
        # What is random in a step depends on nothing before it, so a checkpoint holds no generator.
        torch.manual_seed(zlib.crc32(f"{self.run.seed}-{progress.step}-{accelerator.process_index}".encode()))
        position = max(progress.step, self.time_share * self.steps)  # as if the steps were over when the time is
        rate = learning_rate_at(position, self.steps, args.learning_rate, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group.get("fixed_rate", rate)
        values = {"loss": math.nan, "grad_norm": math.nan, "learning_rate": rate}
        statistics = self.trained.statistics()
        before = [statistic.clone() for statistic in statistics]
        if chunks:
            output = stage(chunks)
            accelerator.backward(output["loss"])
            norm = accelerator.clip_grad_norm_(stage.parameters(), args.max_grad_norm)
            values |= {name: value.item() for name, value in output.items()} | {"grad_norm": float(norm)}
        self.events.call("on_pre_optimizer_step")
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if finite or (chunks and accelerator.scaler is not None):  # which skips by itself, and learns from it
            optimizer.step()
        if not finite:
            put_back(statistics, before)  # they may hold NaN for good otherwise
        self.events.call("on_optimizer_step")
        optimizer.zero_grad()
        self.trained.after_step()
        progress.step += 1
        count_skipped(finite, values, progress, accelerator, self.run.max_skipped)
        return values

    def _any_process(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process."""
        return gather(torch.tensor([flags], device=self.accelerator.device, dtype=torch.uint8)).any(dim=0).tolist()

    def _is_over(self) -> bool:
        progress = self.progress
        return progress.step >= self.steps or self.time_share >= 1 or progress.stopped == self.steps

    def _evaluate_and_save(self) -> None:
        progress, is_main = self.progress, self.accelerator.is_main_process
        update_whole(self.stage, self.trained)
        student = self.stage.student()
        check_student(student, progress.step)
        if self.evaluate is not None:
            self.metrics = self.evaluate(student, self.events.watched)
            metrics = {f"eval_{name}": value for name, value in self.metrics.items()}
            self._log(metrics)
            self.events.call("on_evaluate", metrics=metrics)
        self.evaluated, progress.evaluation_due = progress.step, False
        improved = self.best.note(self.metrics, progress, self.events.state)
        if improved:
            self.best.keep(self.stage, self.metrics, progress.step)
        if self.save is not None and is_main:
            self.save(self.output_dir, self.metrics)
            if improved and self.run.evaluation != "no":
                self.save(self.output_dir / "best", self.metrics)
        self.accelerator.wait_for_everyone()

    def _log(self, values: dict[str, float]) -> None:
        progress = self.progress
        line = {"stage": self.name, "step": progress.step, "pairs": progress.pairs}
        line |= {"bad_rows": progress.bad_rows, "skipped": progress.skipped}
        self.log.write(line | {"seconds": round(progress.seconds, 3), **values})
        self.events.log(values)
