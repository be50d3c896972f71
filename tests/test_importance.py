"""Selection by importance keeps what has most energy, as it is."""

import copy
import dataclasses

import pytest
import torch
from calibrated_starts import TOWERS, embeddings, random_pairs, split, started

from clipmap_hf.config import ClipMapConfig, TowerConfig, student_config
from clipmap_hf.starts.calibrated.statistics import calibrate
from clipmap_hf.starts.selection.importance import importance
from clipmap_hf.starts.selection.scores import head_channels, keep


NARROW = ClipMapConfig(vision=TowerConfig(48), text=TowerConfig(32), initializer="importance")


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    return split(random_pairs(shared_teacher.config, 24), 12)


def operators_of(teacher, batches, **changes) -> dict[str, torch.Tensor]:
    size = student_config(teacher.config, dataclasses.replace(NARROW, **changes))
    return keep(importance(teacher, batches, seed=0), teacher.config, size)


def test_a_student_of_the_same_size_is_the_teacher(shared_teacher, batches, tiny_batch):
    mapper = started(shared_teacher, ClipMapConfig(initializer="importance"), batches)
    student, teacher = mapper.export().state_dict(), shared_teacher.state_dict()
    for name, tensor in teacher.items():
        assert torch.equal(student[name], tensor), name
    ours, theirs = embeddings(mapper, tiny_batch), embeddings(shared_teacher, tiny_batch)
    for tower in TOWERS:
        torch.testing.assert_close(ours[tower], theirs[tower], atol=1e-6, rtol=0)


def test_operators_select_in_ascending_order(shared_teacher, batches):
    operators = operators_of(shared_teacher, batches, projection_dim=16)
    assert operators["vision_residual"].shape == (48, 64) and operators["text_ffn"].shape == (3, 128, 192)
    assert operators["embed"].shape == (16, 32)
    for name, operator in operators.items():
        assert ((operator == 0) | (operator == 1)).all() and (operator.sum(dim=-1) == 1).all(), name
        assert (operator.argmax(dim=-1).diff() > 0).all(), name
    for tower in TOWERS:
        for space in ("query", "key"):
            assert torch.equal(operators[f"{tower}_{space}"], operators[f"{tower}_value"])
        assert torch.equal(operators[f"{tower}_ffn"], operators[f"{tower}_ffn_in"])


def test_the_strongest_entries_are_kept(shared_teacher, batches):
    statistics = calibrate(shared_teacher, batches)
    operators = operators_of(shared_teacher, batches, projection_dim=16)
    for tower, heads in (("vision", 3), ("text", 2)):
        kept_heads = operators[f"{tower}_value"].sum(dim=-2).unflatten(1, (-1, 16))  # (layers, heads, 16)
        assert (kept_heads == kept_heads[:, :, :1]).all()
        kept_neurons = operators[f"{tower}_ffn"].sum(dim=-2).bool()
        for layer, energy in enumerate(statistics[tower].head_energy):
            assert set(kept_heads[layer, :, 0].nonzero().flatten().tolist()) == set(energy.argsort()[-heads:].tolist())
        for kept, energy in zip(kept_neurons, statistics[tower].neuron_energy, strict=True):
            assert energy[kept].min() > energy[~kept].max()
        model = getattr(shared_teacher, f"{tower}_model")
        norms = [norm for layer in model.encoder.layers for norm in (layer.layer_norm1, layer.layer_norm2)]
        norms.append(model.post_layernorm if tower == "vision" else model.final_layer_norm)
        energy = sum(
            norm.weight.detach().double() ** 2 * moment.diagonal()
            for norm, moment in zip(norms, statistics[tower].read, strict=True)
        )
        kept = operators[f"{tower}_residual"].sum(dim=0).bool()
        assert energy[kept].min() > energy[~kept].max()
    kept = operators["embed"].sum(dim=0).bool()
    energy = (statistics["vision"].embeds + statistics["text"].embeds).diagonal()
    assert energy[kept].min() > energy[~kept].max()


def test_dead_channels_heads_and_neurons_are_not_kept(shared_teacher, batches):
    teacher = copy.deepcopy(shared_teacher)
    channels, heads, neurons = list(range(0, 32, 2)), [1], list(range(3, 67))
    for tower in TOWERS:
        model = getattr(teacher, f"{tower}_model")
        for layer in model.encoder.layers:
            layer.self_attn.out_proj.weight.data.unflatten(1, (-1, 16))[:, heads] = 0
            layer.mlp.fc2.weight.data[:, neurons] = 0
            for norm in (layer.layer_norm1, layer.layer_norm2):
                norm.weight.data[channels] = 0
        (model.post_layernorm if tower == "vision" else model.final_layer_norm).weight.data[channels] = 0
    operators = operators_of(teacher, batches)
    for tower in TOWERS:
        assert not operators[f"{tower}_residual"][:, channels].any()
        assert not operators[f"{tower}_value"].unflatten(2, (-1, 16))[:, :, heads].any()
        assert not operators[f"{tower}_ffn"][:, :, neurons].any()


def test_a_scale_of_a_norm_counts(shared_teacher, batches):
    """A channel of little variance that the norms make much of is kept."""
    teacher = copy.deepcopy(shared_teacher)
    model, before = teacher.text_model, operators_of(teacher, batches)["text_residual"]
    lost = int((before.sum(dim=0) == 0).nonzero()[0])
    model.final_layer_norm.weight.data[lost] = 50.0
    assert operators_of(teacher, batches)["text_residual"][:, lost].any()


def test_a_smaller_student_has_slices_of_the_teachers_tensors(shared_teacher, batches):
    mapper = started(shared_teacher, dataclasses.replace(NARROW, projection_dim=16), batches)
    student, teacher = mapper.export().state_dict(), shared_teacher.state_dict()
    kept = {name: operator().argmax(dim=-1) for name, operator in mapper.operators.items()}
    for layer in range(4):
        name = f"vision_model.encoder.layers.{layer}."
        residual, value, ffn = kept["vision_residual"], kept["vision_value"][layer], kept["vision_ffn"][layer]
        expected = {
            "self_attn.q_proj.weight": teacher[f"{name}self_attn.q_proj.weight"][value][:, residual],
            "self_attn.out_proj.weight": teacher[f"{name}self_attn.out_proj.weight"][residual][:, value],
            "mlp.fc2.weight": teacher[f"{name}mlp.fc2.weight"][residual][:, ffn],
            "mlp.fc1.bias": teacher[f"{name}mlp.fc1.bias"][ffn],
            "layer_norm1.weight": teacher[f"{name}layer_norm1.weight"][residual],
        }
        for part, tensor in expected.items():
            assert torch.equal(student[name + part], tensor), name + part
    expected = teacher["text_projection.weight"][kept["embed"]][:, kept["text_residual"]]
    assert torch.equal(student["text_projection.weight"], expected)
    assert not mapper.corrections


def test_the_channels_of_heads_lie_side_by_side():
    assert head_channels(torch.tensor([[0, 2], [1, 3]]), 3).tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert head_channels(torch.tensor([1]), 2).tolist() == [2, 3]
