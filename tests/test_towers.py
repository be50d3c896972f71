"""A tower in steps computes what the model computes."""

import pytest
import torch
from conftest import CLIP_KINDS, clip_of_kind
from transformers import CLIPModel

from clipmap_hf.models.towers import Tower


@pytest.fixture(params=CLIP_KINDS)
def model(tiny_config, tiny_tokenizer, request) -> CLIPModel:
    return clip_of_kind(tiny_config(), request.param)


@torch.no_grad()
def run(tower: Tower, batch) -> torch.Tensor:
    stream = tower.embed(batch)
    for layer in tower.layers:
        stream = stream + layer.self_attn.out_proj(tower.attended(layer, stream))
        stream = stream + layer.mlp.fc2(tower.activated(layer, stream))
    return tower.embeds(stream, tower.ends(batch))


@torch.no_grad()
def test_the_steps_of_the_vision_tower_give_the_models_embeddings(model, tiny_batch):
    expected = model.get_image_features(pixel_values=tiny_batch["pixel_values"]).pooler_output
    torch.testing.assert_close(run(Tower(model, "vision"), tiny_batch), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_steps_of_the_text_tower_give_the_models_embeddings_of_padded_captions(model, tiny_batch):
    ids, mask = tiny_batch["input_ids"], tiny_batch["attention_mask"]
    assert (mask == 0).any()
    expected = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(run(Tower(model, "text"), tiny_batch), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_count_up_to_the_end(model, tiny_batch):
    tower = Tower(model, "text")
    assert torch.equal(tower.counts(tiny_batch, tower.embed(tiny_batch)), tiny_batch["attention_mask"].bool())
    tower = Tower(model, "vision")
    assert tower.counts(tiny_batch, tower.embed(tiny_batch)).all()
