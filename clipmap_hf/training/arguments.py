"""The numbers of a run and of each training stage, as flat dataclasses that the command line reads too."""

from dataclasses import dataclass, field
from typing import Literal

from clipmap_hf.config.ranges import check_ranges
from clipmap_hf.config.times import seconds_of


__all__ = [
    "DistillationArguments",
    "MappingArguments",
    "MaskingArguments",
    "RunArguments",
    "StageArguments",
]


@dataclass
class RunArguments:
    """Where a run writes and how it runs."""

    output_dir: str = field(
        metadata={"help": "Folder of the result; `metrics.jsonl` and `arguments.yaml` go there too."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order and augmentation."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Autocast of forward passes; by default what `accelerate launch` says."}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that decode and augment images."})
    log_every: int = field(default=10, metadata={"help": "Steps between lines in `metrics.jsonl`."})
    eval_every: int | None = field(
        default=None, metadata={"help": "Steps between evaluations on `eval_data`; by default only at the end."}
    )
    log_with: str | None = field(
        default=None, metadata={"help": "An experiment tracker of Accelerate, e.g. `tensorboard` or `wandb`."}
    )
    compile: bool = field(
        default=False, metadata={"help": "Use torch.compile: faster steps, after minutes of compiling at the start."}
    )
    checkpoint_every: int = field(
        default=500, metadata={"help": "Steps between checkpoints, of which the last two are kept."}
    )
    resume: Literal["auto", "never"] = field(
        default="auto",
        metadata={"help": "Go on from the last checkpoint in `output_dir`, if there is one, or start anew."},
    )
    max_time: str | None = field(
        default=None,
        metadata={
            "help": "Ends a stage after this time, such as 2h or 90m, as if its steps were over: the learning "
            "rate falls in time."
        },
    )
    max_skipped: int = field(
        default=10, metadata={"help": "Steps in a row that may be skipped because their gradient is not finite."}
    )

    def __post_init__(self):
        check_ranges(
            self,
            at_least_0=("seed", "num_workers", "max_skipped"),
            above_0=("log_every", "eval_every", "checkpoint_every"),
        )
        if self.max_time is not None:
            seconds_of(self.max_time)


@dataclass
class StageArguments:
    """The numbers of a training stage. Defaults: Tables 8 and 9 of the paper where they agree."""

    epochs: float = field(
        default=1.0, metadata={"help": "Passes over the training data; ignored when `steps` is set."}
    )
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=256, metadata={"help": "Pairs per optimizer step, of all processes together."})
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs to hold in memory at a time: same gradient, a third more time (gradient caching)."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.2, metadata={"help": "Decoupled decay of matrices."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Linear warm-up: steps, or a share of all if below 1."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Global gradient norm to clip at."})
    logit_scale: float = field(default=50.0, metadata={"help": "Reciprocal of the temperature, student and teacher."})
    learn_logit_scale: bool = field(default=False, metadata={"help": "Train the scale from there, clamped at 100."})

    def __post_init__(self):
        check_ranges(self, at_least_0=("epochs", "steps", "learning_rate", "weight_decay", "warmup_steps"))
        check_ranges(self, above_0=("batch_size", "micro_batch_size", "max_grad_norm", "logit_scale", "adam_epsilon"))
        if self.logit_scale > 100:
            raise ValueError(f"logit_scale={self.logit_scale} must not exceed 100, CLIP's bound.")


@dataclass
class MappingArguments(StageArguments):
    """The mapping stage (Table 8): only the operators are trained, by default on the contrastive loss."""

    learning_rate: float = field(default=8e-4, metadata={"help": "Peak learning rate."})
    losses: dict[str, float] = field(
        default_factory=lambda: {"contrastive": 1.0},
        metadata={"help": "Weights of the losses, `name=weight` …; all but contrastive and sigmoid ask the teacher."},
    )

    def __post_init__(self):
        super().__post_init__()
        _check_losses(self.losses)


@dataclass
class DistillationArguments(StageArguments):
    """The retraining stage (Table 9): all student weights are trained against the teacher."""

    losses: dict[str, float] = field(
        default_factory=lambda: {"affinity": 1.0},
        metadata={
            "help": "Weights of the losses, `name=weight` …: affinity (Eq. 11), contrastive, CLIP-KD's feature, "
            "interactive and relational, MoPE-CLIP's hidden, SigLIP's sigmoid."
        },
    )
    freeze: str | None = field(default=None, metadata={"help": "The tower to leave as it is: `vision` or `text`."})

    def __post_init__(self):
        super().__post_init__()
        _check_losses(self.losses)
        if self.freeze not in (None, "vision", "text"):
            raise ValueError(f"freeze={self.freeze!r} is no tower; it must be 'vision' or 'text'.")


@dataclass
class MaskingArguments(DistillationArguments):
    """The stage that learns masks (TinyCLIP's automatic inheritance): weights and masks are trained together."""

    ramp_steps: float = field(
        default=0.5, metadata={"help": "Until the budget is the student's: steps, or a share of all if below 1."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, at_least_0=("ramp_steps",))


def _check_losses(losses: dict[str, float]) -> None:
    from clipmap_hf.losses import check_losses  # imports torch, for which `--help` must not wait

    check_losses(losses)
