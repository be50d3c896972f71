"""Small evaluation sets, written as those on the Hub are, and a model that knows the colors they show."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from PIL import Image, ImageColor
from torch import nn


COLORS = ("red", "green", "blue", "black", "orange", "purple")
TEMPLATES = ("a {c}.", "the {c}")


def picture(colors: Sequence[int], kind: str = "webp") -> bytes:
    """An image file of 32 × 32 pixels in vertical stripes of some of `COLORS`."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    for stripe, color in zip(np.array_split(np.arange(32), len(colors)), colors, strict=True):
        pixels[:, stripe] = ImageColor.getrgb(COLORS[color])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg" if kind == "jpg" else kind, lossless=True)
    return file.getvalue()


def npy(values: Sequence[float]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=np.float32))
    return file.getvalue()


def rows_for(task: str, count: int = 24) -> list[dict]:
    """Rows of `webp` and `cls`, `npy` or `txt`; of retrieval one for each color, with one to three captions."""
    if task == "retrieval":
        captions = ("a {}", "{} it is", "all {}")
        texts = ["\n".join(captions[: 1 + index % 3]).format(*[color] * 3) for index, color in enumerate(COLORS)]
        return [{"webp": picture([index]), "txt": text.encode()} for index, text in enumerate(texts)]
    if task == "multilabel":
        shown = [(index % 6, (index // 2 + 1) % 6) for index in range(count)]
        return [{"webp": picture(two), "npy": npy([one in two for one in range(6)])} for two in shown]
    return [{"webp": picture([index % 6]), "cls": str(index % 6).encode()} for index in range(count)]


def write_tar(path: Path, rows: Sequence[dict], start: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, row in enumerate(rows):
            for column, content in row.items():
                member = tarfile.TarInfo(f"s{start + index:07d}.{column}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_set(folder: Path, rows: Sequence[dict], task: str, shards: int = 2, split: str = "test") -> Path:
    """A set as webdataset tars; returns its folder."""
    cuts = [len(rows) * shard // shards for shard in range(shards + 1)]
    for shard, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        write_tar(folder / split / f"{shard}.tar", rows[start:stop], start)
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    write_texts(folder, task)
    return folder


def write_parquet_set(folder: Path, rows: Sequence[dict], task: str) -> Path:
    """The same set as the Hub converts it to parquet, with labels decoded; returns its folder."""
    decode = {"cls": int, "npy": lambda one: np.load(io.BytesIO(one)).tolist(), "txt": bytes.decode}
    columns = {
        name: [decode[name](row[name]) if name in decode else {"bytes": row[name], "path": None} for row in rows]
        for name in rows[0]
    }
    table = datasets.Dataset.from_dict(columns)
    for name in columns.keys() - decode.keys():
        table = table.cast_column(name, datasets.Image(decode=False))
    (folder / "test").mkdir(parents=True)
    table.to_parquet(folder / "test" / "0000.parquet")
    write_texts(folder, task)
    return folder


def write_texts(folder: Path, task: str) -> None:
    if task != "classification":
        (folder / "dataset_type.txt").write_text(f"{task}\n")
    if task != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(COLORS) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


class ColorModel(nn.Module):
    """Sees which of `COLORS` an image shows, and reads which of them a text names."""

    def __init__(self, processor, config):
        super().__init__()
        self.config, self.tokenizer = config, processor.tokenizer
        norm = (processor.image_processor.image_mean, processor.image_processor.image_std)
        self.mean, self.std = (torch.tensor(one)[:, None, None] for one in norm)
        palette = torch.tensor([ImageColor.getrgb(color) for color in COLORS]) / 255
        self.palette = nn.Parameter(palette, requires_grad=False)
        self.texts = 0  # read so far

    def get_image_features(self, pixel_values):
        pixels = (pixel_values * self.std + self.mean).flatten(2).transpose(1, 2)  # (images, pixels, 3)
        nearest = torch.cdist(pixels, self.palette.expand(len(pixels), -1, -1)).argmin(dim=-1)
        shares = nn.functional.one_hot(nearest, len(COLORS)).float().mean(dim=1)
        return SimpleNamespace(pooler_output=(shares > 0.1).float())

    def get_text_features(self, input_ids, attention_mask):
        self.texts += len(input_ids)
        words = [self.tokenizer.decode(ids, skip_special_tokens=True).split() for ids in input_ids]
        named = [[float(color in text) for color in COLORS] for text in words]
        return SimpleNamespace(pooler_output=torch.tensor(named))
