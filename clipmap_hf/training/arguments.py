"""The numbers of each training stage, as flat dataclasses that the command line reads too."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

from clipmap_hf.config.ranges import check_ranges


__all__ = [
    "DistillationStageArguments",
    "MappingStageArguments",
    "MaskingStageArguments",
    "StageArguments",
]


_UNPAIRED_LOSSES = {"feature": 2000.0}  # where texts do not belong to their images
_LISTED_LOSSES = {"labels": 1.0, "feature": 2000.0}


@dataclass
class StageArguments:
    """The numbers of a training stage. Defaults: Tables 8 and 9 of the paper where they agree."""

    num_train_epochs: float = field(
        default=1.0,
        metadata={"aliases": "--epochs", "help": "Passes over the training data; ignored when `max_steps` is set."},
    )
    max_steps: int = field(
        default=-1, metadata={"aliases": "--steps", "help": "Optimizer steps; below 0, the epochs decide."}
    )
    batch_size: int = field(default=256, metadata={"help": "Pairs per optimizer step, of all processes together."})
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs to hold in memory at a time: same gradient, a third more time (gradient caching)."},
    )
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs that a process holds in memory at a time. With it, `batch_size` is this number times "
            "`gradient_accumulation_steps` times the processes, and `micro_batch_size` follows."
        },
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={"help": "Chunks of `per_device_train_batch_size` in a step; the loss spans them all."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.2, metadata={"help": "Weight decay of matrices, as AdamW applies it."})
    warmup_steps: float = field(
        default=0.1,
        metadata={
            "help": "Steps of linear warm-up, or a share of all steps if below 1. If they do not fit, a tenth of all."
        },
    )
    warmup_ratio: float | None = field(
        default=None,
        metadata={"help": "`warmup_steps` as a share of all, by the name that transformers 4 had for it."},
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Global gradient norm to clip at."})
    logit_scale: float = field(
        default=50.0,
        metadata={"help": "Factor of the similarities in the losses (1 / temperature), of student and teacher."},
    )
    learn_logit_scale: bool = field(
        default=False, metadata={"help": "Train the scale, from `logit_scale` on; it stays at most 100."}
    )

    def __post_init__(self):
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise ValueError(f"warmup_ratio={self.warmup_ratio} must be at least 0 and below 1.")
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, None
        check_ranges(self, at_least_0=("num_train_epochs", "learning_rate", "weight_decay", "warmup_steps"))
        check_ranges(self, above_0=("batch_size", "micro_batch_size", "max_grad_norm", "logit_scale", "adam_epsilon"))
        check_ranges(self, above_0=("per_device_train_batch_size", "gradient_accumulation_steps"))
        if self.per_device_train_batch_size is None and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "gradient_accumulation_steps counts chunks of per_device_train_batch_size; give that, or batch_size "
                "and micro_batch_size."
            )
        if self.per_device_train_batch_size and self.micro_batch_size:
            raise ValueError("Give per_device_train_batch_size or micro_batch_size, not both.")
        if self.logit_scale > 100:
            raise ValueError(f"logit_scale={self.logit_scale} must not exceed 100, CLIP's bound.")

    def for_texts(self, paired: bool, listed: bool = False) -> Self:
        """
        These numbers with the stage's default losses, if it has losses and none are named.

        Args:
            paired: Whether each text belongs to its image. If not, the default is the feature loss.
            listed: Whether the texts are a fixed list. Then the default is the labels loss beside that.
        """
        if getattr(self, "losses", ()) is not None:
            return self
        resolved = copy.copy(self)
        unmatched = _LISTED_LOSSES if listed else _UNPAIRED_LOSSES
        resolved.losses = dict(self.default_losses if paired and not listed else unmatched)
        return resolved

    @property
    def trains(self) -> bool:
        """Whether there are steps to train."""
        return bool(self.num_train_epochs if self.max_steps < 0 else self.max_steps)

    def batch_sizes(self, processes: int) -> tuple[int, int | None]:
        """
        The pairs of an optimizer step, and those that a process holds in memory at a time (`None`: all of its own).

        Args:
            processes: How many train together.
        """
        held, chunks = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if held is None:
            return self.batch_size, self.micro_batch_size
        return held * chunks * processes, held if chunks > 1 else None


@dataclass
class MappingStageArguments(StageArguments):
    """The mapping stage (Table 8): only the operators are trained, by default on the contrastive loss."""

    learning_rate: float = field(default=8e-4, metadata={"help": "Peak learning rate."})
    losses: dict[str, float | Callable] | None = field(
        default=None,
        metadata={
            "help": "Weights of the losses, `name=weight` …; all but contrastive and sigmoid ask the teacher. In "
            "Python, also a function of your own, as in distillation. By default contrastive=1; feature=2000 if "
            "texts do not belong to images."
        },
    )
    default_losses: ClassVar = {"contrastive": 1.0}

    def __post_init__(self):
        super().__post_init__()
        _check_losses(self.losses)


@dataclass
class DistillationStageArguments(StageArguments):
    """The retraining stage (Table 9): all student weights are trained against the teacher."""

    losses: dict[str, float | Callable] | None = field(
        default=None,
        metadata={
            "help": "Weights of the losses, `name=weight` …: affinity (Eq. 11), contrastive, CLIP-KD's feature, "
            "interactive and relational, MoPE-CLIP's hidden, SigLIP's sigmoid. In Python, also a name of yours with a "
            "function `(student, *teachers) -> tensor` of `ClipFeatures`. By default affinity=1; feature=2000 if "
            "texts do not belong to images."
        },
    )
    default_losses: ClassVar = {"affinity": 1.0}
    freeze: str | None = field(default=None, metadata={"help": "The tower to leave as it is: `vision` or `text`."})

    def __post_init__(self):
        super().__post_init__()
        _check_losses(self.losses)
        if self.freeze not in (None, "vision", "text"):
            raise ValueError(f"freeze={self.freeze!r} is no tower; it must be 'vision' or 'text'.")


@dataclass
class MaskingStageArguments(DistillationStageArguments):
    """The stage that learns masks (TinyCLIP's automatic inheritance): weights and masks are trained together."""

    ramp_steps: float = field(
        default=0.5,
        metadata={
            "help": "Steps in which the masks' budget falls to the student's size; a share of all steps if below 1."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, at_least_0=("ramp_steps",))


def _check_losses(losses: dict[str, float | Callable] | None) -> None:
    if losses is None:
        return
    from clipmap_hf.losses import check_losses  # imports torch, for which `--help` must not wait

    check_losses(losses)
