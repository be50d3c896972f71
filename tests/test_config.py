import copy
import json

import pytest
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import PRESETS, ClipMapConfig, ResNetTowerConfig, TowerConfig, presets_of, student_config
from clipmap_hf.config.names import DEPTH_NAMES, START_NAMES
from clipmap_hf.mapping.depth import DEPTH_RULES
from clipmap_hf.starts import STARTS


@pytest.fixture(scope="module")
def vit_b_16() -> CLIPConfig:
    """ViT-B/16 with values that differ from the defaults of `CLIPConfig`."""
    return CLIPConfig(
        vision_config={"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_dropout": 0.1},
        text_config={"hidden_act": "gelu", "eos_token_id": 2, "pad_token_id": 0, "layer_norm_eps": 1e-6},
        logit_scale_init_value=3.0,
    )


def sizes(tower) -> tuple[int, int, int, int]:
    return tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers, tower.num_attention_heads


@pytest.mark.parametrize(
    ("preset", "vision", "text"),
    [
        ("base", (512, 2048, 12, 8), (512, 2048, 6, 8)),
        ("small", (256, 1024, 10, 4), (256, 1024, 3, 4)),
        ("tiny", (128, 512, 4, 2), (128, 512, 2, 2)),
    ],
)
def test_presets_of_vit_b_16_have_the_papers_sizes(vit_b_16, preset, vision, text):
    student = student_config(vit_b_16, PRESETS[preset])
    assert sizes(student.vision_config) == vision
    assert sizes(student.text_config) == text
    assert student.projection_dim == 512


def test_every_preset_is_tested_here():
    """Those of ResNets in tests/test_clip_resnet_student.py."""
    assert presets_of(TowerConfig) == ["base", "small", "tiny"]
    assert presets_of(ResNetTowerConfig) == ["resnet-30m", "resnet-19m"]
    assert len(PRESETS) == 5


def test_everything_but_the_sizes_is_kept(vit_b_16):
    resized = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    student = student_config(vit_b_16, PRESETS["tiny"]).to_dict()
    teacher = vit_b_16.to_dict()
    for tower in ("vision_config", "text_config"):
        changed = {key for key in teacher[tower] if student[tower][key] != teacher[tower][key]}
        assert changed == resized
        assert student[tower].keys() == teacher[tower].keys()
        del student[tower], teacher[tower]
    assert student == teacher


def test_the_teachers_config_stays_as_it_is(vit_b_16):
    before = copy.deepcopy(vit_b_16.to_dict())
    student = student_config(vit_b_16, ClipMapConfig(vision=TowerConfig(hidden_size=64), projection_dim=100))
    student.text_config.vocab_size = 7
    assert vit_b_16.to_dict() == before


def test_a_config_that_says_nothing_is_the_teachers(vit_b_16):
    assert student_config(vit_b_16, ClipMapConfig()).to_dict() == vit_b_16.to_dict()


def test_projection_dim_is_set_in_all_three_configs(vit_b_16):
    student = student_config(vit_b_16, ClipMapConfig(projection_dim=256))
    assert student.projection_dim == 256
    assert student.vision_config.projection_dim == student.text_config.projection_dim == 256


def test_ffn_keeps_its_ratio_unless_given(tiny_config):
    teacher = tiny_config(vision={"intermediate_size": 160})  # 2.5 times the width
    assert student_config(teacher, ClipMapConfig(vision=TowerConfig(32))).vision_config.intermediate_size == 80
    given = ClipMapConfig(vision=TowerConfig(hidden_size=32, intermediate_size=100, num_attention_heads=2))
    assert sizes(student_config(teacher, given).vision_config) == (32, 100, 4, 2)


def test_a_student_config_builds_a_model(tiny_config):
    student = student_config(tiny_config(), ClipMapConfig(text=TowerConfig(16, 40, 1, 1), projection_dim=24))
    model = CLIPModel(student)
    assert model.text_projection.weight.shape == (24, 16)
    assert len(model.text_model.encoder.layers) == 1


BAD_SIZES = {  # of a text tower 48 wide, heads 16 wide, FFN 192, 3 layers
    "between two heads": (TowerConfig(hidden_size=40), r"text\.hidden_size=40 is not .* head width 16.*pick 32 or 48"),
    "below a head": (TowerConfig(hidden_size=8), r"text\.hidden_size=8 is not .*; pick 16, or give text\.num_att"),
    "wider": (TowerConfig(hidden_size=64), r"text\.hidden_size=64 must be an integer from 1 to the teacher's 48"),
    "no width": (TowerConfig(hidden_size=0), r"text\.hidden_size=0 must be an integer from 1"),
    "negative width": (TowerConfig(hidden_size=-16), r"text\.hidden_size=-16 must be an integer from 1"),
    "deeper": (TowerConfig(num_hidden_layers=4), r"text\.num_hidden_layers=4 must be .* to the teacher's 3"),
    "no layers": (TowerConfig(num_hidden_layers=0), r"text\.num_hidden_layers=0 must be an integer from 1"),
    "half a layer": (TowerConfig(num_hidden_layers=1.5), r"text\.num_hidden_layers=1\.5 must be an integer"),
    "wider FFN": (TowerConfig(intermediate_size=193), r"text\.intermediate_size=193 must be .* the teacher's 192"),
    "no FFN": (TowerConfig(intermediate_size=0), r"text\.intermediate_size=0 must be an integer from 1"),
    "negative FFN": (TowerConfig(intermediate_size=-4), r"text\.intermediate_size=-4 must be an integer from 1"),
    "wrong heads": (TowerConfig(32, num_attention_heads=5), r"heads=5 does not fit text\.hidden_size=32.*\[2, 4, 8"),
    "wide heads": (TowerConfig(32, num_attention_heads=1), r"heads=1 .* no wider than the teacher's 16"),
    "no heads": (TowerConfig(num_attention_heads=0), r"num_attention_heads=0 does not fit text\.hidden_size=48"),
    "half a head": (TowerConfig(num_attention_heads=4.5), r"num_attention_heads=4\.5 does not fit"),
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_a_tower_that_cannot_be_cut_is_an_error_that_says_what_can(tiny_config, name):
    text, message = BAD_SIZES[name]
    with pytest.raises(ValueError, match=message):
        student_config(tiny_config(), ClipMapConfig(text=text))


@pytest.mark.parametrize("projection_dim", [0, -1, 33, 16.5, "16"])
def test_an_impossible_projection_dim_is_an_error(tiny_config, projection_dim):
    with pytest.raises(ValueError, match="projection_dim=.* must be an integer from 1 to the teacher's 32"):
        student_config(tiny_config(), ClipMapConfig(projection_dim=projection_dim))


@pytest.mark.parametrize("key", ["depth_per", "decay_towards"])
def test_an_unknown_choice_is_an_error_that_lists_the_allowed(key):
    allowed = {"depth_per": r"\['tower', 'kind'\]", "decay_towards": r"\['initial', 'zero'\]"}[key]
    with pytest.raises(ValueError, match=f"{key}='layer' is unknown; allowed are {allowed}"):
        ClipMapConfig(**{key: "layer"})


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("value", [{"hidden_size": 32}, None, 32], ids=["dict", "None", "int"])
def test_a_tower_that_is_no_tower_config_is_an_error(tower, value):
    with pytest.raises(TypeError, match=rf"{tower} must be a TowerConfig.*, got {type(value).__name__}"):
        ClipMapConfig(**{tower: value})


IRREGULAR = ClipMapConfig(
    vision=TowerConfig(32, 100, 2, 2),
    text=TowerConfig(num_hidden_layers=1),
    projection_dim=16,
    initializer="xavier",
    depth="spread",
    depth_per="kind",
    tie_ffn=True,
    decay_towards="zero",
    seed=7,
)


@pytest.mark.parametrize("config", [*PRESETS.values(), IRREGULAR], ids=[*PRESETS, "irregular"])
def test_a_config_goes_through_json_and_back(config):
    assert ClipMapConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_leaves_its_argument_as_it_is():
    values = IRREGULAR.to_dict()
    ClipMapConfig.from_dict(values)
    assert values == IRREGULAR.to_dict()


def test_keys_that_are_left_out_have_their_defaults():
    assert ClipMapConfig.from_dict({}) == ClipMapConfig()
    assert ClipMapConfig.from_dict({"text": {"hidden_size": 16}}).text == TowerConfig(hidden_size=16)


def test_an_unknown_key_is_an_error_that_lists_the_allowed():
    with pytest.raises(
        ValueError, match=r"Unknown keys \['initialiser'\] for ClipMapConfig; allowed are .*'initializer'"
    ):
        ClipMapConfig.from_dict({"initialiser": "diagonal"})


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_an_unknown_key_of_a_tower_is_an_error_that_lists_the_allowed(tower):
    with pytest.raises(ValueError, match=r"Unknown keys \['depth'\] for TowerConfig; allowed are .*'hidden_size'"):
        ClipMapConfig.from_dict({tower: {"depth": 32}})


def test_the_size_of_a_resnet_comes_back():
    config = ClipMapConfig(vision=ResNetTowerConfig(width=44, layers=[3, 4, 6, 3]), text=TowerConfig(hidden_size=256))
    assert ClipMapConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"Unknown keys \['width'\] for TowerConfig"):
        ClipMapConfig.from_dict({"text": {"width": 44}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"initializer": "svd"},
            r"initializer='svd' is unknown; allowed are \['calibrated', 'calibrated_whole', 'diagonal', 'importance'",
        ),
        (
            {"depth": "last"},
            r"depth='last' is unknown; allowed are \['interval_front', 'spread'",
        ),
        ({"refit_steps": -1}, "refit_steps=-1 must be an integer of at least 0"),
        ({"refit_steps": 2.5}, "refit_steps=2.5 must be an integer of at least 0"),
    ],
)
def test_unknown_names_and_negative_steps_are_refused_when_a_config_is_made(values, message):
    with pytest.raises(ValueError, match=message):
        ClipMapConfig(**values)


def test_the_names_of_a_config_are_those_of_the_functions():
    assert set(START_NAMES) == set(STARTS)
    assert set(DEPTH_NAMES) == {*DEPTH_RULES, *(start.depth_rule for start in STARTS.values())} - {None}
