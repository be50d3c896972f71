"""How many heads a student has, and what each start makes of heads that are narrower than the teacher's."""

import copy
import dataclasses

import pytest
import torch
from calibrated_starts import NARROW, TOWERS, losses, nearness, plain, random_pairs, split, started
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import PRESETS, ClipMapConfig, TowerConfig, student_config
from clipmap_hf.config.heads import shown_heads
from clipmap_hf.costs.cost import CostReport
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.shapes import choose_shape
from clipmap_hf.starts import STARTS, start_mapper
from clipmap_hf.starts.calibrated.choice import explained, most_needed
from clipmap_hf.starts.calibrated.heads import narrow_scores, narrow_values
from clipmap_hf.starts.calibrated.moments import Moments
from clipmap_hf.training.stages.masking import MaskingStage


# All heads of the tiny teacher (vision 64 with 4 heads of 16, text 48 with 3) in half its width.
HALF = ClipMapConfig(TowerConfig(32, num_attention_heads=4), TowerConfig(24, num_attention_heads=3))
NARROWING = sorted(name for name, start in STARTS.items() if start.narrows)


def tower(width: int, depth: int, heads: int, ffn: int) -> dict:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": ffn}


TEACHERS = {
    "ViT-B/16": (tower(768, 12, 12, 3072), tower(512, 12, 8, 2048)),
    "ViT-L/14": (tower(1024, 24, 16, 4096), tower(768, 12, 12, 3072)),
    "ViT-H/14": (tower(1280, 32, 16, 5120), tower(1024, 24, 16, 4096)),
    "ViT-g/14": (tower(1408, 40, 16, 6144), tower(1024, 24, 16, 4096)),
    "ViT-bigG/14": (tower(1664, 48, 16, 8192), tower(1280, 32, 20, 5120)),
}


def teacher_of(name: str) -> CLIPConfig:
    vision, text = TEACHERS[name]
    return CLIPConfig(vision_config=vision, text_config=text)


def heads_of(teacher: CLIPConfig, config: ClipMapConfig) -> tuple[int, int]:
    student = student_config(teacher, config)
    return student.vision_config.num_attention_heads, student.text_config.num_attention_heads


# How many


@pytest.mark.parametrize(
    ("name", "small", "base"),
    [
        ("ViT-B/16", (4, 4), (8, 8)),
        ("ViT-L/14", (4, 4), (8, 8)),
        ("ViT-H/14", (16, 4), (16, 8)),  # heads of 80 divide neither 256 nor 512
        ("ViT-g/14", (16, 4), (16, 8)),
        ("ViT-bigG/14", (16, 4), (16, 8)),
    ],
)
@pytest.mark.parametrize("initializer", ["calibrated", "diagonal"])
def test_presets_have_whole_heads_where_the_width_allows_it(name, small, base, initializer):
    teacher = teacher_of(name)
    for preset, expected in (("small", small), ("base", base)):
        config = dataclasses.replace(PRESETS[preset], initializer=initializer)
        assert heads_of(teacher, config) == expected
        student = student_config(teacher, config)
        assert student.vision_config.hidden_size == config.vision.hidden_size


@pytest.mark.parametrize(
    ("width", "narrow", "whole"),
    [
        (768, 12, 12),
        (576, 12, 9),  # 48 wide
        (384, 12, 6),
        (192, 12, 3),  # 16 wide
        (256, 8, 4),  # 12 do not divide it; 16 would be more than the teacher has
        (448, 8, 7),  # 14 would be nearer
        (640, 10, 10),
        (64, 4, 1),
        (200, 5, 5),  # no multiple of 64
    ],
)
def test_heads_are_as_many_as_the_teachers_or_as_wide(width, narrow, whole):
    teacher = teacher_of("ViT-B/16")
    config = ClipMapConfig(vision=TowerConfig(width))
    for rule, expected in (("narrow", narrow), ("whole", whole)):
        assert heads_of(teacher, dataclasses.replace(config, heads=rule))[0] == expected
    assert heads_of(teacher, dataclasses.replace(config, initializer="calibrated"))[0] == narrow  # each for a layer
    for initializer in (None, "diagonal", "magnitude", "calibrated_whole"):
        assert heads_of(teacher, dataclasses.replace(config, initializer=initializer))[0] == whole


@pytest.mark.parametrize(
    ("width", "layers", "every"),
    [
        (768, 12, 12),
        (768, 7, 12),  # the first of which stand for single layers
        (768, 6, 24),
        (768, 4, 32),  # of 36, which do not divide it
        (384, 6, 24),  # 16 wide
        (384, 3, 24),
        (576, 6, 24),
    ],
)
def test_a_layer_that_stands_for_several_has_the_heads_of_all(width, layers, every):
    teacher = teacher_of("ViT-B/16")
    config = ClipMapConfig(vision=TowerConfig(width, None, layers), initializer="calibrated")
    assert heads_of(teacher, config)[0] == heads_of(teacher, dataclasses.replace(config, heads="all"))[0] == every
    for changes in ({"heads": "narrow"}, {"refit": False}, {"depth": "similarity"}):
        assert heads_of(teacher, dataclasses.replace(config, **changes))[0] == 12


def test_heads_alone_are_those_of_the_teachers_width():
    teacher = teacher_of("ViT-B/16")
    config = ClipMapConfig(vision=TowerConfig(num_attention_heads=24))
    student = student_config(teacher, config).vision_config
    assert (student.hidden_size, student.num_attention_heads) == (768, 24)
    chosen = choose_shape(teacher, dataclasses.replace(config, budget={"params": "100M"})).config
    assert (chosen.vision.hidden_size, chosen.vision.num_attention_heads) == (768, 24)


def test_which_heads_a_student_has_is_said():
    teacher = teacher_of("ViT-B/16")
    student = student_config(teacher, ClipMapConfig(TowerConfig(384), TowerConfig(384), heads="narrow"))
    assert shown_heads(teacher, student) == (
        "Attention heads: vision 12 of 32 channels, as many as the teacher's; text 8 of 48 channels, as many as the "
        "teacher's."
    )
    student = student_config(teacher, ClipMapConfig(TowerConfig(256), TowerConfig(200)))
    note = shown_heads(teacher, student)
    assert "vision 4 of 64 channels, as wide as the teacher's" in note
    assert "text 5 of 40 channels, of the teacher's 8 heads of 64 channels" in note
    assert str(CostReport.of(teacher, student)).endswith(note)


# What starts make of it


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    pairs = split(random_pairs(shared_teacher.config, 64), 32)
    return [
        {**one, "attention_mask": torch.ones_like(one["input_ids"]), "image_of_text": torch.arange(32)}
        for one in pairs
    ]


@pytest.mark.parametrize("initializer", NARROWING)
def test_every_start_that_narrows_makes_a_student_that_can_be_mapped_on(shared_teacher, batches, initializer):
    config = dataclasses.replace(HALF, initializer=initializer, refit_steps=0)
    mapper = start_mapper(shared_teacher, config, batches if STARTS[initializer].reads_pairs else None)
    shapes = {name: operator().shape for name, operator in mapper.operators.items() if "depth" not in name}
    assert shapes == mapper.plan.operator_shapes()
    student = mapper.export()
    assert student.vision_model.encoder.layers[0].self_attn.head_dim == 8
    with torch.no_grad():
        assert student(**random_pairs(shared_teacher.config, 2)).logits_per_image.isfinite().all()
    again = WeightMapper.from_state(mapper.plan, mapper.plan.teacher_tensors(shared_teacher), mapper.state_dict())
    for name, tensor in again.export().state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name


def kept(mapper: WeightMapper, name: str) -> list[list[int]]:
    """What a one-hot operator keeps, by layer."""
    operator = mapper.operators[name]().detach()
    assert ((operator == 0) | (operator == 1)).all() and (operator.sum(dim=-1) == 1).all()
    return operator.argmax(dim=-1).tolist()


def test_diagonal_takes_the_first_channels_of_the_first_heads(shared_teacher):
    config = ClipMapConfig(TowerConfig(24, num_attention_heads=3), TowerConfig(32))
    mapper = start_mapper(shared_teacher, config)
    first = [*range(8), *range(16, 24), *range(32, 40)]
    for space in ("query", "key", "value"):
        assert kept(mapper, f"vision_{space}") == [first] * 4
        assert kept(mapper, f"text_{space}") == [list(range(32))] * 3  # whole heads


def test_a_selection_ranks_channels_within_the_heads_that_it_keeps(tiny_teacher):
    """By magnitude, checked against the plain weights."""
    config = ClipMapConfig(vision=TowerConfig(16, num_attention_heads=2), initializer="magnitude")
    found = kept(start_mapper(tiny_teacher, config), "vision_query")
    for layer, channels in zip(tiny_teacher.vision_model.encoder.layers, found, strict=True):
        attention, sums = layer.self_attn, 0
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            sums = sums + reader.weight.detach().double().square().sum(dim=1) + reader.bias.detach().double().square()
        sums = (sums + attention.out_proj.weight.detach().double().square().sum(dim=0)).unflatten(0, (4, 16))
        heads = sums.sum(dim=1).topk(2).indices.sort().values
        expected = [sorted((head * 16 + sums[head].topk(8).indices).tolist()) for head in heads.tolist()]
        assert channels == expected[0] + expected[1]


@pytest.mark.parametrize("family", ["siglip", "chinese_clip"])
@pytest.mark.parametrize("initializer", ["diagonal", "magnitude", "manual", "xavier"])
def test_heads_of_other_families_become_narrower_too(request, family, initializer):
    """The four of SigLIP's pooling head as well."""
    teacher = request.getfixturevalue(family)
    mapper = start_mapper(teacher, dataclasses.replace(HALF, initializer=initializer))
    student = mapper.export()
    assert student.vision_model.encoder.layers[0].self_attn.head_dim == 8
    pixels = torch.zeros(2, 3, teacher.config.vision_config.image_size, teacher.config.vision_config.image_size)
    with torch.no_grad():
        assert student.vision_model(pixels).pooler_output.isfinite().all()
    if family == "siglip" and initializer != "xavier":
        channels = mapper.operators["vision_pool"]().detach().argmax(dim=-1).unflatten(0, (4, 8))
        assert torch.equal(channels // 16, torch.arange(4)[:, None].expand(4, 8))  # of each head its own
        assert initializer == "magnitude" or torch.equal(channels % 16, torch.arange(8).expand(4, 8))


@pytest.mark.parametrize("initializer", sorted(set(STARTS) - set(NARROWING)))
def test_starts_of_whole_heads_refuse_narrower_ones(shared_teacher, batches, initializer):
    with pytest.raises(
        ValueError, match=rf"'{initializer}' keeps whole heads, 16 wide, but those of the vision .* 8 wide"
    ):
        start_mapper(shared_teacher, dataclasses.replace(HALF, initializer=initializer), batches)


def test_masks_refuse_narrower_heads(shared_teacher):
    teacher = copy.deepcopy(shared_teacher)  # which the stage freezes
    with pytest.raises(ValueError, match="Masks keep whole heads, 16 wide, but the student's have 8 channels"):
        MaskingStage(teacher, student=HALF, ramp_steps=1, teachers=[teacher], losses={"feature": 1.0})


def test_more_heads_than_the_teachers_are_those_of_several_layers(shared_teacher, batches):
    def asked(heads: int | None, initializer: str = "calibrated") -> ClipMapConfig:
        return ClipMapConfig(TowerConfig(None, None, 2, heads), initializer=initializer, refit_steps=0)

    pairs = random_pairs(shared_teacher.config, 32, seed=1)
    more, fewer = (start_mapper(shared_teacher, asked(heads), batches).export() for heads in (8, None))
    assert nearness(more, shared_teacher, pairs)["vision"] > nearness(fewer, shared_teacher, pairs)["vision"]
    with pytest.raises(ValueError, match=r"heads=16 is more than .*: 2 of the teacher's layers with 4 heads"):
        start_mapper(shared_teacher, asked(16), batches)
    with pytest.raises(ValueError, match=r"'diagonal' cannot make 8 heads of the vision tower's 4.*'calibrated'"):
        start_mapper(shared_teacher, asked(8, "diagonal"))


# Narrow heads of the calibrated start


@torch.no_grad()
def half_used(teacher: CLIPModel) -> CLIPModel:
    """A plain copy of which every head's queries, keys and values stay within 8 of 16 directions."""
    teacher, generator = plain(teacher), torch.Generator().manual_seed(0)
    for name in TOWERS:
        for layer in getattr(teacher, f"{name}_model").encoder.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                for rows, bias in zip(linear.weight.split(16), linear.bias.split(16), strict=True):
                    basis = torch.linalg.qr(torch.randn(16, 8, generator=generator)).Q
                    rows.copy_(basis @ basis.T @ rows)
                    bias.copy_(basis @ basis.T @ bias)
    return teacher


@pytest.mark.parametrize("refit", [False, True], ids=["mapped", "refitted"])
def test_narrow_heads_of_a_teacher_that_uses_half_their_channels_lose_less_than_fewer(shared_teacher, batches, refit):
    teacher, config = half_used(shared_teacher), dataclasses.replace(NARROW, refit=refit)
    others, lost = random_pairs(teacher.config, 32, seed=1), []
    for heads in (4, 2):
        mapper = started(teacher, dataclasses.replace(config, vision=TowerConfig(32, None, None, heads)), batches)
        lost.append(losses(mapper, teacher, "vision", others, [1, 2, 3, 4])[1:])
    most = 1.01 if refit else 1.0  # `out_proj`, solved anew, makes good what the other heads would have said here
    assert all(narrow < most * whole for narrow, whole in zip(*lost, strict=True)), lost


def spread_moments(count: int, width: int, seed: int) -> torch.Tensor:
    """Second moments of vectors of uneven energy."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 200, width, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(width)
    mixed = mixed @ torch.randn(count, width, width, generator=generator, dtype=torch.float64)
    return mixed.mT @ mixed / 200


def test_narrow_scores_are_the_nearest_of_their_rank():
    """Over independent queries and keys, against the singular values of the product (Eckart and Young)."""
    query, key = spread_moments(3, 6, seed=0), spread_moments(3, 6, seed=1)
    of_query, of_key = narrow_scores(query, key, 2)
    assert of_query.shape == of_key.shape == (3, 2, 6)
    scale = (2 / 6) ** 0.5  # of the student's scores, which are divided by the root of 2 instead of that of 6
    for index in range(3):
        product = of_query[index].T @ of_key[index] / scale - torch.eye(6)  # q' k' - q k, as a form of q and k
        error = torch.trace(query[index] @ product @ key[index] @ product.T)
        roots = [torch.linalg.cholesky(one[index]) for one in (query, key)]
        singular = torch.linalg.svdvals(roots[0].T @ roots[1])
        torch.testing.assert_close(error, singular[2:].square().sum(), rtol=1e-6, atol=0)


def test_narrow_values_tell_most_of_what_is_written():
    given = spread_moments(2, 6, seed=0)
    written = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    axes = narrow_values(given, written, 2)
    for index in range(2):
        seen = axes[index] @ given[index]  # (2, 6)
        guess = seen.T @ torch.linalg.solve(seen @ axes[index].T, seen)
        error = torch.trace(written[index] @ (given[index] - guess) @ written[index].T)
        singular = torch.linalg.svdvals(written[index] @ torch.linalg.cholesky(given[index]))
        torch.testing.assert_close(error, singular[2:].square().sum(), rtol=1e-6, atol=0)


def test_heads_of_the_same_width_stay_as_they_are():
    moments = spread_moments(2, 4, seed=0)
    for axes in (*narrow_scores(moments, moments, 4), narrow_values(moments, moments, 4)):
        assert torch.equal(axes, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


@pytest.mark.parametrize("dead", [False, True], ids=["all vary", "one does not"])
def test_a_head_of_which_little_varies_gives_finite_axes(dead):
    moments = spread_moments(1, 6, seed=0)
    moments[:, 3:] = 0
    moments[:, :, 3:] = 0
    moments *= not dead
    for axes in (*narrow_scores(moments, moments, 4), narrow_values(moments, moments, 4)):
        assert axes.isfinite().all()


# Which neurons


@pytest.fixture
def neurons() -> Moments:
    """12 inputs of falling energy, and 3 targets: what the layer gives that reads all of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    moments = Moments(12, 3)
    moments.add(inputs, inputs @ torch.randn(12, 3, generator=generator))
    return moments


def test_each_neuron_is_the_one_that_explains_most_beside_those_before(neurons):
    chosen = []
    for count in range(1, 5):
        left = [one for one in range(12) if one not in chosen]
        chosen.append(max(left, key=lambda one: explained(neurons, torch.tensor([*chosen, one]))))
        assert most_needed(neurons, count).tolist() == sorted(chosen)


def test_what_is_explained_is_what_least_squares_leaves_out(neurons):
    covariance, products = neurons.covariance[:4, :4], neurons.cross_covariance[:4]
    expected = (products.T @ torch.linalg.solve(covariance, products)).trace()
    assert explained(neurons, torch.arange(4)) == pytest.approx(float(expected), rel=1e-4)


def test_inputs_that_repeat_others_are_not_needed():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 3, generator=generator)
    moments = Moments(6, 2)
    moments.add(inputs.repeat(1, 2), inputs[:, :2] + 0.1 * inputs[:, 2:])
    chosen = most_needed(moments, 3)
    assert sorted((chosen % 3).tolist()) == [0, 1, 2]
    assert most_needed(moments, 6).tolist() == list(range(6))  # all of them, though three add nothing


def test_a_compressor_says_which_heads_it_made(shared_teacher, batches, teacher_folder):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, HALF)
    assert "vision 4 of 8 channels, as many as the teacher's" in str(compressor.cost())
