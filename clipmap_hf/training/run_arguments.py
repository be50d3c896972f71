"""Where and how a run goes, as a flat dataclass that the command line reads too."""

from dataclasses import dataclass, field
from typing import Literal

from clipmap_hf.config.ranges import check_ranges
from clipmap_hf.config.times import seconds_of


__all__ = ["RunArguments"]


@dataclass
class RunArguments:
    """Where a run writes and how it runs. Names and meanings are those of transformers' `TrainingArguments`."""

    output_dir: str = field(
        metadata={"help": "Folder of the result; `metrics.jsonl` and `arguments.yaml` go there too."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order and augmentation."})
    bf16: bool = field(default=False, metadata={"help": "Autocast of forward passes to bfloat16."})
    fp16: bool = field(default=False, metadata={"help": "Autocast of forward passes to float16, with a loss scale."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None,
        metadata={"help": "The same in Accelerate's words; by default what `accelerate launch` says."},
    )
    torch_compile: bool = field(
        default=False,
        metadata={
            "aliases": "--compile",
            "help": "Use torch.compile: faster steps, after minutes of compiling at the start.",
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute the student's layers again in the backward pass: less memory, more time."},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"aliases": "--num_workers", "help": "Processes that decode and augment images."}
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images of a batch in evaluation."})
    logging_steps: int = field(
        default=10, metadata={"aliases": "--log_every", "help": "Steps between lines in `metrics.jsonl`."}
    )
    eval_strategy: Literal["no", "steps", "epoch"] = field(
        default="no",
        metadata={"help": "When to evaluate besides the end: every `eval_steps`, or after each pass over the data."},
    )
    eval_steps: int | None = field(
        default=None,
        metadata={
            "aliases": "--eval_every",
            "help": "Steps between evaluations on `eval_data`; by default only at the end.",
        },
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata={
            "help": "Write the best evaluated model to `output_dir`, not the last. The start is evaluated too. Runs "
            "that evaluate agreement alone, because nothing is paired, do so anyway."
        },
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "The metric of an evaluation that says which model is best; by default `mean_recall`, or "
            "`mean_agreement` where nothing is paired."
        },
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether that metric rises; by default unless its name ends in `loss`."}
    )
    save_strategy: Literal["no", "steps", "epoch"] = field(
        default="steps",
        metadata={"help": "When to write a checkpoint besides the end: every `save_steps`, or after each pass."},
    )
    save_steps: int = field(
        default=500, metadata={"aliases": "--checkpoint_every", "help": "Steps between checkpoints."}
    )
    save_total_limit: int = field(default=2, metadata={"help": "How many of the last checkpoints are kept."})
    resume: Literal["auto", "never"] = field(
        default="auto",
        metadata={"help": "Go on from the last checkpoint in `output_dir`, if there is one, or start anew."},
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            "aliases": "--log_with",
            "help": "Experiment trackers of transformers, such as tensorboard, trackio or wandb.",
        },
    )
    run_name: str | None = field(default=None, metadata={"help": "What trackers call the run."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Print the logs without a progress bar."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the result to the Hub at the end."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to; by default the name of `output_dir`."}
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    max_time: str | None = field(
        default=None,
        metadata={
            "help": "End a stage after this time, such as 2h or 90m. Its learning rate falls with the time then."
        },
    )
    max_skipped: int = field(
        default=10, metadata={"help": "Steps in a row that may be skipped because their gradient is not finite."}
    )

    def __post_init__(self):
        check_ranges(
            self,
            at_least_0=("seed", "dataloader_num_workers", "max_skipped"),
            above_0=("logging_steps", "eval_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
        )
        if self.max_time is not None:
            seconds_of(self.max_time)
        if self.report_to is None or isinstance(self.report_to, str):  # as transformers allows
            self.report_to = [self.report_to] if self.report_to else []
        asked = [name for name in ("bf16", "fp16") if getattr(self, name)]
        asked += [self.mixed_precision] if self.mixed_precision else []
        if len(set(asked)) > 1:
            raise ValueError(f"bf16, fp16 and mixed_precision contradict each other, {asked}; give one of them.")
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self, name) not in (allowed := ("no", "steps", "epoch")):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {list(allowed)}.")
        if self.load_best_model_at_end and self.evaluation == "no":
            raise ValueError("load_best_model_at_end needs evaluations: set eval_strategy to 'steps' or 'epoch'.")

    @property
    def evaluation(self) -> str:
        """The `eval_strategy`, which is `steps` where `eval_steps` are given."""
        return "steps" if self.eval_strategy == "no" and self.eval_steps else self.eval_strategy

    @property
    def precision(self) -> str | None:
        """What forward passes are cast to; `None` is for Accelerate to say."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else self.mixed_precision

    @property
    def deciding_metric(self) -> str:
        """The `metric_for_best_model`, which is `mean_recall` if none is named."""
        return self.metric_for_best_model or "mean_recall"

    @property
    def rises(self) -> bool:
        """Whether more of the deciding metric is better."""
        if self.greater_is_better is None:
            return not self.deciding_metric.endswith("loss")
        return self.greater_is_better
