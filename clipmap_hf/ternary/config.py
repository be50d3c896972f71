"""The options of a ternary model, which are the `quantization_config` of its config.json."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from clipmap_hf.ternary.packing import ENCODINGS
from clipmap_hf.ternary.quantizers import GRANULARITIES, QUANTIZERS


__all__ = ["BACKENDS", "METHOD", "PARTS", "TernaryConfig"]

METHOD = "clipmap_ternary"
FORMAT = 1
# Patterns of module names for all families. Only linear layers, embeddings and convolutions are selected; other
# modules that match, such as LayerNorms, stay float.
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
    The options of a ternary model. A ternary weight is a trit (-1, 0 or 1) times a level, which several weights share.

    Args:
        quantizer: How weights become ternary: `twn`, `absmean2` (TernaryCLIP), `absmean` (BitNet), or `learned`, which
            trains the levels.
        granularity: The weights that share a level: a `tensor`, a `row`, or a `block` of a row.
        block_size: Number of weights in a block.
        parts: The parts of the model that become ternary, keys of `PARTS`. Everything else stays float, and so does
            every bias and LayerNorm.
        encoding: `base3` (1.6 bits per weight), or `planar` (2 bits per weight), which is unpacked faster.
        modules: Names of the ternary modules. By default, they are the modules of `parts`.
        format: Version of the format of the packed file.
        quant_method: The name by which transformers finds this package's quantizer.

    Raises:
        TypeError: If `parts` or `modules` are no lists of strings.
        ValueError: If an option is unknown or out of range.
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
            if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
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
        Selects the modules of `parts`.

        Args:
            names: Names of all modules of a model that can be ternary.

        Raises:
            ValueError: If there are no modules of a part.
        """
        names, selected = list(names), []
        for part in self.parts:
            matching = [name for name in names if re.fullmatch(PARTS[part], name)]
            if not matching:
                raise ValueError(f"The model has no module of the part {part!r} that could be ternary; leave it out.")
            selected += matching
        return selected
