"""Tiny models, tokenizers and pairs, built in memory; no network."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import io
import random
import string
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
)
from transformers.utils import logging

from clipmap_hf import compressor
from clipmap_hf.files import tensor_store
from clipmap_hf.models.clip_resnet.config import CLIPResNetConfig
from clipmap_hf.models.clip_resnet.model import CLIPResNetModel
from clipmap_hf.pipeline import start as pipeline_start
from clipmap_hf.starts import start_mapper
from clipmap_hf.starts.calibrated import refit
from clipmap_hf.training.stages import base


torch.set_num_threads(1)
logging.disable_progress_bar()
datasets.disable_progress_bars()

IMAGE_SIZE = 32
CONTEXT_LENGTH = 16
PROJECTION_DIM = 32
COLORS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square", "bar", "pie")


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory):
    """Keeps what `load_dataset` caches out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps the first precision it was told for the life of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process one of several, though there are no others: `as_process(index, count)`."""

    def become(index: int, count: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: index)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: count)

    return become


@pytest.fixture
def layer_by_layer(monkeypatch):
    """A function that leaves out the last part of a refit, gradient steps on a whole tower."""
    return lambda: monkeypatch.setattr(refit._TowerRefit, "descend", lambda tower: None)


@pytest.fixture
def streams_in_files(monkeypatch):
    """A function that lets stores of tensors keep everything in files; the list that it returns has them all."""
    files, memmap = [], np.memmap

    def counted(*args, **kwargs):
        files.append(memmap(*args, **kwargs))
        return files[-1]

    def use_files() -> list:
        monkeypatch.setattr(tensor_store, "IN_MEMORY", 0)
        monkeypatch.setattr(tensor_store.np, "memmap", counted)
        return files

    return use_files


@pytest.fixture
def no_files(monkeypatch):
    """Stores of tensors that would write to files fail the test."""
    monkeypatch.setattr(tensor_store.np, "memmap", lambda *_, **__: pytest.fail("a file"))


@pytest.fixture
def no_start(monkeypatch):
    """A function after which any start of a mapper from pairs fails the test."""
    return lambda: monkeypatch.setattr(compressor, "start_mapper", _fail_if_pairs_are_read)


@pytest.fixture
def no_search(monkeypatch):
    """A function after which any search for a shape fails the test."""
    return lambda: monkeypatch.setattr(pipeline_start, "search_shape", lambda *_: pytest.fail("it was searched"))


@pytest.fixture
def no_recomputation(monkeypatch):
    """A function that lets gradient caching keep the activations that it would compute again."""
    return lambda: monkeypatch.setattr(base, "checkpoint", lambda function, *args, use_reentrant: function(*args))


def _fail_if_pairs_are_read(teacher, config, batches=None):
    if batches is not None:
        pytest.fail("it was calibrated")
    return start_mapper(teacher, config)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> CLIPTokenizer:
    """A character-level tokenizer; bos, eos and pad are the last ids, pad being eos as in OpenAI's."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CONTEXT_LENGTH)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """A factory: `tiny_config(vision={…}, text={…}, projection_dim=…)` overrides single values."""

    def build(
        vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, projection_dim: int = PROJECTION_DIM
    ) -> CLIPConfig:
        vision_config = {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "projection_dim": projection_dim,
        }
        text_config = {
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "max_position_embeddings": CONTEXT_LENGTH,
            "vocab_size": len(tiny_tokenizer),
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "projection_dim": projection_dim,
        }
        return CLIPConfig(
            vision_config=vision_config | (vision or {}),
            text_config=text_config | (text or {}),
            projection_dim=projection_dim,
        )

    return build


def randomize(model: CLIPModel, seed: int = 0) -> CLIPModel:
    """Draws every weight, gains and biases included, so that a tensor mapped wrongly cannot hide behind 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.startswith("logit_"):
            parameter.data.fill_(2.0)
        elif "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.1 * noise
        elif "embedding" in name and "patch" not in name:
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return model


CLIP_KINDS = ("gelu", "quick_gelu", "old end token")


def clip_of_kind(config: CLIPConfig, kind: str) -> CLIPModel:
    """A random model with an activation of `CLIP_KINDS`, or the end token id of old configs."""
    if kind == "old end token":
        config.text_config.eos_token_id = 2
    else:
        for tower in (config.vision_config, config.text_config):
            tower.hidden_act = kind
    return randomize(CLIPModel(config)).eval()


@pytest.fixture(scope="session")
def shared_teacher(tiny_config) -> CLIPModel:
    return randomize(CLIPModel(tiny_config())).eval()


@pytest.fixture
def tiny_teacher(shared_teacher) -> CLIPModel:
    """A `CLIPModel` of about 310,000 random parameters in eval mode; each test gets its own."""
    return copy.deepcopy(shared_teacher)


@pytest.fixture(scope="session")
def metaclip2(tiny_config) -> MetaClip2Model:
    """A random MetaCLIP 2 of the tiny teacher's size, in eval mode."""
    return randomize(MetaClip2Model(MetaClip2Config(**_towers(tiny_config()), projection_dim=PROJECTION_DIM))).eval()


@pytest.fixture(scope="session")
def siglip(tiny_config) -> SiglipModel:
    """A random SigLIP of the tiny teacher's size, in eval mode; its joint embedding is as wide as its vision tower."""
    towers = _towers(tiny_config())
    towers["text_config"]["projection_size"] = towers["vision_config"]["hidden_size"]
    towers["text_config"]["max_position_embeddings"] = 64  # to which transformers' pipeline pads
    return randomize(SiglipModel(SiglipConfig(**towers))).eval()


@pytest.fixture(scope="session")
def siglip_processor(tiny_pairs, siglip, tmp_path_factory) -> SiglipProcessor:
    """A processor whose tokenizer is learned from the captions."""
    import sentencepiece

    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row["caption"] for row in tiny_pairs]),
        model_writer=vocabulary,
        vocab_size=siglip.config.text_config.vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spiece") / "spiece.model"
    path.write_bytes(vocabulary.getvalue())
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return SiglipProcessor(SiglipImageProcessorPil(size=size), SiglipTokenizer(str(path)))


@pytest.fixture(scope="session")
def siglip_folder(siglip, siglip_processor, tmp_path_factory) -> Path:
    """A folder with the SigLIP and its processor; copy it before changing it."""
    return _saved(tmp_path_factory.mktemp("siglip"), siglip, siglip_processor)


@pytest.fixture(scope="session")
def chinese_clip(tiny_config) -> ChineseCLIPModel:
    """A random Chinese-CLIP of the tiny teacher's size, in eval mode."""
    towers = _towers(tiny_config())
    towers["text_config"]["hidden_act"] = "gelu"
    return randomize(ChineseCLIPModel(ChineseCLIPConfig(**towers, projection_dim=PROJECTION_DIM))).eval()


@pytest.fixture(scope="session")
def clip_resnet(tiny_config) -> CLIPResNetModel:
    """A random CLIP with a ResNet and the tiny teacher's text tower, in eval mode; its BatchNorms have seen images."""
    return _random_resnet(tiny_config(), [1, 2, 1, 1])


@pytest.fixture(scope="session")
def deep_clip_resnet(tiny_config) -> CLIPResNetModel:
    """The same with several blocks in each stage."""
    return _random_resnet(tiny_config(), [2, 3, 2, 4])


def _random_resnet(clip: CLIPConfig, layers: list[int]) -> CLIPResNetModel:
    vision = {"width": 4, "layers": layers, "head_width": 32, "image_size": IMAGE_SIZE}
    text = _towers(clip)["text_config"]
    config = CLIPResNetConfig(vision_config=vision, text_config=text, projection_dim=PROJECTION_DIM)
    model, generator = randomize(CLIPResNetModel(config)), torch.Generator().manual_seed(1)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        draws = torch.randn(3, norm.num_features, generator=generator)
        norm.weight.data, norm.running_mean, norm.running_var = 1 + 0.2 * draws[0], 0.1 * draws[1], draws[2].exp()
        norm.num_batches_tracked += 7
    return model.eval()


@pytest.fixture(scope="session")
def clip_resnet_folder(clip_resnet, tiny_processor, tmp_path_factory) -> Path:
    """A folder with the ResNet and the tiny teacher's processor; copy it before changing it."""
    return _saved(tmp_path_factory.mktemp("clip_resnet"), clip_resnet, tiny_processor)


def _saved(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def _towers(config: CLIPConfig) -> dict[str, dict[str, Any]]:
    """What the towers' configs of another family have in common with CLIP's."""
    drop = ("model_type", "transformers_version", "projection_dim")
    return {
        name: {key: value for key, value in getattr(config, name).to_dict().items() if key not in drop}
        for name in ("vision_config", "text_config")
    }


@pytest.fixture
def model_with_dropout(tiny_config) -> CLIPModel:
    """A tiny model in training mode whose forward passes differ from those in eval mode."""
    dropout = {"attention_dropout": 0.5}
    return randomize(CLIPModel(tiny_config(vision=dropout, text=dropout))).train()


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer) -> CLIPProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(
        image_processor=CLIPImageProcessorPil(size=size, do_center_crop=False), tokenizer=tiny_tokenizer
    )


@pytest.fixture(scope="session")
def tiny_pairs() -> list[dict[str, Any]]:
    """24 rows of `image` (PIL, 40 × 32), `caption` and `keywords`: every color in every shape, at random places."""
    rng = random.Random(0)
    return [
        {"image": _draw(color, shape, rng), "caption": f"{color} {shape}", "keywords": [color, shape, "drawing"]}
        for color in COLORS
        for shape in SHAPES
    ]


def _draw(color: str, shape: str, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (40, 32), "white")
    draw = ImageDraw.Draw(image)
    left, top = rng.randint(0, 20), rng.randint(0, 12)
    box = (left, top, left + 18, top + 18)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "bar":
        draw.rectangle((left, top, left + 18, top + 5), fill=color)
    else:
        draw.pieslice(box, 0, 270, fill=color)
    return image


@pytest.fixture(scope="session")
def pairs_parquet(tiny_pairs, tmp_path_factory) -> Path:
    """A parquet file of `tiny_pairs`."""
    columns = {name: [row[name] for row in tiny_pairs] for name in tiny_pairs[0]}
    path = tmp_path_factory.mktemp("parquet") / "pairs.parquet"
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(path)
    return path


@pytest.fixture(scope="session")
def pairs_tar(tiny_pairs, tmp_path_factory) -> Path:
    """A webdataset tar of `tiny_pairs`: `000.png`, `000.txt`, …"""
    path = tmp_path_factory.mktemp("tar") / "pairs.tar"
    with tarfile.open(path, "w") as tar:
        for index, row in enumerate(tiny_pairs):
            png = io.BytesIO()
            row["image"].save(png, "PNG")
            for extension, content in (("png", png.getvalue()), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{index:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def pairs_tars(pairs_tar, tmp_path_factory) -> str:
    """A glob of four tars, which together hold what `pairs_tar` holds."""
    folder = tmp_path_factory.mktemp("tars")
    with tarfile.open(pairs_tar) as whole:
        members = whole.getmembers()
        for shard in range(4):
            with tarfile.open(folder / f"pairs-{shard}.tar", "w") as part:
                for member in members[12 * shard : 12 * (shard + 1)]:
                    part.addfile(member, whole.extractfile(member))
    return str(folder / "*.tar")


@pytest.fixture(scope="session")
def teacher_folder(shared_teacher, tiny_processor, tmp_path_factory) -> Path:
    """A folder with the tiny teacher and its processor; copy it before changing it."""
    return _saved(tmp_path_factory.mktemp("teacher"), shared_teacher, tiny_processor)


@pytest.fixture
def tiny_batch(tiny_pairs, tiny_processor) -> dict[str, torch.Tensor]:
    """Eight pairs: `input_ids` and `attention_mask` `(8, length)`, some padded, `pixel_values` `(8, 3, 32, 32)`."""
    rows = tiny_pairs[::3]
    captions, images = [row["caption"] for row in rows], [row["image"] for row in rows]
    return dict(tiny_processor(text=captions, images=images, padding=True, return_tensors="pt"))


@pytest.fixture
def images(tiny_pairs, tmp_path) -> str:
    """A folder of images, and nothing else."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, row in enumerate(tiny_pairs):
        row["image"].save(folder / f"{index:02d}.png")
    return str(folder)
