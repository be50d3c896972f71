import copy
import dataclasses

import pytest
import torch
from transformers import AutoModel, CLIPModel, MetaClip2Model, PreTrainedModel

from clipmap_hf.config import ClipMapConfig, ResNetTowerConfig, TowerConfig
from clipmap_hf.families import CHINESE_CLIP, CLIP, FAMILIES, SIGLIP, TensorRule, family_for
from clipmap_hf.starts import start_mapper


HALF = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=2)
)


@pytest.fixture
def models(shared_teacher, metaclip2, siglip, chinese_clip, deep_clip_resnet) -> dict[str, PreTrainedModel]:
    """A model of each type that a table describes."""
    found = (shared_teacher, metaclip2, siglip, chinese_clip, deep_clip_resnet)
    return {model.config.model_type: model for model in found}


def half(model: PreTrainedModel) -> ClipMapConfig:
    """About half of a model's width."""
    is_resnet = not family_for(model.config).transformers
    return dataclasses.replace(HALF, vision=ResNetTowerConfig(width=2)) if is_resnet else HALF


def test_every_family_is_tested(models):
    assert set(models) == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_tensor_of_a_family_matches_exactly_one_rule(model_type, models):
    model = models[model_type]
    family, tensors = family_for(model.config), model.state_dict()
    specs = family.specs(tensors, model.config)
    assert set(specs) == set(tensors)
    for name in tensors:
        assert specs[name].name(specs[name].layer) == name
    unused = {rule.pattern for rule in family.rules} - {spec.rule.pattern for spec in specs.values()}
    assert not unused


@pytest.mark.parametrize("initializer", ["diagonal", "xavier"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_mapped_model_does_what_its_export_does(model_type, models, initializer, tiny_batch):
    model = models[model_type]
    mapper = start_mapper(model, dataclasses.replace(half(model), initializer=initializer)).eval()
    exported = mapper.export().requires_grad_(
        False
    )  # torch reads a fused in_proj otherwise, if it may need a gradient
    assert type(exported) is type(model)
    with torch.no_grad():
        mapped, expected = mapper(**tiny_batch), exported(**tiny_batch)
    torch.testing.assert_close(mapped.image_embeds, expected.image_embeds, atol=0, rtol=0)
    torch.testing.assert_close(mapped.text_embeds, expected.text_embeds, atol=0, rtol=0)
    torch.testing.assert_close(mapped.logits_per_image, expected.logits_per_image, atol=0, rtol=0)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_model_of_the_same_size_is_the_teacher(model_type, models):
    exported = start_mapper(models[model_type], ClipMapConfig()).export()
    torch.testing.assert_close(dict(exported.state_dict()), dict(models[model_type].state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_square_operators_change_nothing(model_type, models, tiny_batch):
    """Narrower by one neuron that does nothing: both towers go through operators, and come out as they went in."""
    model = copy.deepcopy(models[model_type])
    widths = {}
    for name in ("vision", "text"):
        if hasattr(tower := getattr(model.config, f"{name}_config"), "intermediate_size"):
            widths[name] = tower.intermediate_size - 1
    for name, tensor in model.state_dict().items():
        if {"ffn.in", "pool_ffn.in"} & set(family_for(model.config).match(name).rule.axes):
            tensor[:, -1] = 0
    config = ClipMapConfig(**{name: TowerConfig(intermediate_size=width) for name, width in widths.items()})
    exported = start_mapper(model, config).export()
    with torch.no_grad():
        found, expected = exported(**tiny_batch), model(**tiny_batch)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds, atol=1e-6, rtol=0)


def test_a_spec_says_tower_layer_and_kind():
    spec = CLIP.match("text_model.encoder.layers.11.mlp.fc2.weight")
    assert (spec.tower, spec.layer, spec.kind) == ("text", 11, "text_model.encoder.layers.*.mlp.fc2.weight")
    assert spec.rule.axes == ("residual", "ffn.in")
    assert CLIP.match("visual_projection.weight").tower == "vision"
    assert CLIP.match("logit_scale").tower is None


@pytest.mark.parametrize("family", [CHINESE_CLIP, CLIP, SIGLIP], ids=lambda family: family.name)
def test_every_space_of_the_table_has_a_size(family, models):
    spaces = {space for rule in family.rules for space in rule.axes if space is not None}
    written = {space for space in spaces if not space.endswith(".in")}
    assert {space.removesuffix(".in") for space in spaces} == written == {*family.spaces, *family.shared_spaces}
    for space in spaces:
        assert family.size(space, "text", models[family.model_types[0]].config) in (48, 192, 32, 64)


def test_an_exported_metaclip2_is_loaded_by_transformers(metaclip2, tmp_path):
    exported = start_mapper(metaclip2, HALF).export()
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
    message = r"'clip_vision_model' are not supported; supported are \['chinese_clip', 'clip', 'clip_resnet', 'meta"
    with pytest.raises(ValueError, match=message):
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
