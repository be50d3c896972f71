"""Selection keeps a teacher's parts as they are: those that a criterion gives the highest scores."""

import copy
import dataclasses
import json

import pytest
import torch
from calibrated_starts import TOWERS, random_pairs, split
from torch.nn import functional as F

from clipmap_hf.config import ClipMapConfig, TowerConfig, student_config
from clipmap_hf.evaluation.retrieval import recall_at_k
from clipmap_hf.losses import contrastive_loss
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.models.towers import Tower
from clipmap_hf.starts import STARTS, start_mapper
from clipmap_hf.starts.selection.criteria import magnitude, manual, part_sums, random_selection, taylor
from clipmap_hf.starts.selection.heat_map import errors_to_dict, heat_map
from clipmap_hf.starts.selection.mope import PruningErrors, mope, pruning_errors
from clipmap_hf.starts.selection.scores import Scores, TowerScores, keep, strongest


NARROW = ClipMapConfig(TowerConfig(48, num_hidden_layers=2), TowerConfig(32, num_hidden_layers=2), projection_dim=16)

CRITERIA = {
    "magnitude": magnitude,
    "manual": manual,
    "mope": mope,
    "random_selection": random_selection,
    "taylor": taylor,
}


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    pairs = random_pairs(shared_teacher.config, 24)
    return split(pairs | {"attention_mask": torch.ones_like(pairs["input_ids"])}, 12)


def selected(teacher, config: ClipMapConfig, name: str, batches) -> WeightMapper:
    batches = batches if STARTS[name].reads_pairs else None
    return start_mapper(teacher, dataclasses.replace(config, initializer=name), batches)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_student_of_the_same_size_is_the_teacher(shared_teacher, batches, name):
    student = selected(shared_teacher, ClipMapConfig(), name, batches).export().state_dict()
    for tensor_name, tensor in shared_teacher.state_dict().items():
        assert torch.equal(student[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("depth", ["interval_front", "score"])
@pytest.mark.parametrize("name", CRITERIA)
def test_operators_keep_whole_parts(shared_teacher, batches, name, depth, device):
    teacher = copy.deepcopy(shared_teacher).to(device)
    mapper = selected(teacher, dataclasses.replace(NARROW, depth=depth), name, batches)
    for operator_name, operator in mapper.operators.items():
        value = operator()
        assert ((value == 0) | (value == 1)).all() and (value.sum(dim=-1) == 1).all(), operator_name
        assert (value.argmax(dim=-1).diff() > 0).all(), operator_name
    for tower in TOWERS:
        heads = mapper.operators[f"{tower}_value"]().sum(dim=-2).unflatten(1, (-1, 16))
        assert (heads == heads[:, :, :1]).all()


def test_manual_is_the_front_slice(shared_teacher):
    manual = selected(shared_teacher, NARROW, "manual", []).export().state_dict()
    diagonal = start_mapper(shared_teacher, dataclasses.replace(NARROW, initializer="diagonal")).export().state_dict()
    for name, tensor in diagonal.items():
        assert torch.equal(manual[name], tensor), name


def test_random_selection_follows_its_seed(shared_teacher):
    first, again, other = (
        selected(shared_teacher, dataclasses.replace(NARROW, seed=seed), "random_selection", []).export().state_dict()
        for seed in (0, 0, 1)
    )
    name = "visual_projection.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_the_highest_scores_are_kept(shared_teacher):
    def scores(config) -> TowerScores:
        layers = config.num_hidden_layers
        return TowerScores(
            torch.arange(config.hidden_size).float(),
            torch.arange(config.num_attention_heads).float().expand(layers, -1),
            -torch.arange(config.intermediate_size).float().expand(layers, -1),
            torch.arange(layers).float(),
        )

    teacher = shared_teacher.config
    given = Scores(scores(teacher.vision_config), scores(teacher.text_config), torch.arange(32).float())
    operators = keep(given, teacher, student_config(teacher, NARROW))
    assert operators["vision_residual"].argmax(dim=1).tolist() == list(range(16, 64))
    assert operators["text_key"][1].argmax(dim=1).tolist() == list(range(16, 48))
    assert operators["text_ffn_in"][2].argmax(dim=1).tolist() == list(range(128))
    assert operators["embed"].argmax(dim=1).tolist() == list(range(16, 32))


def test_the_first_of_equal_scores_are_kept():
    assert strongest(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("name", ["magnitude", "taylor"])  # without a module, recall may rise
def test_dead_parts_are_not_kept(shared_teacher, batches, name):
    teacher = copy.deepcopy(shared_teacher)
    for tower in TOWERS:
        for layer in Tower(teacher, tower).layers:
            for module, rows in ((layer.self_attn, slice(16, 32)), (layer.mlp, slice(3, 40))):
                writers = (module.fc1,) if hasattr(module, "fc1") else (module.q_proj, module.k_proj, module.v_proj)
                reader = module.fc2 if hasattr(module, "fc2") else module.out_proj
                with torch.no_grad():
                    for writer in writers:
                        writer.weight[rows] = writer.bias[rows] = 0
                    reader.weight[:, rows] = 0
    scores = CRITERIA[name](teacher, batches, 0)
    for tower in TOWERS:
        of_tower = getattr(scores, tower)
        assert (strongest(of_tower.heads, of_tower.heads.shape[1] - 1) != 1).all()
        alive = strongest(of_tower.neurons, of_tower.neurons.shape[1] - 37)
        assert ((alive < 3) | (alive >= 40)).all()


def test_part_sums_add_up_what_writes_and_what_reads(shared_teacher):
    values = {name: torch.ones_like(tensor) for name, tensor in shared_teacher.state_dict().items()}
    scores = part_sums(shared_teacher, values)
    width, ffn = 64, 256
    assert (scores.vision.neurons == width + 1 + width).all()  # a row of fc1 with its bias, a column of fc2
    assert (scores.vision.heads == 16 * (3 * (width + 1) + width)).all()
    assert (scores.embed == 64 + 48).all()
    negative = part_sums(shared_teacher, {name: -tensor for name, tensor in values.items()})
    torch.testing.assert_close(negative.vision.channels, scores.vision.channels)
    assert scores.vision.layers[0] == 4 * 16 * (3 * (width + 1) + width) + ffn * (2 * width + 1)


def test_taylor_scores_are_weights_times_gradients(shared_teacher, batches):
    model = copy.deepcopy(shared_teacher).eval()
    for batch in batches:
        output = model(**batch)
        contrastive_loss(ClipFeatures.from_output(output, model.logit_scale)).backward()
    mlp = model.text_model.encoder.layers[1].mlp
    written = (mlp.fc1.weight * mlp.fc1.weight.grad).sum(dim=1) + mlp.fc1.bias * mlp.fc1.bias.grad
    read = (mlp.fc2.weight * mlp.fc2.weight.grad).sum(dim=0)
    scores = taylor(shared_teacher, batches, 0).text.neurons[1]
    torch.testing.assert_close(scores.float(), written.abs() + read.abs(), atol=1e-5, rtol=1e-3)


# What the starts read that look at pairs of images and texts

each_of_pairs = pytest.mark.parametrize("name", ["mope", "taylor"])


def scores_of(name: str, teacher, batches) -> list[torch.Tensor]:
    scores = CRITERIA[name](teacher, batches, 0)
    return [
        tensor for tower in (scores.vision, scores.text) for tensor in (tower.channels, tower.heads, tower.neurons)
    ]


def with_captions(batches: list[dict]) -> list[dict]:
    """Two captions of each image: the one of the batch, then that of the image before."""
    return [
        {
            "pixel_values": batch["pixel_values"],
            "input_ids": torch.stack([batch["input_ids"], batch["input_ids"].roll(1, 0)], dim=1).flatten(0, 1),
            "attention_mask": batch["attention_mask"].repeat_interleave(2, dim=0),
            "image_of_text": torch.arange(len(batch["pixel_values"])).repeat_interleave(2),
        }
        for batch in batches
    ]


@each_of_pairs
@pytest.mark.parametrize("given", [[], ()])
def test_no_pairs_are_an_error_and_not_the_front_slice(shared_teacher, name, given):
    with pytest.raises(ValueError, match="no pairs to score parts by"):
        selected(shared_teacher, NARROW, name, given)


@each_of_pairs
def test_batches_of_one_pair_each_are_an_error_for_they_have_no_gradient(shared_teacher, batches, name):
    single = split(batches[0], 1)
    with pytest.raises(ValueError, match="no gradient.*at least two"):
        selected(shared_teacher, NARROW, name, single)


@each_of_pairs
def test_pairs_that_are_not_finite_are_an_error(shared_teacher, batches, name):
    spoiled = batches[0] | {"pixel_values": batches[0]["pixel_values"] * torch.nan}
    with pytest.raises(ValueError, match="not finite.*pixel_values"):
        selected(shared_teacher, NARROW, name, [spoiled])


@each_of_pairs
@pytest.mark.parametrize("missing", ["pixel_values", "input_ids"])
def test_batches_without_images_or_captions_are_an_error_that_says_what_needs_none(
    shared_teacher, batches, name, missing
):
    rest = [{key: tensor for key, tensor in batch.items() if key != missing} for batch in batches]
    with pytest.raises(ValueError, match=rf"needs .*{missing}.*'calibrated' or 'importance'"):
        selected(shared_teacher, NARROW, name, rest)


@each_of_pairs
def test_a_batch_without_a_mask_has_texts_of_all_their_tokens(shared_teacher, batches, name):
    bare = [{key: batch[key] for key in ("pixel_values", "input_ids")} for batch in batches]
    for given, expected in zip(*(scores_of(name, shared_teacher, one) for one in (bare, batches)), strict=True):
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-4)


@each_of_pairs
def test_an_iterator_is_refused(shared_teacher, batches, name):
    with pytest.raises(TypeError, match="several times; give a list or a DataLoader"):
        selected(shared_teacher, NARROW, name, iter(batches))


@pytest.mark.parametrize("name", [name for name, start in STARTS.items() if start.reads_pairs])
def test_images_may_have_several_captions(shared_teacher, batches, name):
    student = selected(shared_teacher, dataclasses.replace(NARROW, refit_steps=2), name, with_captions(batches))
    assert all(tensor.isfinite().all() for tensor in student.export().state_dict().values())


def test_taylor_reads_the_first_caption_of_each_image(shared_teacher, batches):
    several = with_captions(batches)
    for given, expected in zip(*(scores_of("taylor", shared_teacher, one) for one in (several, batches)), strict=True):
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_pruning_errors_count_all_captions_of_an_image(shared_teacher, batches):
    several = with_captions(batches)
    neurons = {name: getattr(taylor(shared_teacher, several, 0), name).neurons for name in TOWERS}
    errors = pruning_errors(shared_teacher, several, neurons)

    def recall(model) -> float:
        images = torch.cat([model.get_image_features(one["pixel_values"]).pooler_output for one in several])
        texts = torch.cat([model.get_text_features(one["input_ids"]).pooler_output for one in several])
        both = (F.normalize(one, dim=-1) for one in (images, texts))
        values = recall_at_k(*both, torch.arange(24).repeat_interleave(2)).values()
        return sum(values) / len(values)

    model = copy.deepcopy(shared_teacher)
    layer = model.vision_model.encoder.layers[1]
    for writer in (layer.self_attn.out_proj, layer.mlp.fc2):
        writer.weight[:], writer.bias[:] = 0, 0
    assert errors["vision"].layers[1] == pytest.approx(recall(shared_teacher) - recall(model), abs=1e-6)


@each_of_pairs
@pytest.mark.parametrize("owners", [None, [0, 0, 1, 1] + [2] * 20, [0] * 23 + [12]], ids=["none", "not all", "beyond"])
def test_texts_that_do_not_say_whose_they_are_are_an_error(shared_teacher, batches, name, owners):
    (several,) = with_captions(batches[:1])
    del several["image_of_text"]
    if owners is not None:
        several["image_of_text"] = torch.tensor(owners)
    with pytest.raises(ValueError, match="image_of_text must name"):
        selected(shared_teacher, NARROW, name, [several])


@torch.no_grad()
def test_pruning_errors_are_those_of_models_without_the_module(shared_teacher, batches):
    neurons = {name: getattr(taylor(shared_teacher, batches, 0), name).neurons for name in TOWERS}
    errors = pruning_errors(shared_teacher, batches, neurons)

    def recall(model) -> float:
        outputs = [model(**batch) for batch in batches]
        embeds = (torch.cat([getattr(one, f"{side}_embeds") for one in outputs]) for side in ("image", "text"))
        values = recall_at_k(*embeds).values()
        return sum(values) / len(values)

    whole, seen = recall(shared_teacher), set()
    for tower, index in (("vision", 0), ("vision", 3), ("text", 1)):
        size = neurons[tower].shape[1]
        least = neurons[tower][index].argsort(descending=True, stable=True)[7 * size // 8 :]
        for module in ("head", "group", "layer"):
            model = copy.deepcopy(shared_teacher)
            layer = Tower(model, tower).layers[index]
            if module != "group":
                layer.self_attn.out_proj.weight[:, slice(16, 32) if module == "head" else slice(None)] = 0
            if module != "head":
                layer.mlp.fc2.weight[:, least if module == "group" else slice(None)] = 0
            if module == "layer":
                layer.self_attn.out_proj.bias[:] = layer.mlp.fc2.bias[:] = 0
            found = {
                "head": errors[tower].heads[index, 1],
                "group": errors[tower].groups[index, 7],
                "layer": errors[tower].layers[index],
            }[module]
            assert found == pytest.approx(whole - recall(model), abs=1e-6), (tower, index, module)
            seen.add(float(found))
    assert len(seen) > 2


def test_a_heat_map_is_darkest_where_most_is_lost():
    errors = PruningErrors(
        torch.tensor([[0.0, 0.04], [-0.01, 0.02]]), torch.tensor([[0.01], [0.0]]), torch.tensor([0.5, 0.25])
    )
    vision, text = heat_map({"vision": errors, "text": errors}).split("\n\n")
    name, header, *lines = vision.splitlines()
    assert (name, header.split()) == ("vision", ["layer", "head", "0", "head", "1", "group", "0", "whole"])
    assert [line.split() for line in lines] == [
        ["0", "0.0", "4.0", "█", "1.0", "░", "50.0", "█"],
        ["1", "-1.0", "2.0", "▒", "0.0", "25.0", "▒"],
    ]
    assert text.splitlines()[1:] == vision.splitlines()[1:]


def test_errors_are_kept_as_json(shared_teacher, batches):
    neurons = {name: getattr(taylor(shared_teacher, batches, 0), name).neurons for name in TOWERS}
    errors = pruning_errors(shared_teacher, batches, neurons)
    read = json.loads(json.dumps(errors_to_dict(errors)))
    for tower in TOWERS:
        for part in ("heads", "groups", "layers"):
            expected = getattr(errors[tower], part)
            torch.testing.assert_close(torch.tensor(read[tower][part]).double(), expected, atol=1e-7, rtol=0)
