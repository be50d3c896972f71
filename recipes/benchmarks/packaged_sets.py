"""
Zero-shot accuracy on images that come with Python packages: scikit-learn's handwritten digits, and the pictures that
at least four of QtAwesome's six icon fonts have under one name. Both are written as evaluation sets are on the Hub,
and read as those are, by the code behind `recipes/evaluate.py --sets`.

    pip install scikit-learn QtAwesome
    python recipes/benchmarks/packaged_sets.py --output_dir packaged --models student another/student

The embedded teacher comes first. No model was trained on these images, and no prompt was tuned: digits have MNIST's,
icons are called by their bare names, as the teacher's training images were.
"""

import argparse
import io
import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from clipmap_hf.demo import TEACHER
from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.sets import EvalSet
from clipmap_hf.evaluation.suite import evaluate_sets
from clipmap_hf.files.tables import markdown_table
from clipmap_hf.models.loading import load_model, load_processor


SETS = {"digits": EvalSet("digits", "CC BY 4.0"), "icons": EvalSet("icons", "MIT, Apache-2.0, OFL and CC BY 4.0")}
# Beginnings of the file names of QtAwesome's fonts, of each family its newest, and what ends the names of one style.
FONTS = {
    "fontawesome6-solid-webfont": "",
    "materialdesignicons6-webfont": "",
    "phosphor": "",
    "remixicon": "-line",
    "codicon": "",
    "elusiveicons-webfont": "",
}
SIZE, LEAST_FONTS = 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the sets and the results")
    parser.add_argument("--models", nargs="*", default=[], help="folders or Hub ids of models beside the teacher")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    state = join_processes()
    sets_dir = arguments.output_dir / "sets"
    if state.is_main_process:
        write_set(sets_dir / "digits", *digits(), 'a photo of the number: "{c}".')
        write_set(sets_dir / "icons", *icons(), "{c}")
    state.wait_for_everyone()
    columns = [["set"], ["model"], ["images"], ["classes"], ["accuracy@1 (%)"], ["accuracy@5 (%)"], ["chance (%)"]]
    for number, source in enumerate([str(TEACHER), *arguments.models]):
        name = Path(source).name
        model, processor = load_model(source).to(state.device), load_processor(source)
        output = arguments.output_dir / f"{number}-{name}"
        results = evaluate_sets(model, processor, SETS, output, model_id=source, sets_dir=sets_dir)
        for set_name, result in results.items():
            best, five = (100 * result["metrics"][f"accuracy@{k}"] for k in (1, 5))
            chance = [100 * k / result["classes"] for k in (1, 5)]
            row = [set_name, name, f"{result['images']:,}", str(result["classes"]), f"{best:.1f}", f"{five:.1f}"]
            for column, cell in zip(columns, [*row, "{:.1f}, {:.1f}".format(*chance)], strict=True):
                column.append(cell)
    state.print(markdown_table(columns))


def digits() -> tuple[list[Image.Image], list[int], list[str]]:
    """Loads 1,797 images of 8 × 8 pixels, their classes, and the names of the classes."""
    data = load_digits()
    images = [Image.fromarray((pixels * (255 / 16)).astype(np.uint8)) for pixels in data.images]
    return images, data.target.tolist(), [str(digit) for digit in data.target_names]


def icons() -> tuple[list[Image.Image], list[int], list[str]]:
    """Draws black pictures on white; returns them, their classes, and the names of the classes."""
    folder = Path(find_spec("qtawesome").submodule_search_locations[0]) / "fonts"  # importing it would need Qt
    pictures = defaultdict(list)
    for beginning, style in FONTS.items():
        (charmap,), (font,) = folder.glob(f"{beginning}-charmap-*.json"), folder.glob(f"{beginning}-[0-9]*.ttf")
        font = ImageFont.truetype(str(font), SIZE * 3 // 4)
        for name, code in json.loads(charmap.read_text(encoding="utf-8")).items():
            if name.endswith(style):
                pictures[name.removesuffix(style)].append((font, chr(int(code, 16))))
    names = sorted(name for name, glyphs in pictures.items() if len(glyphs) >= LEAST_FONTS)
    images = [drawn(*glyph) for name in names for glyph in pictures[name]]
    labels = [label for label, name in enumerate(names) for _ in pictures[name]]
    return images, labels, [name.replace("-", " ") for name in names]


def drawn(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image:
    image = Image.new("L", (SIZE, SIZE), 255)
    ImageDraw.Draw(image).text((SIZE / 2, SIZE / 2), glyph, fill=0, font=font, anchor="mm")
    return image


def write_set(folder: Path, images: list[Image.Image], labels: list[int], names: list[str], template: str) -> None:
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    (folder / "test").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({"png": files, "cls": labels})
    table.cast_column("png", datasets.Image(decode=False)).to_parquet(folder / "test" / "0000.parquet")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text(template + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
