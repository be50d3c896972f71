"""What a recipe can be told: flat dataclasses, read from `--config file.yaml` and the command line (which wins)."""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


__all__ = [
    "DataArguments",
    "DistillationArguments",
    "MappingArguments",
    "RunArguments",
    "StageArguments",
    "StudentArguments",
    "TeacherArguments",
    "parse_arguments",
    "save_arguments",
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

    def __post_init__(self):
        _check_ranges(self, at_least_0=("seed", "num_workers"), above_0=("log_every", "eval_every"))


@dataclass
class DataArguments:
    """Where the image–text pairs come from and how they are read."""

    train_data: str = field(
        metadata={"help": "Hub id, image folder, or path or glob of parquet files or webdataset tars."}
    )
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
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be two ascending shares of the area, such as 0.9 1.0."
            )


@dataclass
class TeacherArguments:
    """The model to compress."""

    teacher: str = field(metadata={"help": "Hub id or folder of a CLIPModel."})
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub teacher."})


@dataclass
class StudentArguments:
    """The size of the student and how its operators start; the words of `ClipMapConfig`."""

    student: str | None = field(default=None, metadata={"help": "A preset: base, small or tiny."})
    vision_hidden_size: int | None = field(default=None, metadata={"help": "Width of the vision tower."})
    vision_intermediate_size: int | None = field(default=None, metadata={"help": "FFN width of the vision tower."})
    vision_num_hidden_layers: int | None = field(default=None, metadata={"help": "Depth of the vision tower."})
    vision_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the vision tower."})
    text_hidden_size: int | None = field(default=None, metadata={"help": "Width of the text tower."})
    text_intermediate_size: int | None = field(default=None, metadata={"help": "FFN width of the text tower."})
    text_num_hidden_layers: int | None = field(default=None, metadata={"help": "Depth of the text tower."})
    text_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the text tower."})
    projection_dim: int | None = field(default=None, metadata={"help": "Joint embedding; the teacher's by default."})
    initializer: str | None = field(default=None, metadata={"help": "Start of the operators (default: diagonal)."})
    depth: str | None = field(
        default=None, metadata={"help": "Teacher layers to start from (default: interval_front)."}
    )
    depth_per: str | None = field(default=None, metadata={"help": "One depth matrix per `tower` (default) or `kind`."})
    tie_ffn: bool | None = field(default=None, metadata={"help": "Tie fc2's input operator to fc1's output operator."})
    decay_towards: str | None = field(
        default=None,
        metadata={"help": "Weight decay pulls operators to their `initial` value (default) or to `zero`."},
    )


@dataclass
class StageArguments:
    """The numbers of one training stage. Defaults: Tables 8 and 9 of the paper where they agree."""

    epochs: float = field(
        default=1.0, metadata={"help": "Passes over the training data; ignored when `steps` is set."}
    )
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=256, metadata={"help": "Pairs per optimizer step."})
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
        _check_ranges(self, above_0=("batch_size", "max_grad_norm", "logit_scale", "adam_epsilon"))
        if self.logit_scale > 100:
            raise ValueError(f"logit_scale={self.logit_scale} must not exceed 100, CLIP's bound.")


@dataclass
class MappingArguments(StageArguments):
    """The mapping stage (Table 8): only the operators are trained, on the contrastive loss."""

    learning_rate: float = field(default=8e-4, metadata={"help": "Peak learning rate."})


@dataclass
class DistillationArguments(StageArguments):
    """The retraining stage (Table 9): all student weights are trained against the teacher."""

    distillation_weight: float = field(
        default=1.0, metadata={"help": "λ of Eq. 13: the share of the affinity loss; the rest is contrastive."}
    )


def _check_ranges(arguments: Any, at_least_0: tuple[str, ...] = (), above_0: tuple[str, ...] = ()) -> None:
    for name in (*at_least_0, *above_0):
        value = getattr(arguments, name)
        if value is not None and not (value >= 0 if name in at_least_0 else value > 0):
            raise ValueError(f"{name}={value} must be {'at least 0' if name in at_least_0 else 'above 0'}.")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of a recipe's examples as they are."""


def parse_arguments(
    *dataclass_types: type,
    stages: dict[str, type] | None = None,
    others: tuple[type, ...] = (),
    other_stages: dict[str, type] | None = None,
    description: str | None = None,
    argv: list[str] | None = None,
) -> tuple:
    """
    Reads dataclasses from the command line and from `--config file.yaml`; the command line wins.

    Args:
        dataclass_types: Flat dataclasses whose fields become `--options` and top-level YAML keys.
        stages: `{name: dataclass}` whose fields become `--{name}_{option}` and keys of the YAML section `name:`.
        others: Dataclasses of another recipe that reads the same YAML; their keys are known there, and left alone.
        other_stages: Sections of another recipe that reads the same YAML; their keys are checked, and left alone.
        description: Shown by `--help`.
        argv: Arguments instead of `sys.argv[1:]`.

    Returns:
        One instance per dataclass type, then one per stage.

    Raises:
        ValueError: If the YAML file has a key that no dataclass knows.
    """
    from transformers import HfArgumentParser  # seconds to import on a cold disk, and only needed here

    stages = stages or {}
    prefixed = [_with_prefix(name, stage) for name, stage in stages.items()]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, help="YAML file with values for these options; the command line wins")
    config, argv = finder.parse_known_args(sys.argv[1:] if argv is None else argv)
    if config.config is not None:
        known = {f.name for one in [*dataclass_types, *prefixed] for f in dataclasses.fields(one)}
        ignored = {f.name for one in others for f in dataclasses.fields(one)} - known
        argv = _yaml_options(config.config, known, ignored, {**stages, **(other_stages or {})}, stages) + argv
    parser = HfArgumentParser(
        [*dataclass_types, *prefixed],
        description=description,
        parents=[finder],
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    plain, staged = parsed[: len(dataclass_types)], parsed[len(dataclass_types) :]
    return *plain, *(
        stage(**{f.name: getattr(values, f"{name}_{f.name}") for f in dataclasses.fields(stage)})
        for (name, stage), values in zip(stages.items(), staged, strict=False)  # a namespace with `config` comes last
    )


def save_arguments(path: Path, *arguments: Any, **stages: Any) -> None:
    """Writes resolved arguments as YAML that `--config` reads back; `stages` become sections under their names."""
    plain = {key: value for one in arguments for key, value in dataclasses.asdict(one).items()}
    content = {key: value for key, value in plain.items() if value != []}  # an option takes at least one value
    content |= {name: dataclasses.asdict(one) for name, one in stages.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _yaml_options(
    path: Path, known: set[str], ignored: set[str], sections: dict[str, type], own: dict[str, type]
) -> list[str]:
    """The file's values as command-line options, so that both are converted and checked by one parser."""
    content = yaml.safe_load(path.read_text()) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    options = []
    for key, value in content.items():
        if key in sections:
            if not isinstance(value or {}, dict):
                raise ValueError(f"{path}: section {key!r} must hold `key: value` lines, got {value!r}.")
            allowed = {f.name for f in dataclasses.fields(sections[key])}
            _check_known(path, value or {}, allowed, f" in section {key!r}")
            if key in own:
                for name, inner in (value or {}).items():
                    options += _option(f"{key}_{name}", inner)
        elif key not in ignored:
            _check_known(path, {key}, known | set(sections), "")
            options += _option(key, value)
    return options


def _check_known(path: Path, keys: Any, allowed: set[str], where: str) -> None:
    unknown = sorted(set(map(str, keys)) - allowed)
    if unknown:
        raise ValueError(f"{path}: unknown keys {unknown}{where}; allowed are {sorted(allowed)}.")


def _option(name: str, value: Any) -> list[str]:
    if value is None or value == []:
        return []
    if isinstance(value, dict):
        raise ValueError(f"The option {name!r} takes a value or a list, got the mapping {value!r}.")
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _with_prefix(name: str, stage: type) -> type:
    """A copy of the dataclass `stage` (whose fields are scalars) with every field renamed `{name}_{field}`."""
    fields = [
        (f"{name}_{f.name}", f.type, field(default=f.default, metadata=f.metadata)) for f in dataclasses.fields(stage)
    ]
    return dataclasses.make_dataclass(f"{name.title()}{stage.__name__}", fields, namespace={"__module__": __name__})
