"""What to make of a teacher: the student's size, how its operators start, and the `CLIPConfig` that follows."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PretrainedConfig

from clipmap_hf.budget import Budget


__all__ = ["PRESETS", "ClipMapConfig", "TowerConfig", "cut_towers", "embedding_width", "student_config"]


@dataclass(frozen=True)
class TowerConfig:
    """
    The size of one tower. What is left out follows from the teacher: width and depth stay, the FFN keeps its ratio to
    the width, and the head width is always kept (`CLIPConfig` can express nothing else).

    Args:
        hidden_size: Width.
        intermediate_size: FFN width.
        num_hidden_layers: Depth.
        num_attention_heads: Heads; if given, it must be `hidden_size` over the teacher's head width.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None

    def resolve(self, teacher: PretrainedConfig, name: str) -> "TowerConfig":
        """
        Fills in what was left out.

        Args:
            teacher: The config of the teacher's tower.
            name: `vision` or `text`, for errors.

        Raises:
            ValueError: If the tower cannot be cut from this teacher; the message says what can.
        """
        head_width = teacher.hidden_size // teacher.num_attention_heads
        width = self._checked(name, "hidden_size", teacher.hidden_size, teacher.hidden_size)
        if width % head_width:
            below, above = width // head_width * head_width, (width // head_width + 1) * head_width
            near = " or ".join(str(w) for w in (below, above) if 0 < w <= teacher.hidden_size)
            raise ValueError(
                f"{name}.hidden_size={width} is not a multiple of the teacher's head width {head_width}, which is "
                f"kept; pick {near}."
            )
        heads = width // head_width
        if self.num_attention_heads not in (None, heads):
            raise ValueError(
                f"{name}.num_attention_heads={self.num_attention_heads} does not fit {name}.hidden_size={width}: with "
                f"the teacher's head width {head_width} it must be {heads}."
            )
        default_ffn = width * teacher.intermediate_size // teacher.hidden_size
        return TowerConfig(
            width,
            self._checked(name, "intermediate_size", teacher.intermediate_size, default_ffn),
            self._checked(name, "num_hidden_layers", teacher.num_hidden_layers, teacher.num_hidden_layers),
            heads,
        )

    def _checked(self, name: str, attribute: str, largest: int, default: int) -> int:
        value = getattr(self, attribute)
        value = default if value is None else value
        if not isinstance(value, int) or not 1 <= value <= largest:
            raise ValueError(f"{name}.{attribute}={value!r} must be an integer from 1 to the teacher's {largest}.")
        return value


@dataclass(frozen=True)
class ClipMapConfig:
    """
    The student to make, and the mapping that makes it.

    Args:
        vision: Size of the vision tower.
        text: Size of the text tower. A tower that is left as large as the teacher's is kept as it is, bit for bit.
        projection_dim: Width of the joint embedding; the teacher's by default, so that the student's embeddings
            live in the teacher's space.
        budget: What the student may cost, a `Budget` or its values by name. Widths and depths that are not given are
            then searched (`choose_shape`) instead of taken from the teacher.
        initializer: How the width operators start: a key of `INITIALIZERS` (`diagonal` is Eq. 9), of
            `CALIBRATED_INITIALIZERS`, or of `SELECTIONS`; those in `NEED_PAIRS` need calibration data. By default
            `calibrated` with such data, `diagonal` without.
        refit: Whether `calibrated` solves the student's layers one after another (`refit`).
        refit_steps: Steps of gradient descent on each layer after it was solved, and as many on each tower: most of
            the time of a start.
        depth: Which teacher layers the depth operators start from: a key of `DEPTH_RULES`; `similarity`, with
            `calibrated` or `importance`, the layers that change the stream most; or `score`, with a selection, those
            that its criterion scores highest.
        depth_per: One depth matrix per `tower` (the paper) or per tensor `kind`.
        tie_ffn: Whether `fc2` reads through the transposed operator that `fc1` writes with. A.3 lists no such tie.
        decay_towards: What weight decay pulls an operator to. `initial` keeps the inheritance; `zero` is the literal
            AdamW on the operators, which at the paper's settings decays the inheritance itself away.
        seed: Of random initializers.
    """

    vision: TowerConfig = field(default_factory=TowerConfig)
    text: TowerConfig = field(default_factory=TowerConfig)
    projection_dim: int | None = None
    budget: Budget | Mapping[str, Any] | None = None
    initializer: str | None = None
    refit: bool = True
    refit_steps: int = 200
    depth: str = "interval_front"
    depth_per: Literal["tower", "kind"] = "tower"
    tie_ffn: bool = False
    decay_towards: Literal["initial", "zero"] = "initial"
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("depth_per", ("tower", "kind")), ("decay_towards", ("initial", "zero"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; allowed are {list(allowed)}.")
        for name in ("vision", "text"):
            if not isinstance(getattr(self, name), TowerConfig):
                raise TypeError(f"{name} must be a TowerConfig, got {type(getattr(self, name)).__name__}.")
        if isinstance(self.budget, Mapping):
            object.__setattr__(self, "budget", Budget.from_dict(self.budget))
        if not isinstance(self.budget, Budget | None):
            raise TypeError(f"budget must be a Budget or its values by name, got {type(self.budget).__name__}.")

    def to_dict(self) -> dict[str, Any]:
        """All values as plain JSON types; without the budget, if there is none."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "budget" or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ClipMapConfig":
        """
        The inverse of `to_dict`.

        Raises:
            ValueError: If a key is unknown.
        """
        values = dict(values)
        _check_keys(values, cls)
        for name in ("vision", "text"):
            if name in values:
                _check_keys(values[name], TowerConfig)
                values[name] = TowerConfig(**values[name])
        return cls(**values)


def _check_keys(values: dict[str, Any], cls: type) -> None:
    allowed = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - allowed):
        raise ValueError(f"Unknown keys {unknown} for {cls.__name__}; allowed are {sorted(allowed)}.")


def _preset(vision_width: int, vision_depth: int, text_width: int, text_depth: int) -> ClipMapConfig:
    return ClipMapConfig(
        vision=TowerConfig(hidden_size=vision_width, num_hidden_layers=vision_depth),
        text=TowerConfig(hidden_size=text_width, num_hidden_layers=text_depth),
    )


# The paper's three students of ViT-B/16 (Table 6; its rows for tiny and base are misprints, see Table 12).
PRESETS = {
    "base": _preset(512, 12, 512, 6),
    "small": _preset(256, 10, 256, 3),
    "tiny": _preset(128, 4, 128, 2),
}


def student_config(teacher: PretrainedConfig, config: ClipMapConfig) -> PretrainedConfig:
    """
    The student's config: a copy of the teacher's with other sizes; everything else (activation, token ids, image
    size, epsilon) is kept.

    Args:
        teacher: The teacher's config.
        config: The sizes.

    Raises:
        ValueError: If the sizes do not fit the teacher, or are still to be searched.
    """
    if config.budget is not None:
        raise ValueError(
            f"The sizes within the budget {config.budget} are still to be chosen: clipmap_hf.shapes.choose_shape does "
            "it, and ClipMapCompressor.from_pretrained calls that."
        )
    student = copy.deepcopy(teacher)
    largest = embedding_width(teacher)
    projection_dim = largest if config.projection_dim is None else config.projection_dim
    if not isinstance(projection_dim, int) or not 1 <= projection_dim <= largest:
        raise ValueError(f"projection_dim={projection_dim!r} must be an integer from 1 to the teacher's {largest}.")
    has_projections = hasattr(teacher, "projection_dim")
    for name in ("vision", "text"):
        tower = getattr(student, f"{name}_config")
        size = getattr(config, name).resolve(tower, name)
        for attribute, value in dataclasses.asdict(size).items():
            setattr(tower, attribute, value)
        if has_projections:
            tower.projection_dim = projection_dim  # the single-tower classes read it from here
        tower.validate()
    if has_projections:
        student.projection_dim = projection_dim
    else:
        student.text_config.projection_size = embedding_width(student)
        if config.projection_dim not in (None, embedding_width(student)):
            raise ValueError(
                f"projection_dim={projection_dim}, but in a model of type {teacher.model_type!r} images have no "
                f"projection: their embedding is as wide as the vision tower, {embedding_width(student)}. Leave "
                "projection_dim out."
            )
    return student


def embedding_width(config: PretrainedConfig) -> int:
    """The width of a model's joint embedding; SigLIP has no projection of images, and that of its vision tower."""
    return getattr(config, "projection_dim", config.vision_config.hidden_size)


def cut_towers(teacher: PretrainedConfig, student: PretrainedConfig) -> tuple[str, ...]:
    """Which of `vision` and `text` are smaller in the student; the joint embedding belongs to both."""
    sizes = [field.name for field in dataclasses.fields(TowerConfig)]

    def size(config: PretrainedConfig, tower: str) -> list[int]:
        return [embedding_width(config), *(getattr(getattr(config, f"{tower}_config"), name) for name in sizes)]

    return tuple(tower for tower in ("vision", "text") if size(teacher, tower) != size(student, tower))
