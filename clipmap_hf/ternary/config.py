"""What of a model is ternary, and how: the `quantization_config` of its config.json."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from clipmap_hf.ternary.packing import ENCODINGS
from clipmap_hf.ternary.quantizers import GRANULARITIES, QUANTIZERS


__all__ = ["BACKENDS", "METHOD", "PARTS", "TernaryConfig"]

METHOD, FORMAT = "clipmap_ternary", 1
# The names of modules, in all families; those of other kinds that match, as LayerNorms, are never meant.
PARTS = {
    "layers": r".+\.layers?\.\d+\..+",
    "token_embedding": r".+\.(token_embedding|word_embeddings)",
    "projections": r"(visual|text)_projection|text_model\.head|vision_model\.head\.mlp\.fc[12]",
    "patch_embedding": r".+\.patch_embedding",
}
BACKENDS = ("auto", "float", "int8", "packed")


@dataclass
class TernaryConfig(QuantizationConfigMixin):
    """
    The options of a ternary model.

    Args:
        quantizer: How weights become ternary: `twn`, `absmean2` (TernaryCLIP), `absmean` (BitNet), `learned` levels.
        granularity: What has a level of its own: a `tensor`, a `row` or a `block` of a row.
        block_size: Weights in a block.
        parts: What is ternary, of `PARTS`; all else, and every bias and LayerNorm, stays float.
        encoding: `base3`, 1.6 bits a weight, or `planar`, 2 bits, which is unpacked faster.
        modules: The names of the ternary modules; by default those of `parts`.
        format: Of the packed file.
        quant_method: The name by which transformers finds this package's quantizer.

    Raises:
        ValueError: If an option is unknown.
    """

    quantizer: str = "twn"
    granularity: str = "row"
    block_size: int = 64
    parts: list[str] = field(default_factory=lambda: ["layers", "token_embedding"])
    encoding: str = "base3"
    modules: list[str] = field(default_factory=list)
    format: int = FORMAT
    quant_method: str = METHOD

    def __post_init__(self):
        for name, allowed in (
            ("quantizer", QUANTIZERS),
            ("granularity", GRANULARITIES),
            ("encoding", ENCODINGS),
            ("format", (FORMAT,)),
            ("quant_method", (METHOD,)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; it must be one of {sorted(allowed)}.")
        for name in ("parts", "modules"):
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise TypeError(f"{name}={value!r} must be a list of strings.")
            if len(set(value)) < len(value):
                raise ValueError(f"{name}={value} names something twice.")
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts={self.parts} must be some of {sorted(PARTS)}.")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size={self.block_size!r} must be an integer of at least 1.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def select(self, names: Iterable[str]) -> list[str]:
        """
        Those of a model's module names that `parts` ask for.

        Raises:
            ValueError: If there are none of a part.
        """
        names, found = list(names), []
        for part in self.parts:
            of_part = [name for name in names if re.fullmatch(PARTS[part], name)]
            if not of_part:
                raise ValueError(f"The model has nothing that could be ternary of the part {part!r}; leave it out.")
            found += of_part
        return found
