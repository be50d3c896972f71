"""
Does the mapping stage run at full size here, and what does it take? Makes a randomly initialized ViT-B/16 `CLIPModel`
folder and a webdataset tar, runs `recipes/map.py` on them, and prints seconds per step and peak memory.

    python recipes/benchmarks/full_size.py --config recipes/configs/paper/small.yaml --batch_size 64 --steps 2

With `--calibration_pairs`, the operators start from the activations of so many pairs; with `--steps 0` that is all.
"""

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path


RECIPES = Path(__file__).parent.parent
WORDS = ("red", "blue", "old", "small", "dog", "cat", "house", "tree", "car", "street", "under", "near", "drawing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(RECIPES / "configs" / "paper" / "small.yaml"), help="YAML for map.py")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs per step")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps")
    parser.add_argument("--calibration_pairs", type=int, help="pairs to start from; by default the start is diagonal")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher, shard, output = (Path(folder) / name for name in ("teacher", "pairs.tar", "mapped"))
        pairs = max(arguments.batch_size * (arguments.steps + 1), arguments.calibration_pairs or 0)
        captions = write_shard(shard, pairs)
        write_teacher(teacher, captions)
        command = [sys.executable, str(RECIPES / "map.py"), "--config", arguments.config, "--teacher", str(teacher)]
        command += ["--train_data", str(shard), "--image_column", "png", "--caption_column", "txt"]
        command += ["--mapping_batch_size", str(arguments.batch_size), "--mapping_steps", str(arguments.steps)]
        if arguments.calibration_pairs:
            command += ["--initializer", "calibrated", "--calibration_pairs", str(arguments.calibration_pairs)]
        start = time.perf_counter()
        subprocess.run([*command, "--output_dir", str(output), "--log_every", "1"], check=True)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        sizes = {
            name: (output / name).stat().st_size / 1e6 for name in ("model.safetensors", "map/clipmap.safetensors")
        }
    times = [line["seconds"] for line in lines if "loss" in line]
    steps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # Linux: kB
    if steps:
        print(
            f"batch {arguments.batch_size}: " + ", ".join(f"step {i + 1} {step:.1f} s" for i, step in enumerate(steps))
        )
    print(f"peak memory {peak:.1f} GB; whole run with loading and saving {seconds:.0f} s")
    print(", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))


def write_shard(path: Path, pairs: int) -> list[str]:
    """Writes a webdataset tar of 256-pixel noise with captions; returns the captions."""
    from PIL import Image

    rng = random.Random(0)
    captions = [" ".join(rng.choices(WORDS, k=8)) for _ in range(pairs)]
    with tarfile.open(path, "w") as tar:
        for index, caption in enumerate(captions):
            image = io.BytesIO()
            Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)).resize((256, 256)).save(image, "png")
            for suffix, content in (("png", image.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return captions


def write_teacher(folder: Path, captions: list[str]) -> None:
    """Writes a ViT-B/16 `CLIPModel` of random weights, with OpenAI's vocabulary size, and a processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    from clipmap_hf.data.tokenizer import train_clip_tokenizer

    tokenizer = train_clip_tokenizer(captions, vocab_size=1024, context_length=77)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"pad_token_id": tokenizer.pad_token_id, **ids})
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
