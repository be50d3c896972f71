import dataclasses

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.costs.cost import Cost, cost_table, model_cost, with_bytes_of
from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.model import pack_model


def vit_b_16(vision: tuple[int, int] = (768, 12), text: tuple[int, int] = (512, 12)) -> CLIPConfig:
    """ViT-B/16 resized to (width, depth) per tower: heads of width 64, feed-forward four times as wide."""
    sizes = [
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": width // 64,
        }
        for width, depth in (vision, text)
    ]
    return CLIPConfig(vision_config=sizes[0] | {"patch_size": 16}, text_config=sizes[1])


@pytest.mark.parametrize(
    ("vision", "text", "parameters", "gigamacs"),
    [
        ((768, 12), (512, 12), 149_620_737, (17.56, 2.98)),
        ((512, 12), (512, 6), 83_101_185, (7.99, 1.49)),
        ((256, 10), (256, 3), 23_446_017, (1.79, 0.19)),
        ((128, 4), (128, 2), 7_779_201, (0.21, 0.03)),
    ],
    ids=["teacher", "base", "small", "tiny"],
)
def test_cost_of_the_papers_models(vision, text, parameters, gigamacs):
    cost = model_cost(vit_b_16(vision, text))
    assert cost.parameters == parameters
    assert (round(cost.vision_macs / 1e9, 2), round(cost.text_macs / 1e9, 2)) == gigamacs
    assert cost.token_embedding_parameters == 49408 * text[0]


def test_vit_b_16_is_the_default_config_with_patches_of_16():
    config = CLIPConfig()
    config.vision_config.patch_size = 16
    assert model_cost(config) == model_cost(vit_b_16())


def tower_macs(tokens: int, width: int, ffn: int, layers: int) -> int:
    projections, attention, feed_forward = 4 * tokens * width**2, 2 * tokens**2 * width, 2 * tokens * width * ffn
    return layers * (projections + attention + feed_forward)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_macs_equal_the_formula(tiny_config, attention):
    config = tiny_config()
    config._attn_implementation = attention
    cost = model_cost(config)
    patches = 16 * 64 * (3 * 8 * 8)
    assert cost.vision_macs == patches + tower_macs(17, 64, 256, 4) + 64 * 32
    assert cost.text_macs == tower_macs(16, 48, 192, 3) + 48 * 32
    assert cost.macs == cost.vision_macs + cost.text_macs


def test_parameters_are_those_of_the_built_model(tiny_config):
    cost, model = model_cost(tiny_config()), CLIPModel(tiny_config())
    embedding = model.text_model.embeddings.token_embedding.weight.numel()
    assert cost.parameters == model.num_parameters()
    assert cost.parameters_without_token_embedding == model.num_parameters() - embedding


def test_bytes_are_those_of_the_tensors_in_the_file(tiny_config, teacher_folder):
    with safe_open(teacher_folder / "model.safetensors", "pt") as file:
        written = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a dict)
    assert model_cost(tiny_config()).bytes == written
    assert model_cost(tiny_config(), torch.float16).bytes == written // 2


def test_packed_models_cost_the_bytes_of_their_file(tiny_teacher, tmp_path):
    packed = pack_model(tiny_teacher, TernaryConfig())
    packed.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a dict)
    cost = with_bytes_of(model_cost(packed.config), packed)
    assert cost == dataclasses.replace(model_cost(tiny_teacher.config), bytes=written)
    assert cost.bytes < model_cost(tiny_teacher.config).bytes / 2


def test_cost_leaves_the_config_as_it_is(tiny_config):
    config = tiny_config()
    before = (config.to_dict(), config._attn_implementation)
    model_cost(config)
    assert (config.to_dict(), config._attn_implementation) == before


def test_half_precision_checkpoints_cost_the_same(tiny_config):
    config = tiny_config()
    config.dtype = torch.float16
    assert model_cost(config) == model_cost(tiny_config())


def test_a_cost_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cost(1, 1, 1, 1, 4).parameters = 2


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_of_large_models_is_in_millions_and_gigamacs():
    teacher = Cost(149_620_737, 25_296_896, 17_563_453_440, 2_979_770_368, 598_482_948)
    student = Cost(7_779_201, 6_324_224, 214_000_640, 33_378_816, 31_116_804)
    table = cost_table({"ViT-B/16": teacher, "tiny": student})
    header, _, first, second = cells(table)
    assert header == [
        "model",
        "parameters (M)",
        "without token embedding (M)",
        "vision MACs (G)",
        "text MACs (G)",
        "weights (MB)",
        "parameters kept",
    ]
    assert first == ["ViT-B/16", "149.62", "124.32", "17.56", "2.98", "598.48", "100.0%"]
    assert second == ["tiny", "7.78", "1.45", "0.21", "0.03", "31.12", "5.2%"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_table_of_toy_models_is_in_megamacs():
    header, _, row = cells(cost_table({"toy": Cost(1_000_000, 250_000, 17_300_000, 5_100_000, 4_000_000)}))
    assert header[3:5] == ["vision MACs (M)", "text MACs (M)"]
    assert row == ["toy", "1.00", "0.75", "17.30", "5.10", "4.00", "100.0%"]


def test_table_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="costs is empty"):
        cost_table({})
