"""
How many images a second does one core prepare for training? Makes a small webdataset of photo-like JPEGs, reads it by
turns with the package's stream and with the pipeline of open_clip (https://github.com/mlfoundations/open_clip) on the
`webdataset` package, in one process on one core, and prints a table.

    python recipes/benchmarks/data.py

Both give batches of 224-pixel random resized crops, as floats that the model takes, and token ids, of shuffled pairs.
Both use the tokenizer of the package. Where torchvision cannot be imported, its transforms are replaced by functions
that do the same on PIL images: `transforms` in the table says which it was.
"""

import argparse
import io
import math
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw


SIZE = 224
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = ("red", "blue", "old", "small", "dog", "cat", "house", "tree", "car", "street", "under", "near", "drawing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="images of the data set; each round reads as many")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, in each of which both read")
    parser.add_argument("--batch_size", type=int, default=256, help="pairs per batch")
    parser.add_argument("--shuffle_buffer", type=int, default=256, help="rows to shuffle among")
    arguments = parser.parse_args()
    try:
        import webdataset  # noqa: F401
    except ImportError:
        sys.exit("The benchmark compares with the `webdataset` package: pip install webdataset")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # reading threads would otherwise count as a second core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        captions, bytes_per_image = write_shards(Path(folder), arguments.images)
        tokenizer = train_tokenizer(captions)
        transform, transforms = open_clip_transform()
        batches = {
            "clipmap_hf": package_batches(folder, tokenizer, arguments.batch_size, arguments.shuffle_buffer),
            "webdataset": open_clip_batches(
                folder, tokenizer, transform, arguments.batch_size, arguments.shuffle_buffer
            ),
        }
        speeds = measure(batches, max(arguments.images // arguments.batch_size, 1), arguments.rounds)
    print(f"{arguments.images} JPEGs of {bytes_per_image / 1e3:.0f} kB; transforms: {transforms}\n")
    print_table(speeds)


def measure(
    batches: dict[str, Iterator[tuple[torch.Tensor, torch.Tensor]]], count: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Measures images per second and per second of CPU time in every round, after a round that is not counted."""
    speeds = {name: [] for name in batches}
    for number in range(rounds + 1):
        for name, iterator in batches.items():
            wall, cpu, images = time.perf_counter(), time.process_time(), 0
            for pixels, ids in islice(iterator, count):
                assert (
                    pixels.dtype == torch.float32 and pixels.shape[1:] == (3, SIZE, SIZE) and len(ids) == len(pixels)
                )
                images += len(pixels)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                speeds[name].append((images / wall, images / cpu))
    return speeds


def print_table(speeds: dict[str, list[tuple[float, float]]]) -> None:
    """Prints the medians as Markdown, with the slowest and the fastest round, and the ratios to the last pipeline."""
    medians = {
        name: [statistics.median(kind) for kind in zip(*values, strict=True)] for name, values in speeds.items()
    }
    base = medians[list(medians)[-1]]
    print("| pipeline | images/s | slowest–fastest round | ratio | images per CPU second | ratio |")
    print("|---|---|---|---|---|---|")
    for name, (wall, cpu) in medians.items():
        rounds = [speed for speed, _ in speeds[name]]
        spread = f"{min(rounds):.0f}–{max(rounds):.0f}"
        print(f"| {name} | {wall:.0f} | {spread} | {wall / base[0]:.2f} | {cpu:.0f} | {cpu / base[1]:.2f} |")


def package_batches(
    folder: str, tokenizer, batch_size: int, shuffle_buffer: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields what the package trains on: chunks of bytes from the stream, made floats as the trainer makes them."""
    from transformers import CLIPImageProcessorPil

    from clipmap_hf.data.augment import Augmentation
    from clipmap_hf.data.collate import PairCollator, normalized_pixels
    from clipmap_hf.data.loader import BatchPlan, PairStream
    from clipmap_hf.data.pairs import load_pairs

    pairs = load_pairs(f"{folder}/*.tar", image_column="jpg", caption_columns=["txt"], streaming=True)
    augmentation = Augmentation(scale=SCALE, ratio=RATIO)
    processor = CLIPImageProcessorPil(
        crop_size={"height": SIZE, "width": SIZE}, image_mean=list(MEAN), image_std=list(STD)
    )
    collator = PairCollator(tokenizer, processor, ["txt"], augmentation=augmentation)
    for step in PairStream(pairs, shuffle_buffer).steps(BatchPlan(batch_size), collator):
        for chunk in step:
            yield normalized_pixels(chunk), chunk["input_ids"]


def open_clip_batches(
    folder: str, tokenizer, transform: Callable, batch_size: int, shuffle_buffer: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields what comes out of the stages of open_clip's training pipeline, in its order."""
    import webdataset

    def token_ids(text: str) -> torch.Tensor:
        return tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")["input_ids"][0]

    dataset = (
        webdataset.WebDataset([str(path) for path in sorted(Path(folder).glob("*.tar"))], shardshuffle=100)
        .shuffle(shuffle_buffer)
        .decode("pilrgb")
        .rename(image="jpg;png;jpeg;webp", text="txt")
        .map_dict(image=transform, text=token_ids)
        .to_tuple("image", "text")
        .batched(batch_size)
    )
    while True:
        yield from dataset


def open_clip_transform() -> tuple[Callable[[Image.Image], torch.Tensor], str]:
    """Returns open_clip's training transform, and whose functions it is made of."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError):  # the latter if it was built for another torch
        return lambda image: normalized(resized_crop(image)), "as torchvision's, on PIL images"
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(SIZE, SCALE, RATIO, interpolation=bicubic),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(steps), "torchvision"


def resized_crop(image: Image.Image) -> Image.Image:
    """Does what torchvision's `RandomResizedCrop` does."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # the largest box of an allowed ratio, in the middle
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        box = ((width - w) // 2, (height - h) // 2)
        return image.crop((*box, box[0] + w, box[1] + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    return image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def normalized(image: Image.Image) -> torch.Tensor:
    """Does as torchvision's `ToTensor`, and `Normalize`, which works in place on a copy of what it is given."""
    pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.as_tensor(values)[:, None, None] for values in (MEAN, STD))
    return pixels.clone().sub_(mean).div_(std)


def train_tokenizer(captions: list[str]):
    """Trains a CLIP tokenizer of 77 tokens."""
    from clipmap_hf.data.tokenizer import train_clip_tokenizer

    return train_clip_tokenizer(captions, vocab_size=1024, context_length=77)


def write_shards(folder: Path, images: int, shards: int = 4) -> tuple[list[str], float]:
    """Writes tars of JPEGs and captions; returns the captions and the mean size of a JPEG."""
    rng, captions, size = np.random.default_rng(0), [], 0
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for index in range(shard, images, shards):
                captions.append(" ".join(rng.choice(WORDS, size=10)))
                jpeg = photo_like(rng)
                size += len(jpeg)
                for suffix, content in (("jpg", jpeg), ("txt", captions[-1].encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return captions, size / images


def photo_like(rng: np.random.Generator, size: tuple[int, int] = (500, 375)) -> bytes:
    """Draws a JPEG of a width and height: smooth colors, ellipses, and grain that makes it as large as a photo's."""
    larger = size[0] / 500
    grain = tuple(round(0.6 * side) for side in size[::-1])
    coarse, fine = (
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for shape in ((12, 16), grain)
    )
    image = Image.blend(coarse, fine, 0.15)
    draw = ImageDraw.Draw(image)
    for left, top, width, height, *color in rng.integers(
        (0, 0, 20, 20, 0, 0, 0), (400, 300, 150, 100, 256, 256, 256), (6, 7)
    ):
        box = [larger * side for side in (left, top, left + width, top + height)]
        draw.ellipse(box, fill=tuple(int(value) for value in color))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()


if __name__ == "__main__":
    main()
