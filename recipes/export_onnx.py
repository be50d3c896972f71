"""
Writes ONNX files of any CLIP model, and prints how far their embeddings are from the model's.

    python recipes/export_onnx.py --model student
    python recipes/export_onnx.py --model openai/clip-vit-base-patch32 --output_dir exported
"""

from dataclasses import dataclass, field
from pathlib import Path

from clipmap_hf.cli.parsing import parse_arguments
from clipmap_hf.files.extras import require


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Hub id or folder of a CLIPModel."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    output_dir: str | None = field(default=None, metadata={"help": "Where `onnx/` goes; into `model` by default."})

    def __post_init__(self):
        require("onnx", "onnx", "onnxruntime", "onnxscript")
        if self.output_dir is None and not Path(self.model).is_dir():
            raise ValueError(f"{self.model!r} is no folder that could be written to; name one by --output_dir.")


def main() -> None:
    (arguments,) = parse_arguments(ExportArguments, description=__doc__)
    from clipmap_hf.export.onnx import GRAPHS, onnx_parity, write_onnx
    from clipmap_hf.files.tables import markdown_table
    from clipmap_hf.models.loading import load_model, load_processor

    model = load_model(arguments.model, revision=arguments.model_revision)
    processor = load_processor(arguments.model, revision=arguments.model_revision)
    folder = Path(arguments.output_dir or arguments.model)
    write_onnx(folder, model, processor)

    batches = drawings(processor)
    rows = [["file", "MB", "embeddings", "largest difference", "lowest cosine"]]
    for name in (f"{graph}{suffix}.onnx" for suffix in ("", "_quantized") for graph in GRAPHS):
        path = folder / "onnx" / name
        for embeds, (difference, cosine) in onnx_parity(path, model, batches).items():
            size = f"{path.stat().st_size / 1e6:.2f}"
            rows.append([name, size, embeds, f"{difference:.1e}", f"{cosine:.5f}"])
    print(markdown_table(list(zip(*rows, strict=True))))


def drawings(processor) -> list[dict]:
    """One hundred embedded pairs in batches of five, then the first twenty one by one."""
    from clipmap_hf.data.collate import PairCollator
    from clipmap_hf.data.pairs import load_pairs
    from clipmap_hf.demo import TEST_PAIRS

    rows = load_pairs(str(TEST_PAIRS)).select(range(100)).to_list()
    collator = PairCollator(processor.tokenizer, processor.image_processor)
    return [collator(rows[start : start + 5]) for start in range(0, 100, 5)] + [collator([row]) for row in rows[:20]]


if __name__ == "__main__":
    main()
