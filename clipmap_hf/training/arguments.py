"""What a recipe can be told: flat dataclasses, one for each thing that it is about."""

from dataclasses import dataclass, field
from typing import Any, Literal


__all__ = [
    "CalibrationArguments",
    "DataArguments",
    "DistillationArguments",
    "MappingArguments",
    "RunArguments",
    "StageArguments",
    "StudentArguments",
    "TeacherArguments",
    "TeacherCacheArguments",
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
    max_skipped: int = field(
        default=10, metadata={"help": "Steps in a row that may be skipped because their gradient is not finite."}
    )

    def __post_init__(self):
        _check_ranges(
            self,
            at_least_0=("seed", "num_workers", "max_skipped"),
            above_0=("log_every", "eval_every", "checkpoint_every"),
        )


@dataclass
class DataArguments:
    """Where the image–text pairs come from and how they are read."""

    train_data: str = field(
        metadata={"help": "Hub id, image folder, or path or glob of parquet files or webdataset tars."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read `train_data` shard by shard instead of making a local table of it."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows that a stream is shuffled among, per worker."})
    eval_data: str | None = field(default=None, metadata={"help": "Pairs to measure retrieval on; same forms."})
    train_split: str = field(default="train", metadata={"help": "Split of `train_data`."})
    eval_split: str = field(
        default="train", metadata={"help": "Split of `eval_data` (plain files have only `train`)."}
    )
    image_column: str = field(
        default="image", metadata={"help": "Column of the images (`jpg`, `png` … in webdatasets)."}
    )
    caption_column: list[str] = field(
        default_factory=lambda: ["caption"],
        metadata={"help": "Columns of the captions: strings, or lists of captions. The first column is evaluated."},
    )
    keyword_column: list[str] = field(
        default_factory=list, metadata={"help": "Columns of keyword lists; with random sampling, training joins some."}
    )
    caption_sampling: Literal["first", "random"] = field(
        default="first", metadata={"help": "Train on the first caption column, or on one of all columns."}
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0], metadata={"help": "Area range of the random resized crop."}
    )
    flip: float = field(default=0.0, metadata={"help": "Probability of a horizontal flip."})
    rotation: float = field(default=0.0, metadata={"help": "Largest random rotation, in degrees."})
    color_jitter: float = field(default=0.0, metadata={"help": "Largest change of brightness, contrast, saturation."})
    grayscale: float = field(default=0.0, metadata={"help": "Probability of dropping all color."})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Share of undecodable rows at which the run stops; fewer are skipped."}
    )
    image_backend: Literal["pil", "torchvision"] = field(
        default="pil", metadata={"help": "Backend of the image processor in evaluation."}
    )

    def __post_init__(self):
        _check_ranges(self, at_least_0=("flip", "rotation", "color_jitter", "grayscale", "max_bad_fraction"))
        _check_ranges(self, above_0=("shuffle_buffer",))
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be two ascending shares of the area, such as 0.9 1.0."
            )


@dataclass
class TeacherArguments:
    """The model to compress."""

    teacher: list[str] = field(
        metadata={"help": "Hub id or folder of a CLIPModel. Of several, the first is mapped, and all together teach."}
    )
    teacher_revision: list[str] = field(
        default_factory=list, metadata={"help": "Branch, tag or commit of each teacher on the Hub."}
    )

    def __post_init__(self):
        if self.teacher_revision and len(self.teacher_revision) != len(self.teacher):
            raise ValueError(
                f"{len(self.teacher)} teachers need as many revisions, or none; got {self.teacher_revision}."
            )

    @property
    def teachers(self) -> list[tuple[str, str | None]]:
        """Id and revision of each."""
        return list(zip(self.teacher, self.teacher_revision or [None] * len(self.teacher), strict=True))


@dataclass
class TeacherCacheArguments:
    """Where the teachers' embeddings are kept, so that they are computed once."""

    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the embeddings; made if it is not there. By default, none are kept."},
    )
    views: int | None = field(
        default=None,
        metadata={"help": "Views of each image and caption to keep (4); training goes through them in turn."},
    )

    def __post_init__(self):
        _check_ranges(self, above_0=("views",))
        if self.teacher_cache is None and self.views is not None:
            raise ValueError(f"views={self.views} is for a teacher_cache; name its folder, or leave views out.")
        if self.teacher_cache is not None and self.views is None:
            self.views = 4


@dataclass
class StudentArguments:
    """The size of the student and how its operators start; the words of `ClipMapConfig`."""

    student: str | dict[str, str] | None = field(
        default=None, metadata={"help": "A preset: base, small or tiny; or a budget, such as params=30M or macs=2G."}
    )
    vision_hidden_size: int | None = field(default=None, metadata={"help": "Width of the vision tower."})
    vision_intermediate_size: int | None = field(default=None, metadata={"help": "FFN width of the vision tower."})
    vision_num_hidden_layers: int | None = field(default=None, metadata={"help": "Depth of the vision tower."})
    vision_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the vision tower."})
    text_hidden_size: int | None = field(default=None, metadata={"help": "Width of the text tower."})
    text_intermediate_size: int | None = field(default=None, metadata={"help": "FFN width of the text tower."})
    text_num_hidden_layers: int | None = field(default=None, metadata={"help": "Depth of the text tower."})
    text_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the text tower."})
    projection_dim: int | None = field(default=None, metadata={"help": "Joint embedding; the teacher's by default."})
    initializer: str | None = field(
        default=None,
        metadata={
            "help": "Start of the operators: calibrated (default), importance; without data diagonal, random, "
            "kaiming, xavier; selections manual, magnitude, taylor, mope, random_selection."
        },
    )
    refit: bool | None = field(
        default=None, metadata={"help": "Whether `calibrated` solves the layers one after another (default: true)."}
    )
    refit_steps: int | None = field(
        default=None, metadata={"help": "Steps of gradient descent on each layer after it was solved (default: 200)."}
    )
    depth: str | None = field(
        default=None,
        metadata={"help": "Teacher layers to start from: interval_front (default), spread, similarity or score."},
    )
    depth_per: str | None = field(default=None, metadata={"help": "One depth matrix per `tower` (default) or `kind`."})
    tie_ffn: bool | None = field(default=None, metadata={"help": "Tie fc2's input operator to fc1's output operator."})
    decay_towards: str | None = field(
        default=None,
        metadata={"help": "Weight decay pulls operators to their `initial` value (default) or to `zero`."},
    )


@dataclass
class CalibrationArguments:
    """The pairs that `calibrated`, `importance`, `taylor` and `mope` start from."""

    calibration_data: str | None = field(
        default=None, metadata={"help": "Where they come from, with columns as `train_data`, which is the default."}
    )
    calibration_pairs: int = field(default=2048, metadata={"help": "How many there are, of all processes together."})

    def __post_init__(self):
        _check_ranges(self, above_0=("calibration_pairs",))


@dataclass
class StageArguments:
    """The numbers of one training stage. Defaults: Tables 8 and 9 of the paper where they agree."""

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
        _check_ranges(self, at_least_0=("epochs", "steps", "learning_rate", "weight_decay", "warmup_steps"))
        _check_ranges(self, above_0=("batch_size", "micro_batch_size", "max_grad_norm", "logit_scale", "adam_epsilon"))
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
        _check_ranges(self, at_least_0=("ramp_steps",))


def _check_losses(losses: dict[str, float]) -> None:
    from clipmap_hf.losses import check_losses  # imports torch, for which `--help` must not wait

    check_losses(losses)


def _check_ranges(arguments: Any, at_least_0: tuple[str, ...] = (), above_0: tuple[str, ...] = ()) -> None:
    for name in (*at_least_0, *above_0):
        value = getattr(arguments, name)
        if value is not None and not (value >= 0 if name in at_least_0 else value > 0):
            raise ValueError(f"{name}={value} must be {'at least 0' if name in at_least_0 else 'above 0'}.")
