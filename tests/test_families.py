import dataclasses

import pytest
import torch
from conftest import randomize
from transformers import AutoModel, CLIPModel, MetaClip2Config, MetaClip2Model

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.families import CLIP, FAMILIES, TensorRule, family_for
from clipmap_hf.mapping.mapper import WeightMapper


HALF = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=2)
)


@pytest.fixture(scope="module")
def metaclip2(tiny_config) -> MetaClip2Model:
    """A random MetaCLIP 2 of the tiny teacher's size, in eval mode."""
    config = tiny_config()
    drop = ("model_type", "transformers_version")
    towers = {
        name: {key: value for key, value in getattr(config, name).to_dict().items() if key not in drop}
        for name in ("vision_config", "text_config")
    }
    return randomize(MetaClip2Model(MetaClip2Config(**towers, projection_dim=config.projection_dim))).eval()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_tensor_of_a_family_matches_exactly_one_rule(model_type, shared_teacher, metaclip2):
    model = {"clip": shared_teacher, "metaclip_2": metaclip2}[model_type]
    family, tensors = family_for(model.config), model.state_dict()
    specs = family.specs(tensors, model.config)
    assert set(specs) == set(tensors)
    for name in tensors:
        assert specs[name].name(specs[name].layer) == name
    unused = {rule.pattern for rule in family.rules} - {spec.rule.pattern for spec in specs.values()}
    assert not unused


def test_a_spec_says_tower_layer_and_kind():
    spec = CLIP.match("text_model.encoder.layers.11.mlp.fc2.weight")
    assert (spec.tower, spec.layer, spec.kind) == ("text", 11, "text_model.encoder.layers.*.mlp.fc2.weight")
    assert spec.rule.axes == ("residual", "ffn.in")
    assert CLIP.match("visual_projection.weight").tower == "vision"
    assert CLIP.match("logit_scale").tower is None


def test_every_space_of_the_table_has_a_size(shared_teacher):
    spaces = {space for rule in CLIP.rules for space in rule.axes if space is not None}
    written = {space for space in spaces if not space.endswith(".in")}
    assert {space.removesuffix(".in") for space in spaces} == written == {*CLIP.spaces, *CLIP.shared_spaces}
    for space in spaces:
        assert CLIP.size(space, "text", shared_teacher.config) in (48, 192, 32)


def test_metaclip2_is_mapped_and_exported(metaclip2, tiny_batch):
    mapper = WeightMapper(metaclip2, HALF).eval()
    exported = mapper.export()
    assert type(exported) is MetaClip2Model
    with torch.no_grad():
        mapped, expected = mapper(**tiny_batch), exported(**tiny_batch)
    torch.testing.assert_close(mapped.image_embeds, expected.image_embeds, atol=0, rtol=0)
    torch.testing.assert_close(mapped.text_embeds, expected.text_embeds, atol=0, rtol=0)


def test_metaclip2_of_the_same_size_is_the_teacher(metaclip2, tiny_batch):
    mapper = WeightMapper(metaclip2, ClipMapConfig()).eval()
    with torch.no_grad():
        mapped, expected = mapper(**tiny_batch), metaclip2(**tiny_batch)
    torch.testing.assert_close(mapped.image_embeds, expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(mapped.text_embeds, expected.text_embeds, atol=1e-6, rtol=0)


def test_an_exported_metaclip2_is_loaded_by_transformers(metaclip2, tmp_path):
    exported = WeightMapper(metaclip2, HALF).export()
    exported.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MetaClip2Model
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)


def test_an_unknown_tensor_is_an_error_that_names_it(shared_teacher):
    tensors = {**shared_teacher.state_dict(), "vision_model.register_tokens": torch.zeros(4, 64)}
    with pytest.raises(ValueError, match=r"'vision_model\.register_tokens' matches 0 rules of the family 'clip'"):
        CLIP.specs(tensors, shared_teacher.config)


def test_a_tensor_that_matches_two_rules_is_an_error_that_names_it(shared_teacher):
    ambiguous = dataclasses.replace(CLIP, rules=(*CLIP.rules, TensorRule(r"visual_.*", ("embed", None))))
    with pytest.raises(ValueError, match=r"'visual_projection\.weight' matches 2 rules"):
        ambiguous.specs(shared_teacher.state_dict(), shared_teacher.config)


@pytest.mark.parametrize("shape", [(48, 47), (47, 48), (48,), (48, 48, 1)], ids=str)
def test_a_tensor_of_a_wrong_shape_is_an_error_that_names_it(shared_teacher, shape):
    name = "text_model.encoder.layers.1.self_attn.q_proj.weight"
    tensors = {**shared_teacher.state_dict(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        CLIP.specs(tensors, shared_teacher.config)
    assert str(shape) in str(error.value)


def test_a_family_without_a_table_is_an_error_that_lists_those_with_one(tiny_config):
    vision_only = tiny_config().vision_config
    with pytest.raises(
        ValueError, match=r"'clip_vision_model' are not supported; supported are \['clip', 'metaclip_2'"
    ):
        family_for(vision_only)


def test_tensors_of_a_kind_differ_in_their_layer_only(shared_teacher: CLIPModel):
    specs = CLIP.specs(shared_teacher.state_dict(), shared_teacher.config)
    layers = {}
    for spec in specs.values():
        layers.setdefault((spec.tower, spec.kind), []).append(spec.layer)
    for (tower, kind), found in layers.items():
        if "*" in kind:
            assert found == list(range({"vision": 4, "text": 3}[tower]))
        else:
            assert found == [None]
