"""Teachers, pairs and measures by which the tests judge calibrated starts."""

import copy

import torch
from conftest import CONTEXT_LENGTH, IMAGE_SIZE
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.families import CLIP
from clipmap_hf.mapping.fold import fold
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.models.towers import Tower
from clipmap_hf.starts import start_mapper
from clipmap_hf.starts.calibrated.statistics import token_weights


TOWERS = ("vision", "text")
NARROW = ClipMapConfig(vision=TowerConfig(32), text=TowerConfig(32), initializer="calibrated", refit_steps=0)

Pairs = dict[str, torch.Tensor]


def random_pairs(config: CLIPConfig, count: int, seed: int = 0) -> Pairs:
    """As many `pixel_values` of noise and `input_ids` of random texts of random lengths, behind their ends padding."""
    generator, text = torch.Generator().manual_seed(seed), config.text_config
    lengths = torch.randint(2, CONTEXT_LENGTH - 3, (count, 1), generator=generator)
    words = torch.randint(text.vocab_size - 2, (count, CONTEXT_LENGTH), generator=generator)
    words[:, 0] = text.vocab_size - 2
    return {
        "pixel_values": torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "input_ids": words.where(torch.arange(CONTEXT_LENGTH) <= lengths, text.vocab_size - 1),
    }


def split(pairs: Pairs, size: int) -> list[Pairs]:
    """Batches of a size."""
    chunks = zip(*(tensor.split(size) for tensor in pairs.values()), strict=True)
    return [dict(zip(pairs, chunk, strict=True)) for chunk in chunks]


def started(teacher: CLIPModel, config: ClipMapConfig, batches: list[Pairs]) -> WeightMapper:
    """A mapper that has started."""
    return start_mapper(teacher, config, batches).eval()


def folded(teacher: CLIPModel) -> CLIPModel:
    model = copy.deepcopy(teacher)
    model.load_state_dict(fold(model.state_dict(), CLIP), strict=True)
    return model


@torch.no_grad()
def embeddings(model, pairs: Pairs) -> dict[str, torch.Tensor]:
    """Normalized, by tower."""
    output = model(**pairs)
    return {"vision": output.image_embeds, "text": output.text_embeds}


def nearness(model, teacher: CLIPModel, pairs: Pairs) -> dict[str, float]:
    """Mean cosine of a student's embeddings and the teacher's, by tower."""
    ours, theirs = embeddings(model, pairs), embeddings(teacher, pairs)
    return {name: F.cosine_similarity(ours[name], theirs[name]).mean().item() for name in TOWERS}


@torch.no_grad()
def streams(model: CLIPModel, tower: str, pairs: Pairs) -> list[torch.Tensor]:
    """A tower's residual stream in front of its layers and behind each."""
    tower = Tower(model, tower)
    stream = tower.embed(pairs)
    found = [stream]
    for layer in tower.layers:
        stream = stream + layer.self_attn.out_proj(tower.attended(layer, stream))
        stream = stream + layer.mlp.fc2(tower.activated(layer, stream))
        found.append(stream)
    return found


def losses(mapper: WeightMapper, teacher: CLIPModel, tower: str, pairs: Pairs, behind: list[int]) -> list[float]:
    """
    The share of the teacher's stream behind each of its first `behind` layers, as the student's axes show it, that
    the student's stream misses behind the layer that stands for them; padding is left out.
    """
    residual = mapper.operators[f"{tower}_residual"]().detach()
    ours, theirs = streams(mapper.export(), tower, pairs), streams(folded(teacher), tower, pairs)
    of_tower = Tower(teacher, tower)
    counted = token_weights(of_tower, pairs, theirs[0]) > 0
    shares = []
    for mine, index in zip(ours, [0, *behind], strict=True):
        wanted = theirs[index] @ residual.T
        shares.append(((mine - wanted)[counted].norm() / wanted[counted].norm()).item())
    return shares


@torch.no_grad()
def plain(teacher: CLIPModel) -> CLIPModel:
    """A copy whose `pre_layrnorm` has one scale for all channels, and whose final norms have no shift."""
    teacher = copy.deepcopy(teacher)
    teacher.vision_model.pre_layrnorm.weight.fill_(1.3)
    for norm in (teacher.vision_model.post_layernorm, teacher.text_model.final_layer_norm):
        norm.bias.zero_()
    return teacher


@torch.no_grad()
def frugal(teacher: CLIPModel, width: int = 32, seed: int = 0) -> CLIPModel:
    """
    A plain copy that makes use of so few axes, heads and neurons that a student of `width` can do the same: whatever
    writes its streams stays within `width - 1` axes of mean zero, and only `width / 16` heads and `4 width` neurons of
    each layer, drawn at random, write anything.
    """
    teacher, generator = plain(teacher), torch.Generator().manual_seed(seed)
    for name in TOWERS:
        tower = getattr(teacher, f"{name}_model")
        big = getattr(teacher.config, f"{name}_config").hidden_size
        basis = torch.randn(big, width - 1, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q
        within = (basis @ basis.T).float()
        writers = [one for layer in tower.encoder.layers for one in (layer.self_attn.out_proj, layer.mlp.fc2)]
        for writer in writers:
            writer.weight.copy_(within @ writer.weight)
            writer.bias.copy_(within @ writer.bias)
            kept, size = (width // 16, 16) if writer.in_features == big else (4 * width, 1)
            used = torch.zeros(writer.in_features // size)
            used[torch.randperm(len(used), generator=generator)[:kept]] = 1
            writer.weight.mul_(used.repeat_interleave(size))
        tables = [tower.embeddings.position_embedding.weight]
        if name == "text":
            tables.append(tower.embeddings.token_embedding.weight)
        else:
            patches = tower.embeddings.patch_embedding.weight
            patches.copy_(torch.einsum("ab,bcij->acij", within, patches))
            tables += [tower.embeddings.class_embedding, tower.pre_layrnorm.bias]
        for table in tables:
            table.copy_(table @ within)
    return teacher
