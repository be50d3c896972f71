"""The one Accelerate loop: step, log, checkpoint, evaluate, save. It knows stages only by their `forward(chunks)`."""

import logging
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, gather_object, send_to_device, tqdm

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.loader import BatchPlan, PairDataset, PairStream
from clipmap_hf.distributed import gather, join_processes
from clipmap_hf.training.arguments import RunArguments, StageArguments
from clipmap_hf.training.checkpoints import Checkpoints, Progress
from clipmap_hf.training.identity import run_identity, what_may_change
from clipmap_hf.training.optimization import learning_rate_at, step_count
from clipmap_hf.training.preemption import Preempted, watch_sigterm
from clipmap_hf.training.run_log import RunLog, check_tracker
from clipmap_hf.training.sharding import can_step, prepare_stage, update_whole
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.time_limit import TimeLimit


__all__ = ["TrainResult", "Trainer"]

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """
    What a finished stage reports.

    Args:
        steps: Optimizer steps taken.
        pairs: Pairs trained on, repetitions counted.
        seconds: Wall-clock time of training, evaluations and checkpoints left out.
        bad_rows: Rows left out, by reason.
        skipped: Steps skipped because the loss or its gradient was not finite.
        metrics: The last evaluation.
        teacher_metrics: The teacher's on the same pairs, if it was evaluated.
    """

    steps: int
    pairs: int
    seconds: float
    bad_rows: dict[str, int]
    skipped: int
    metrics: dict[str, float]
    teacher_metrics: dict[str, float] | None = None


class Trainer:
    """
    Trains a stage on pairs.

    Args:
        stage: What to train.
        arguments: The stage's numbers.
        run: Where and how to run.
        pairs: Training pairs.
        collator: Makes batches of them.
        evaluate: Called in every process with the current `CLIPModel`, returns metrics; `mean_recall` decides what is
            best.
        save: Called in the main process with a folder and the last metrics: `output_dir` for the last state,
            `output_dir/best` for the best evaluated state.
        max_bad_fraction: Share of bad rows above which training stops.
        name: Names the stage in logs.
        config: What else decides the result, as JSON values; a checkpoint of another `config` is refused.
        recipe: What was asked, as YAML, for `output_dir/arguments.yaml`.

    Raises:
        ValueError: If batch, steps and data do not fit each other.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        arguments: StageArguments,
        run: RunArguments,
        pairs: PairDataset | PairStream,
        collator: PairCollator,
        evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        save: Callable[[Path, dict[str, float]], None] | None = None,
        max_bad_fraction: float = 0.01,
        name: str = "train",
        config: dict[str, Any] | None = None,
        recipe: str | None = None,
    ):
        self.stage, self.arguments, self.run = stage, arguments, run
        self.pairs, self.collator = pairs, collator
        self.evaluate, self.save = evaluate, save
        self.max_bad_fraction, self.name, self.config = max_bad_fraction, name, config or {}
        self.recipe = recipe
        self.output_dir = Path(run.output_dir)
        check_tracker(run.log_with)
        self.steps = step_count(arguments, pairs)
        self.progress, self.metrics, self.time_share = Progress(), {}, 0.0

    def train(self) -> TrainResult:
        """
        Runs the steps that are left and returns what came out; writes `metrics.jsonl` as it goes.

        Raises:
            Preempted: After SIGTERM, when the step is finished and a checkpoint written.
            FloatingPointError: If more than `max_skipped` steps in a row had no finite gradient.
            ValueError: If too many rows are bad, or the checkpoints are those of a run with another configuration.
        """
        run = self.run
        self.accelerator = self._accelerator()
        plan = self._plan()
        stage, optimizer = self._prepare(plan)
        checkpoints, self.progress = self._resume(plan)
        progress = self.progress
        self.time = TimeLimit(run.max_time, progress.time_used)
        self.time_share = self.time.agreed_share(self.accelerator.device)
        self.log = RunLog(self.output_dir, self.accelerator.is_main_process)
        self.log.open(progress.log_bytes, self.recipe)
        due = not self._is_over()  # without which no batch is looked for
        chunks_of_steps = self.pairs.steps(plan, self.collator, progress.step) if due else iter(())
        bar = tqdm(initial=progress.step, total=self.steps, desc=self.name, unit="step", mininterval=1.0)
        stage.train()
        if self._evaluation_is_due() and progress.evaluated < progress.step:
            self._evaluate_and_save()
        with watch_sigterm() as terminated:
            while not self._is_over():
                start = time.perf_counter()
                values = self._step(stage, optimizer, self._received(next(chunks_of_steps)))
                progress.seconds += time.perf_counter() - start
                bar.update()
                self.time_share = self.time.agreed_share(self.accelerator.device)
                is_last = self._is_over()
                if progress.step % run.log_every == 0 or is_last:
                    bar.set_postfix(loss=f"{values['loss']:.3f}", pairs_s=f"{progress.pairs / progress.seconds:.0f}")
                    self._log(values)
                stop = self._any_process(terminated.is_set())
                if stop or progress.step % run.checkpoint_every == 0 or is_last:
                    progress.log_bytes, progress.time_used = self.log.length, self.time.used
                    checkpoints.save(progress)
                if stop:
                    logger.warning("Stopped by SIGTERM at step %d; resume=auto goes on from there.", progress.step)
                    raise Preempted
                if self._evaluation_is_due():
                    self._evaluate_and_save()
            self._evaluate_and_save()
            if self._any_process(terminated.is_set()):  # or a stage that follows would run on until it is killed
                raise Preempted
        bar.close()
        for tracker in self.accelerator.trackers:  # `end_training` would part the processes, and more may follow
            tracker.finish()
        return TrainResult(
            progress.step, progress.pairs, progress.seconds, progress.bad_rows, progress.skipped, self.metrics
        )

    def _accelerator(self) -> Accelerator:
        run = self.run
        join_processes()
        accelerator = Accelerator(
            mixed_precision=run.mixed_precision,
            log_with=run.log_with,
            project_dir=run.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if run.log_with:
            accelerator.init_trackers(self.name, config=asdict(self.arguments))
        return accelerator

    def _plan(self) -> BatchPlan:
        return BatchPlan(
            self.arguments.batch_size,
            self.arguments.micro_batch_size,
            self.run.seed,
            self.run.num_workers,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def _resume(self, plan: BatchPlan) -> tuple[Checkpoints, Progress]:
        run, accelerator = self.run, self.accelerator
        identity = {"stage": self.name, **self.config}
        identity |= run_identity(self.arguments, run, self.pairs, plan, accelerator)
        may_change = what_may_change(self.pairs, accelerator)
        checkpoints = Checkpoints(self.output_dir / "checkpoints", accelerator, identity, may_change)
        if run.resume == "never":
            checkpoints.clear()
        progress = checkpoints.resume() or Progress()
        if progress.step > self.steps:
            raise ValueError(f"{run.output_dir} holds {progress.step} steps; ask for no fewer, or set resume=never.")
        return checkpoints, progress

    def _prepare(self, plan: BatchPlan) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        if self.run.compile and self.arguments.micro_batch_size:
            raise ValueError(
                "compile and micro_batch_size do not go together: a chunk must be computed twice in the same way, and "
                "torch.compile may change the way in between. Leave one of them out."
            )
        if self.run.compile:
            self.stage.compile_encoder()
        self.trained, *wrapped = prepare_stage(self.stage, self.accelerator, self.arguments, plan.local_size)
        return wrapped

    def _received(self, chunks: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Counts the rows of all processes. Returns this process's chunks, or none if any process has too few."""
        progress, device = self.progress, self.accelerator.device
        bad = sum((Counter(chunk.pop("bad_rows")) for chunk in chunks), Counter())
        chunks = [chunk for chunk in chunks if chunk]
        good = sum(len(chunk["input_ids"]) for chunk in chunks)
        counts = gather(torch.tensor([[good, bad.total(), len(chunks)]], device=device))  # (processes, 3)
        good_rows, bad_rows, _ = counts.sum(dim=0).tolist()
        progress.pairs += good_rows
        if bad_rows:
            progress.bad_rows = dict(sum(gather_object([bad]), Counter(progress.bad_rows)))
        total = sum(progress.bad_rows.values())
        if total > self.max_bad_fraction * max(total + progress.pairs, 1000):  # a single bad row early is no verdict
            raise ValueError(
                f"{total} of {total + progress.pairs} rows could not be used, more than max_bad_fraction="
                f"{self.max_bad_fraction}: {progress.bad_rows}; the log names them. Mend the data, or raise the limit."
            )
        return send_to_device(chunks, device, non_blocking=True) if can_step(counts[:, 2], self.accelerator) else []

    def _step(self, stage: torch.nn.Module, optimizer: torch.optim.Optimizer, chunks: list) -> dict[str, float]:
        args, accelerator, progress = self.arguments, self.accelerator, self.progress
        # What is random in a step depends on nothing before it, so a checkpoint holds no generator.
        torch.manual_seed(zlib.crc32(f"{self.run.seed}-{progress.step}-{accelerator.process_index}".encode()))
        position = max(progress.step, self.time_share * self.steps)  # as if the steps were over when the time is
        rate = learning_rate_at(position, self.steps, args.learning_rate, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group.get("fixed_rate", rate)
        values = {"loss": math.nan, "grad_norm": math.nan, "learning_rate": rate}
        if chunks:
            output = stage(chunks)
            accelerator.backward(output["loss"])
            norm = accelerator.clip_grad_norm_(stage.parameters(), args.max_grad_norm)
            values |= {name: value.item() for name, value in output.items()} | {"grad_norm": float(norm)}
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if finite or (chunks and accelerator.scaler is not None):  # which skips by itself, and learns from it
            optimizer.step()
        optimizer.zero_grad()
        self.trained.after_step()
        progress.step += 1
        self._count_skipped(finite, values)
        return values

    def _count_skipped(self, finite: bool, values: dict[str, float]) -> None:
        progress = self.progress
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        if not finite:
            logger.warning("Step %d skipped: %s; rows left out so far: %s.", progress.step, values, progress.bad_rows)
        skips = self.accelerator.distributed_type != DistributedType.DEEPSPEED  # which takes every step by itself
        allowed = self.run.max_skipped if skips else 0
        if progress.skipped_in_a_row > allowed:
            raise FloatingPointError(
                f"{progress.skipped_in_a_row} steps in a row up to {progress.step} had no finite loss and gradient, "
                f"or no usable rows ({progress.bad_rows}): more than max_skipped={allowed}. The last checkpoint is "
                "from before. Start anew in another output_dir with a lower learning rate, in fp32, or other data."
            )

    def _any_process(self, flag: bool) -> bool:
        return bool(gather(torch.tensor([flag], device=self.accelerator.device, dtype=torch.uint8)).any())

    def _evaluation_is_due(self) -> bool:
        every, step = self.run.eval_every, self.progress.step
        return every is not None and step > 0 and not self._is_over() and step % every == 0

    def _is_over(self) -> bool:
        return self.progress.step >= self.steps or self.time_share >= 1

    def _evaluate_and_save(self) -> None:
        progress, is_main = self.progress, self.accelerator.is_main_process
        update_whole(self.stage, self.trained)
        if self.evaluate is not None:
            self.metrics = self.evaluate(self.stage.student())
            self._log({f"eval_{name}": value for name, value in self.metrics.items()})
        progress.evaluated = progress.step
        best = self.metrics.get("mean_recall", -math.inf)
        improved = self.run.eval_every is not None and best > (-math.inf if progress.best is None else progress.best)
        if improved:
            progress.best = best
        if self.save is not None and is_main:
            self.save(self.output_dir, self.metrics)
            if improved:
                self.save(self.output_dir / "best", self.metrics)
        self.accelerator.wait_for_everyone()

    def _log(self, values: dict[str, float]) -> None:
        progress = self.progress
        line = {"stage": self.name, "step": progress.step, "pairs": progress.pairs}
        line |= {"bad_rows": progress.bad_rows, "skipped": progress.skipped}
        self.log.write(line | {"seconds": round(progress.seconds, 3), **values})
        self.accelerator.log(values, step=progress.step)
