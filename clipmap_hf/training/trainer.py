"""The one Accelerate loop: step, log, evaluate, save. It knows stages only by their `forward(batch)`."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed, tqdm
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import PairDataset
from clipmap_hf.training.arguments import RunArguments, StageArguments
from clipmap_hf.training.stages import Stage


__all__ = ["TrainResult", "Trainer", "parameter_groups"]


@dataclass
class TrainResult:
    """
    What a finished stage reports.

    Args:
        steps: Optimizer steps taken.
        pairs: Pairs trained on, repetitions counted.
        seconds: Wall-clock time of training, evaluations left out.
        bad_rows: Rows left out as undecodable or without caption.
        metrics: The last evaluation.
    """

    steps: int
    pairs: int
    seconds: float
    bad_rows: int
    metrics: dict[str, float]


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """
    AdamW's groups of the trainable parameters: matrices decay; vectors, scalars, position embeddings and depth
    matrices (whose one-hot start is no neighborhood of zero) do not.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def decays(name: str, parameter: torch.nn.Parameter) -> bool:
        return parameter.ndim >= 2 and "position_embedding" not in name and "_depth" not in name

    return [
        {"params": [p for name, p in trainable if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not decays(name, p)], "weight_decay": 0.0},
    ]


class Trainer:
    """
    Trains a stage on pairs.

    Args:
        stage: What to train.
        arguments: The stage's numbers.
        run: Where and how to run.
        pairs: Training pairs.
        collator: Makes batches of them.
        evaluate: Called with the current `CLIPModel`, returns metrics; `mean_recall` decides what is best.
        save: Called with a folder and the last metrics: `output_dir` for the last state, `output_dir/best` for the
            best evaluated one.
        max_bad_fraction: Share of bad rows above which training stops.
        name: Names the stage in logs.
    """

    def __init__(
        self,
        stage: Stage,
        arguments: StageArguments,
        run: RunArguments,
        pairs: PairDataset,
        collator: PairCollator,
        evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        save: Callable[[Path, dict[str, float]], None] | None = None,
        max_bad_fraction: float = 0.01,
        name: str = "train",
    ):
        self.stage, self.arguments, self.run = stage, arguments, run
        self.pairs, self.collator = pairs, collator
        self.evaluate, self.save = evaluate, save
        self.max_bad_fraction, self.name = max_bad_fraction, name
        self.output_dir = Path(run.output_dir)
        self.steps_per_epoch = len(pairs) // arguments.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size={arguments.batch_size} is larger than the {len(pairs)} training pairs; lower it."
            )
        self.steps = arguments.steps if arguments.steps is not None else round(arguments.epochs * self.steps_per_epoch)
        if arguments.steps is None and arguments.epochs > 0 and self.steps == 0:
            raise ValueError(
                f"epochs={arguments.epochs} of {len(pairs)} pairs is less than one step; set steps instead."
            )

    def train(self) -> TrainResult:
        """Runs all steps and returns what came out; writes `metrics.jsonl` as it goes."""
        args, run = self.arguments, self.run
        set_seed(run.seed)
        accelerator = self._accelerator()
        loader = DataLoader(
            self.pairs,
            batch_size=args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=run.num_workers,
            collate_fn=self.collator,
        )
        optimizer, schedule = self._optimization()
        stage, optimizer, loader, schedule = accelerator.prepare(self.stage, optimizer, loader, schedule)
        state = _Progress(accelerator, self)
        stage.train()
        epoch = 0
        while state.step < self.steps:
            self.pairs.set_epoch(epoch)
            loader.set_epoch(epoch)
            for batch in loader:
                state.count_bad_rows(batch.pop("bad_rows"), len(batch["input_ids"]), self.max_bad_fraction)
                output = stage(batch)
                accelerator.backward(output["loss"])
                norm = accelerator.clip_grad_norm_(stage.parameters(), args.max_grad_norm)
                learning_rate = schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                self.stage.after_step()
                state.after_step(output, norm, learning_rate)
                if state.step == self.steps:
                    break
            epoch += 1
        result = state.finish()
        accelerator.end_training()
        return result

    def _accelerator(self) -> Accelerator:
        run = self.run
        accelerator = Accelerator(
            mixed_precision=run.mixed_precision,
            log_with=run.log_with,
            project_dir=run.output_dir,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=run.seed),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if accelerator.num_processes > 1:
            raise ValueError(
                f"{accelerator.num_processes} processes were started, but the contrastive batch does not span "
                "processes yet; start one."
            )
        if run.log_with:
            accelerator.init_trackers(self.name, config=asdict(self.arguments))
        return accelerator

    def _optimization(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        args = self.arguments
        optimizer = torch.optim.AdamW(
            parameter_groups(self.stage, args.weight_decay),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        warmup = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * self.steps
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(min(warmup, self.steps)), self.steps)
        return optimizer, schedule


class _Progress:
    """Counts, logs, evaluates and saves for one call of `Trainer.train`."""

    def __init__(self, accelerator: Accelerator, trainer: Trainer):
        self.accelerator, self.trainer = accelerator, trainer
        self.step = self.pairs = self.bad_rows = 0
        self.metrics: dict[str, float] = {}
        self.best = -math.inf
        self.log_file = trainer.output_dir / "metrics.jsonl"
        trainer.output_dir.mkdir(parents=True, exist_ok=True)
        self.log_file.write_text("")  # a run that starts again starts its log again
        self.bar = tqdm(total=trainer.steps, desc=trainer.name, unit="step", mininterval=1.0)
        self.started, self.paused = time.perf_counter(), 0.0

    def count_bad_rows(self, bad: int, good: int, max_fraction: float) -> None:
        self.bad_rows += bad
        self.pairs += good
        rows = self.bad_rows + self.pairs
        if self.bad_rows > max_fraction * max(rows, 1000):  # one bad row in the first batch is no verdict
            raise ValueError(
                f"{self.bad_rows} of {rows} rows could not be used, more than max_bad_fraction={max_fraction}; the "
                "log names the reasons. Mend the data, or raise the limit."
            )

    def after_step(self, output: dict[str, torch.Tensor], norm: torch.Tensor, learning_rate: float) -> None:
        self.step += 1
        run = self.trainer.run
        self.bar.update()
        if self.step % run.log_every == 0 or self.step == self.trainer.steps:
            values = {name: value.item() for name, value in output.items()}
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"The loss is {values['loss']} at step {self.step}. Lower the learning rate, or use fp32."
                )
            self.bar.set_postfix(loss=f"{values['loss']:.3f}", pairs_s=f"{self.pairs / self.seconds():.0f}")
            self._log({**values, "grad_norm": float(norm), "learning_rate": learning_rate})
        due = run.eval_every is not None and self.step % run.eval_every == 0
        if due and self.step != self.trainer.steps:
            self._evaluate_and_save()

    def finish(self) -> TrainResult:
        seconds = self.seconds()
        self._evaluate_and_save()
        self.bar.close()
        return TrainResult(self.step, self.pairs, seconds, self.bad_rows, self.metrics)

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused

    def _evaluate_and_save(self) -> None:
        start, trainer = time.perf_counter(), self.trainer
        if trainer.evaluate is not None:
            self.metrics = trainer.evaluate(trainer.stage.student())
            self._log({f"eval_{name}": value for name, value in self.metrics.items()})
        if trainer.save is not None:
            trainer.save(trainer.output_dir, self.metrics)
            if self.metrics and self.metrics["mean_recall"] > self.best and trainer.run.eval_every is not None:
                self.best = self.metrics["mean_recall"]
                trainer.save(trainer.output_dir / "best", self.metrics)
        self.paused += time.perf_counter() - start

    def _log(self, values: dict[str, float]) -> None:
        line = {"stage": self.trainer.name, "step": self.step, "pairs": self.pairs, "bad_rows": self.bad_rows}
        line |= {"seconds": round(self.seconds(), 3), **values}
        with self.log_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log(values, step=self.step)
