"""The arguments of training ternary weights."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from clipmap_hf.training.arguments import DistillationStageArguments


if TYPE_CHECKING:
    from clipmap_hf.ternary.config import TernaryConfig

__all__ = ["TernaryStageArguments"]


@dataclass
class TernaryStageArguments(DistillationStageArguments):
    """Training of ternary weights, and how they are packed; the words of `TernaryConfig`."""

    quantizer: Literal["absmean", "absmean2", "learned", "twn"] = field(
        default="learned",
        metadata={"help": "How weights become ternary; absmean2 is TernaryCLIP's, learned trains twn's levels."},
    )
    granularity: Literal["tensor", "row", "block"] = field(
        default="row", metadata={"help": "What has a level of its own; with blocks there is no int8 arithmetic."}
    )
    block_size: int = field(default=64, metadata={"help": "Weights in a block."})
    parts: list[str] = field(
        default_factory=lambda: ["layers", "token_embedding"],
        metadata={"help": "What is ternary: layers, token_embedding, projections, patch_embedding."},
    )
    encoding: Literal["base3", "planar"] = field(
        default="base3", metadata={"help": "1.6 bits a weight in the file, or 2, which are unpacked faster."}
    )
    float_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Of all that is not ternary, in the file."}
    )
    ramp_steps: float = field(
        default=0.0,
        metadata={"help": "Steps, or a share of all if below 1, in which weights go from float to ternary."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.config()
        if self.ramp_steps < 0:
            raise ValueError(f"ramp_steps={self.ramp_steps} must be at least 0.")

    def config(self) -> "TernaryConfig":
        """The arguments that describe the model, as its config."""
        from clipmap_hf.ternary.config import TernaryConfig  # imports torch, for which `--help` must not wait

        names = (field.name for field in fields(TernaryConfig) if hasattr(self, field.name))
        return TernaryConfig(**{name: getattr(self, name) for name in names})
