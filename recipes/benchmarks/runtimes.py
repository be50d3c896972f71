"""
Do all runtimes give the same embeddings? Compares each with `CLIPModel` in fp32 on embedded drawings of the model's
image size, and once more on larger ones, which Transformers.js makes smaller in its own way.

    python recipes/benchmarks/runtimes.py --model student
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, pipeline

from clipmap_hf.data.collate import decoded
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.demo import TEACHER, TEST_PAIRS
from clipmap_hf.export.onnx import write_onnx
from clipmap_hf.files.tables import markdown_table
from clipmap_hf.models.features import encode_images, encode_texts
from clipmap_hf.models.loading import load_model, load_processor


NODE_PROJECT = Path(__file__).parents[2] / "tests" / "transformers_js"
SUFFIXES = {"fp32": "", "q8": "_quantized"}
Embeds = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TEACHER), help="folder of a CLIPModel; the embedded teacher by default")
    parser.add_argument("--pairs", type=int, default=100, help="pairs to compare on")
    arguments = parser.parse_args()
    model, processor = load_model(arguments.model), load_processor(arguments.model)
    rows = load_pairs(str(TEST_PAIRS)).select(range(arguments.pairs)).to_list()
    side, texts = model.config.vision_config.image_size, [row["caption"] for row in rows]
    fitting, larger = ([decoded(row)[1].resize((n, n)) for row in rows] for n in (side, 3 * side))
    weights = [Path(arguments.model, "model.safetensors")]
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        write_onnx(exported, model, processor)
        inputs = (processor, fitting, texts)
        parts = ("images, largest difference", "lowest cosine", "texts, largest difference", "lowest cosine")
        table = [("runtime", "files (MB)", *parts)]

        def compare(runtime: str, files: list[Path], found: Embeds, images: list = fitting) -> None:
            expected = reference(model, processor, images, texts)
            megabytes = sum(path.stat().st_size for path in files) / 1e6
            table.append((runtime, f"{megabytes:.2f}", *parity(found[0], expected[0]), *parity(found[1], expected[1])))

        compare("transformers, towers", weights, by_towers(arguments.model, *inputs))
        compare("sentence-transformers", weights, by_sentence_transformers(arguments.model, fitting, texts))
        installed = (NODE_PROJECT / "node_modules").is_dir()
        for dtype, suffix in SUFFIXES.items():
            files = [exported / "onnx" / f"{tower}_model{suffix}.onnx" for tower in ("vision", "text")]
            compare(f"ONNX Runtime, {dtype}", files, by_onnx_runtime(files, *inputs))
            if installed:
                compare(f"Transformers.js, {dtype}", files, by_transformers_js(exported, dtype, fitting, texts))
                found = by_transformers_js(exported, dtype, larger, texts)
                compare(f"Transformers.js, {dtype}, {3 * side} pixels", files, found, larger)
    print(markdown_table(list(zip(*table, strict=True))))
    if not installed:
        print("Transformers.js is not installed: npm install --ignore-scripts --prefix tests/transformers_js")


@torch.no_grad()
def reference(model, processor, images: list, texts: list[str]) -> Embeds:
    pixels, tokens = preprocessed(processor, images, texts)
    return encode_images(model, pixels), encode_texts(model, **tokens)


def preprocessed(processor, images: list, texts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return processor.image_processor(images, return_tensors="pt")["pixel_values"], dict(tokens)


def parity(found: torch.Tensor, expected: torch.Tensor) -> tuple[str, str]:
    """Finds the largest difference of a component, and the lowest cosine."""
    found = F.normalize(found, dim=-1)
    cosines = (found * expected).sum(dim=-1)
    return f"{(found - expected).abs().max().item():.1e}", f"{cosines.min().item():.5f}"


@torch.no_grad()
def by_towers(model: str, processor, images: list, texts: list[str]) -> Embeds:
    """Embeds images by the feature pipeline, texts by the text tower."""
    vision, text = (
        tower.from_pretrained(model, dtype=torch.float32)
        for tower in (CLIPVisionModelWithProjection, CLIPTextModelWithProjection)
    )
    extract = pipeline("image-feature-extraction", model=vision, image_processor=model, device="cpu")
    _, tokens = preprocessed(processor, images, texts)
    return torch.tensor(extract(images)).squeeze(1), text.eval()(**tokens).text_embeds


def by_sentence_transformers(model: str, images: list, texts: list[str]) -> Embeds:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": torch.float32})
    return loaded.encode(images, convert_to_tensor=True), loaded.encode(texts, convert_to_tensor=True)


def by_onnx_runtime(files: list[Path], processor, images: list, texts: list[str]) -> Embeds:
    from onnxruntime import InferenceSession

    pixels, tokens = preprocessed(processor, images, texts)
    sessions = (InferenceSession(path, providers=["CPUExecutionProvider"]) for path in files)
    feeds = {"pixel_values": pixels.numpy()}, {name: value.numpy() for name, value in tokens.items()}
    return tuple(torch.from_numpy(session.run(None, feed)[0]) for session, feed in zip(sessions, feeds, strict=True))


def by_transformers_js(folder: Path, dtype: str, images: list, texts: list[str]) -> Embeds:
    with tempfile.TemporaryDirectory() as pictures:
        paths = [str(Path(pictures, f"{index}.png")) for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        request = Path(pictures, "request.json")
        request.write_text(json.dumps({"images": paths, "texts": texts}), encoding="utf-8")
        command = ["node", str(NODE_PROJECT / "embed.mjs"), str(folder), dtype, str(request)]
        values = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return torch.tensor(values["image_embeds"]), torch.tensor(values["text_embeds"])


if __name__ == "__main__":
    main()
