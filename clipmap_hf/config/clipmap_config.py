"""What to make of a teacher: the sizes of the student's towers, and how the operators that make it start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from clipmap_hf.config.budget import Budget
from clipmap_hf.config.heads import HEAD_RULES, check_head_count, head_count
from clipmap_hf.config.names import DEPTH_NAMES, START_NAMES
from clipmap_hf.config.resnet import ResNetTowerConfig


if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ClipMapConfig", "TowerConfig"]


@dataclass(frozen=True)
class TowerConfig:
    """
    The size of a tower. What is left out follows from the teacher: width and depth stay, and the FFN keeps its ratio
    to the width.

    Args:
        hidden_size: Width.
        intermediate_size: FFN width.
        num_hidden_layers: Depth.
        num_attention_heads: Heads, which must divide the width and be no wider than the teacher's; by default as
            `ClipMapConfig.heads` says.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None

    def resolve(self, teacher: PretrainedConfig, name: str, rule: str = "whole") -> TowerConfig:
        """
        Fills in what was left out.

        Args:
            teacher: The config of the teacher's tower.
            name: `vision` or `text`, for errors.
            rule: The rule for heads, as in `head_count`.

        Raises:
            ValueError: If the tower cannot be cut from this teacher; the message says what can.
        """
        width = self._checked(name, "hidden_size", teacher.hidden_size, teacher.hidden_size)
        depth = self._checked(name, "num_hidden_layers", teacher.num_hidden_layers, teacher.num_hidden_layers)
        heads = self.num_attention_heads
        if heads is None:
            heads = head_count(width, teacher, rule, name, teacher.num_hidden_layers // depth)
        check_head_count(heads, width, teacher, name)
        default_ffn = width * teacher.intermediate_size // teacher.hidden_size
        return TowerConfig(
            width, self._checked(name, "intermediate_size", teacher.intermediate_size, default_ffn), depth, heads
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
        vision: Size of the vision tower, a `TowerConfig` or, of a ResNet, a `ResNetTowerConfig`.
        text: Size of the text tower. A tower that is left as large as the teacher's is kept as it is, bit for bit.
        projection_dim: Width of the joint embedding; the teacher's by default, so that the student's embeddings
            live in the teacher's space.
        heads: How many heads a tower gets that does not say it. `whole` keeps the teacher's head width where the width
            is a multiple of it, as the papers do. `narrow` keeps the teacher's number of heads where that makes them a
            multiple of 8 and at least 16 wide, else the largest number below that does. `all` does so with the heads
            of all layers together that a layer stands for. By default `all` with `calibrated`, or `narrow` where it
            takes heads from single layers: without a refit, or if `depth` is not `interval_front`; else `whole`.
        budget: What the student may cost, a `Budget` or its values by name. Widths and depths that are not given are
            then searched (`choose_shape`) instead of taken from the teacher.
        initializer: How the width operators start, a key of `STARTS` (`diagonal` is Eq. 9). Some starts read
            calibration data (`STARTS[name].reads_pairs`). By default `calibrated` with such data, `diagonal` without
            (and for a ResNet). `calibrated_whole` is `calibrated` as it was first made, with whole heads.
        refit: Whether `calibrated` solves the student's layers one after another (`refit`).
        refit_steps: Steps of gradient descent on each tower after its layers were solved: most of the time of a start.
            Steps that make the error on the calibration pairs larger are taken back.
        depth: Which teacher layers the depth operators start from: a key of `DEPTH_RULES`; `similarity` with
            `calibrated` or `importance`, which takes the layers that change the residual stream most; or `score` with
            a selection, which takes the layers that its criterion scores highest.
        depth_per: One depth matrix per `tower` (the paper) or per tensor `kind`.
        tie_ffn: Whether `fc2` reads through the transposed operator that `fc1` writes with. A.3 lists no such tie.
        decay_towards: What weight decay pulls an operator to. `initial` keeps the inheritance; `zero` is the literal
            AdamW on the operators, which at the paper's settings decays the inheritance itself away.
        norm_statistics: Means and variances that a ResNet's BatchNorms start with: `measured` on calibration pairs,
            where there are some, or `inherited` through the operators. The refit of `calibrated` sets them itself.
        seed: Of random initializers.

    Raises:
        ValueError: If a name is unknown, or `refit_steps` is negative or no integer.
        TypeError: If `vision` or `text` is neither class, or `budget` neither a `Budget` nor a mapping.
    """

    vision: TowerConfig | ResNetTowerConfig = field(default_factory=TowerConfig)
    text: TowerConfig = field(default_factory=TowerConfig)
    projection_dim: int | None = None
    heads: Literal["whole", "narrow", "all"] | None = None
    budget: Budget | Mapping[str, Any] | None = None
    initializer: str | None = None
    refit: bool = True
    refit_steps: int = 400
    depth: str = "interval_front"
    depth_per: Literal["tower", "kind"] = "tower"
    tie_ffn: bool = False
    decay_towards: Literal["initial", "zero"] = "initial"
    norm_statistics: Literal["measured", "inherited"] = "measured"
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (
            ("heads", (None, *HEAD_RULES)),
            ("initializer", (None, *START_NAMES)),
            ("depth", DEPTH_NAMES),
            ("depth_per", ("tower", "kind")),
            ("decay_towards", ("initial", "zero")),
            ("norm_statistics", ("measured", "inherited")),
        ):
            if getattr(self, name) not in allowed:
                names = [value for value in allowed if value is not None]
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; allowed are {names}.")
        if type(self.refit_steps) is not int or self.refit_steps < 0:
            raise ValueError(f"refit_steps={self.refit_steps!r} must be an integer of at least 0.")
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(self, name), kinds):
                allowed = " or a ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name} must be a {allowed}, got {type(getattr(self, name)).__name__}.")
        if isinstance(self.budget, Mapping):
            object.__setattr__(self, "budget", Budget.from_dict(self.budget))
        if not isinstance(self.budget, Budget | None):
            raise TypeError(f"budget must be a Budget or its values by name, got {type(self.budget).__name__}.")

    @property
    def head_rule(self) -> str:
        """The rule for heads, of `HEAD_RULES`."""
        if self.heads or self.initializer != "calibrated":
            return self.heads or "whole"
        return "all" if self.refit and self.depth == "interval_front" else "narrow"

    def to_dict(self) -> dict[str, Any]:
        """Returns all values as plain JSON types; a budget of `None` is left out."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "budget" or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClipMapConfig:
        """
        The inverse of `to_dict`.

        Raises:
            ValueError: If a key is unknown.
        """
        values = dict(values)
        _check_keys(values, cls)
        for name, kinds in _KINDS.items():
            if name in values:
                # Whichever knows the keys; a typing error is told of a transformer.
                kind = next((one for one in kinds if set(values[name]) <= _fields(one)), TowerConfig)
                _check_keys(values[name], kind)
                values[name] = kind(**values[name])
        return cls(**values)


_KINDS = {"vision": (TowerConfig, ResNetTowerConfig), "text": (TowerConfig,)}


def _fields(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _check_keys(values: dict[str, Any], cls: type) -> None:
    allowed = _fields(cls)
    if unknown := sorted(set(values) - allowed):
        raise ValueError(f"Unknown keys {unknown} for {cls.__name__}; allowed are {sorted(allowed)}.")
