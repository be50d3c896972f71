"""Folding changes a teacher's weights and nothing of what it computes."""

import copy

import pytest
import torch
from conftest import randomize
from transformers import CLIPModel

from clipmap_hf.families import CLIP
from clipmap_hf.mapping.fold import fold


@pytest.fixture(params=["gelu", "quick_gelu"])
def teacher(tiny_config, request) -> CLIPModel:
    config = tiny_config()
    for tower in (config.vision_config, config.text_config):
        tower.hidden_act = request.param
    return randomize(CLIPModel(config)).eval()


def folded(model: CLIPModel) -> CLIPModel:
    other = copy.deepcopy(model)
    other.load_state_dict(fold(model.state_dict(), CLIP), strict=True)
    return other


@torch.no_grad()
def test_both_towers_compute_the_same(teacher, tiny_batch):
    expected, given = (model(**tiny_batch) for model in (teacher, folded(teacher)))
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(given[name], expected[name], atol=1e-5, rtol=1e-5)


def test_norms_are_plain_readers_and_writers_without_mean(teacher):
    weights = folded(teacher).state_dict()
    for name, tensor in weights.items():
        if "layer_norm1" in name or "layer_norm2" in name:
            assert (tensor == (1 if name.endswith("weight") else 0)).all(), name
        if name.endswith(("post_layernorm.weight", "final_layer_norm.weight")):
            assert (tensor == 1).all(), name
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")):
            torch.testing.assert_close(tensor.mean(dim=1), torch.zeros(len(tensor)), atol=1e-6, rtol=0)
        if name.endswith(("out_proj.weight", "fc2.weight", "out_proj.bias", "fc2.bias")):
            torch.testing.assert_close(tensor.mean(dim=0), torch.zeros_like(tensor[0]), atol=1e-6, rtol=0)
    tokens = weights["text_model.embeddings.token_embedding.weight"]
    torch.testing.assert_close(tokens.mean(dim=1), torch.zeros(len(tokens)), atol=1e-6, rtol=0)
    for name in ("vision_model.pre_layrnorm.weight", "vision_model.embeddings.patch_embedding.weight"):
        assert torch.equal(weights[name], teacher.state_dict()[name])


@torch.no_grad()
@pytest.mark.parametrize("norm", ["vision_model.post_layernorm", "text_model.final_layer_norm"])
def test_a_channel_that_a_final_norm_switches_off_keeps_its_shift(teacher, tiny_batch, norm):
    teacher.get_submodule(norm).weight[3] = 0.0
    expected, given = (model(**tiny_batch) for model in (teacher, folded(teacher)))
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(given[name], expected[name], atol=1e-5, rtol=1e-5)


def test_folding_again_changes_nothing(teacher):
    once = fold(teacher.state_dict(), CLIP)
    for name, tensor in fold(once, CLIP).items():
        torch.testing.assert_close(tensor, once[name], atol=1e-6, rtol=1e-6)


def test_the_given_tensors_stay(teacher):
    before = copy.deepcopy(teacher.state_dict())
    fold(teacher.state_dict(), CLIP)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
