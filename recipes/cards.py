"""
Renders the model cards of the paper's three sizes into `model_cards/`.

A card holds the recipe, sizes counted from the configs, and the paper's figures under its name. Nothing is trained or
looked up.

    python recipes/cards.py --output_dir model_cards
"""

from dataclasses import dataclass, field
from pathlib import Path

from clipmap_hf.cli.parsing import parse_arguments


TEACHER = "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
LICENSE = {"license": "mit"}  # of that teacher's card
STATUS = "Recipe; weights not yet published. What `Use` loads is what the recipe makes of your own image–text pairs:"
COMMAND = "`python recipes/compress.py --config recipes/configs/{name}.yaml --train_data … --output_dir {name}`"
# Its Tables 1, 2 and 12.
COLUMNS = ["MSCOCO i→t", "MSCOCO t→i", "Flickr30k i→t", "Flickr30k t→i", "ImageNet-1k", "GFLOPs", "pairs/s"]
PAPER = {
    "OpenCLIP ViT-B/16": ["60.0", "41.3", "86.2", "69.8", "70.2", "17.56 + 2.98", "1041"],
    "base": ["55.1", "37.9", "81.9", "67.6", "63.7", "7.99 + 1.49", "1654"],
    "small": ["38.4", "24.3", "66.0", "46.9", "42.7", "1.79 + 0.19", "2466"],
    "tiny": ["15.8", "8.2", "30.3", "17.9", "19.0", "0.21 + 0.03", "3847"],
}
SOURCE = """\
The authors' checkpoints of this shape, trained on YFCC-15M, as reported in *CLIP-Map: Structured Matrix Mapping for
Parameter-Efficient CLIP Compression* (arXiv:2602.05909; Tables 1, 2 and 12): zero-shot recall@1 and accuracy in
percent, cost of one image and one text, and throughput on one H800 at batch 32. None of it was measured here, and the
recipe below is not theirs (theirs is recipes/configs/paper/{name}.yaml):

{table}"""


@dataclass
class CardsArguments:
    output_dir: str = field(default="model_cards", metadata={"help": "Folder of the cards, each `NAME.md`."})


def main() -> None:
    (arguments,) = parse_arguments(CardsArguments, description=__doc__)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("base", "small", "tiny"):
        (folder / f"{name}.md").write_text(card(name), encoding="utf-8")
        print(folder / f"{name}.md")


def card(name: str) -> str:
    """The card of a preset."""
    from transformers import CLIPConfig

    from clipmap_hf.config import PRESETS, student_config
    from clipmap_hf.costs.cost import CostReport, model_cost
    from clipmap_hf.files.tables import markdown_table
    from clipmap_hf.hub.card import render_card

    teacher = CLIPConfig(vision_config={"patch_size": 16})  # ViT-B/16
    costs = CostReport(teacher=model_cost(teacher), student=model_cost(student_config(teacher, PRESETS[name])))
    rows = {row: PAPER[row] for row in ("OpenCLIP ViT-B/16", name)}
    columns = [["model", *rows], *([head, *values] for head, *values in zip(COLUMNS, *rows.values(), strict=True))]
    rendered = render_card(
        TEACHER,
        str(costs),
        model_class="CLIPModel",
        method="The student starts from the teacher's activations on some of the training pairs, and is distilled for "
        "the teacher's embeddings.",
        recipe=(Path(__file__).parent / "configs" / f"{name}.yaml").read_text(encoding="utf-8"),
        license=LICENSE,
        status=f"{STATUS} {COMMAND.format(name=name)}",
        figures=SOURCE.format(name=name, table=markdown_table(columns)),
    )
    return f"{rendered}\n"


if __name__ == "__main__":
    main()
