"""Calibrated operators keep what the teacher makes use of: its main axes, its strongest heads and neurons."""

import copy
import dataclasses
import importlib

import pytest
import torch
from calibrated_starts import NARROW, TOWERS, folded, frugal, losses, nearness, plain, random_pairs, split, started
from torch.nn import functional as F

from clipmap_hf.config import ClipMapConfig, TowerConfig, student_config
from clipmap_hf.starts.calibrated.axes import residual_axes
from clipmap_hf.starts.calibrated.operators import calibrated_operators
from clipmap_hf.starts.calibrated.statistics import calibrate


BOTH = pytest.mark.parametrize("refit", [False, True], ids=["mapped", "refitted"])
DEPTHS = {"vision": [1, 2, 3, 4], "text": [1, 2, 3]}  # of students as deep as the teacher
SAME = ClipMapConfig(  # but for a neuron, or nothing would be mapped
    TowerConfig(intermediate_size=255), TowerConfig(intermediate_size=191), initializer="calibrated", refit_steps=0
)


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    return split(random_pairs(shared_teacher.config, 96), 48)


@pytest.fixture(scope="module")
def others(shared_teacher) -> dict:
    """Pairs that were not calibrated with."""
    return random_pairs(shared_teacher.config, 32, seed=1)


@pytest.fixture
def exact(monkeypatch):
    """Without the ridge, which costs a little of whatever is solved."""
    for name, ridges in (("operators", ["_RIDGE"]), ("refit", ["_RIDGE", "_PROJECTION_RIDGE"])):
        module = importlib.import_module(f"clipmap_hf.starts.calibrated.{name}")
        for ridge in ridges:
            monkeypatch.setattr(module, ridge, 1e-9)


# Axes of the stream


def known_moments(width: int, norms: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of LayerNorms' outputs with falling energy along known axes of mean zero, and these axes."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(width, width - 1, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(axes - axes.mean(dim=0)).Q.T  # (width - 1, width)
    energies = 0.5 ** torch.arange(width - 1).double()
    return (axes.T * energies @ axes).expand(norms, -1, -1), axes


@pytest.mark.parametrize("size", [2, 7, 12])
def test_axes_are_orthonormal_within_the_streams_of_mean_zero(size):
    read, axes = known_moments(12)
    operator = residual_axes(read, size)
    assert operator.shape == (size, 12) and operator.dtype == torch.float32
    torch.testing.assert_close(operator.sum(dim=0), torch.zeros(12), atol=1e-6, rtol=0)
    torch.testing.assert_close(operator.sum(dim=1), torch.zeros(size), atol=1e-6, rtol=0)
    torch.testing.assert_close(operator @ operator.T, torch.eye(size) - 1 / size, atol=1e-6, rtol=0)
    kept = axes[: size - 1].float() if size < 12 else axes.float()
    torch.testing.assert_close(operator.T @ operator, kept.T @ kept, atol=1e-5, rtol=0)


def test_axes_of_the_same_size_are_the_centering():
    torch.testing.assert_close(residual_axes(known_moments(12)[0], 12), torch.eye(12) - 1 / 12, atol=1e-7, rtol=0)


def test_a_mean_that_no_layer_reads_is_no_axis():
    read, axes = known_moments(12)
    operator = residual_axes(read + 100.0, 4)  # energy along the vector of ones
    torch.testing.assert_close(operator.T @ operator, (axes[:3].T @ axes[:3]).float(), atol=1e-5, rtol=0)


def test_every_norm_counts_alike_and_the_last_four_times():
    _, axes = known_moments(12)

    def along(index: int, energy: float) -> torch.Tensor:
        rest = torch.eye(12, dtype=torch.float64) * 1e-6
        return energy * (torch.outer(axes[index], axes[index]) + rest)

    # Energies are taken relative to a mean of theirs: a norm of which all is 1000 times as large counts no more.
    two_to_one = torch.stack([along(0, 1.0), along(0, 1.0), along(1, 1000.0), along(2, 1e-3)])
    kept = [residual_axes(two_to_one, size) for size in (2, 3)]
    torch.testing.assert_close((kept[0] @ axes[2].float()).norm(), torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close((kept[1] @ axes[0].float()).norm(), torch.tensor(1.0), atol=1e-4, rtol=0)
    against_four = torch.stack([along(0, 1.0)] * 5 + [along(2, 1.0)])
    operator = residual_axes(against_four, 2)
    torch.testing.assert_close((operator @ axes[0].float()).norm(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_a_huge_channel_in_some_layers_costs_the_other_axes_of_these_layers_no_weight():
    _, axes = known_moments(96)
    variances = torch.full((95,), 0.01, dtype=torch.float64)
    variances[0] = 1.0
    early = axes.T * variances @ axes  # axis 0, before the channel is there
    variances[0], variances[1], variances[2] = 0.01, 1.0, 1e4
    late = (axes.T * variances @ axes) / 1e4  # axis 1, for a LayerNorm gives vectors of a length
    operator = residual_axes(torch.stack([early, *late.expand(3, -1, -1)]), 3)
    found = operator @ axes[1:3].T.float()  # by their sums, axes 0 and 2 were the main ones
    torch.testing.assert_close(found.norm(dim=0), torch.ones(2), atol=1e-3, rtol=0)


def test_axes_along_which_no_token_varies_do_not_count():
    read, axes = known_moments(12)
    few = axes[:4].T @ axes[:4]  # of fewer tokens than axes
    operator = residual_axes(torch.stack([*read, few]), 5)
    torch.testing.assert_close(operator.T @ operator, few.float(), atol=1e-5, rtol=0)


def test_axes_beyond_those_that_vary_have_mean_zero_too():
    axes = known_moments(12)[1][:4]
    operator = residual_axes((axes.T @ axes).expand(3, -1, -1), 9)
    torch.testing.assert_close(operator.sum(dim=1), torch.zeros(9), atol=1e-6, rtol=0)
    torch.testing.assert_close(operator @ operator.T, torch.eye(9) - 1 / 9, atol=1e-6, rtol=0)


def test_a_layer_norm_commutes_with_axes_but_for_a_scalar():
    operator = residual_axes(known_moments(12)[0], 5)
    tokens = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    mapped, before = F.layer_norm(tokens @ operator.T, (5,), eps=0.0), F.layer_norm(tokens, (12,), eps=0.0)
    scalars = mapped.norm(dim=1, keepdim=True) / (before @ operator.T).norm(dim=1, keepdim=True)
    torch.testing.assert_close(mapped, scalars * (before @ operator.T), atol=1e-5, rtol=1e-5)
    assert scalars.std() > 0.1  # or any map would do


# What needs no more than the student has is not lost


@BOTH
def test_a_teacher_of_few_axes_heads_and_neurons_is_compressed_without_loss(
    shared_teacher, batches, others, refit, exact
):
    teacher = frugal(shared_teacher)
    mapper = started(teacher, dataclasses.replace(NARROW, refit=refit), batches)
    for tower in TOWERS:
        assert max(losses(mapper, teacher, tower, others, DEPTHS[tower])) < 5e-5
    if not refit:  # what is refitted to the normalized embeddings is not linear
        assert min(nearness(mapper, teacher, others).values()) > 1 - 1e-6


@BOTH
def test_the_ridge_costs_little(shared_teacher, batches, others, refit):
    teacher = frugal(shared_teacher)
    mapper = started(teacher, dataclasses.replace(NARROW, refit=refit), batches)
    for tower in TOWERS:
        assert max(losses(mapper, teacher, tower, others, DEPTHS[tower])) < 8e-3
    least = {"vision": 0.9999, "text": 0.99 if refit else 0.9999}
    assert all(near > least[tower] for tower, near in nearness(mapper, teacher, others).items())


@BOTH
def test_a_teacher_that_needs_more_is_compressed_with_loss(shared_teacher, batches, others, refit, exact):
    """Or the tests above would show nothing."""
    teacher = frugal(shared_teacher, width=48)
    mapper = started(teacher, dataclasses.replace(NARROW, refit=refit), batches)
    for tower in TOWERS:
        assert min(losses(mapper, teacher, tower, others, DEPTHS[tower])[1:]) > 0.1


@BOTH
def test_a_student_of_the_same_size_computes_what_the_teacher_does(shared_teacher, batches, others, refit, exact):
    teacher = silence(plain(shared_teacher), [], [7])
    mapper = started(teacher, dataclasses.replace(SAME, refit=refit), batches)
    for tower in TOWERS:
        assert max(losses(mapper, teacher, tower, others, DEPTHS[tower])) < 5e-5
    if not refit:
        assert min(nearness(mapper, teacher, others).values()) > 1 - 1e-6


@BOTH
def test_a_student_of_the_same_size_is_near_to_any_teacher(shared_teacher, batches, others, refit):
    mapper = started(silence(shared_teacher, [], [7]), dataclasses.replace(SAME, refit=refit), batches)
    near = nearness(mapper, shared_teacher, others)
    assert min(near.values()) > (0.995 if refit else 0.998), near


def test_a_teacher_of_few_embedding_axes_keeps_its_similarities(shared_teacher, batches, others, exact):
    teacher, generator = silence(plain(shared_teacher), [], [7]), torch.Generator().manual_seed(0)
    few = torch.linalg.qr(torch.randn(32, 16, generator=generator)).Q
    with torch.no_grad():
        for projection in (teacher.visual_projection, teacher.text_projection):
            projection.weight.copy_(few @ few.T @ projection.weight)
        config = dataclasses.replace(SAME, projection_dim=16, refit=False)
        mapper = started(teacher, config, batches)
        ours, theirs = mapper(**others), teacher(**others)
    assert ours.image_embeds.shape == (32, 16)
    for name in ("logits_per_image", "logits_per_text"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-3, rtol=1e-4)


def test_the_mean_that_pre_layrnorm_takes_away_is_taken_away(shared_teacher, batches, others):
    teacher = copy.deepcopy(shared_teacher)
    assert teacher.vision_model.pre_layrnorm.weight.std() > 0.1
    with torch.no_grad():
        teacher.vision_model.embeddings.position_embedding.weight += torch.linspace(-20, 20, 17)[:, None]
    mapper = started(teacher, dataclasses.replace(SAME, refit=False), batches)
    embedding = mapper.operators["vision_patch"]().detach()
    for axis in (0, 1):
        torch.testing.assert_close(embedding.sum(dim=axis), torch.zeros(64), atol=1e-4, rtol=0)
    centered = torch.eye(64) - 1 / 64
    expected = centered @ torch.diag(teacher.vision_model.pre_layrnorm.weight.detach()) @ centered
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)
    assert losses(mapper, teacher, "vision", others, DEPTHS["vision"])[0] < 0.1


# Which heads, neurons and axes


def silence(teacher, heads: list[int], neurons: list[int]):
    """A copy in whose layers these heads and neurons write nothing."""
    teacher = copy.deepcopy(teacher)
    for tower in TOWERS:
        for layer in getattr(teacher, f"{tower}_model").encoder.layers:
            layer.self_attn.out_proj.weight.data.unflatten(1, (-1, 16))[:, heads] = 0
            layer.mlp.fc2.weight.data[:, neurons] = 0
    return teacher


def test_dead_heads_and_neurons_are_not_kept(shared_teacher, batches):
    teacher = silence(shared_teacher, [1], list(range(0, 128, 2)))
    config = dataclasses.replace(NARROW, vision=TowerConfig(48, 192), text=TowerConfig(32, 128))
    mapper = started(teacher, config, batches)
    for tower in TOWERS:
        operators = {space: mapper.operators[f"{tower}_{space}"]() for space in ("query", "key", "value", "ffn")}
        for space, operator in operators.items():
            assert ((operator == 0) | (operator == 1)).all() and (operator.sum(dim=-1) == 1).all()
            kept = operator.sum(dim=-2).detach()  # (layers, big)
            dead = kept[:, 0:128:2] if space == "ffn" else kept[:, 16:32]
            assert not dead.any(), space
            assert torch.equal(operator, operators["value"]) == (space != "ffn")
        channels = operators["value"].argmax(dim=-1)
        assert (channels.diff(dim=1) > 0).all() and (channels.unflatten(1, (-1, 16))[:, :, 0] % 16 == 0).all()


def hooked(model, batches: list[dict], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What modules of the vision tower that end in `name` read, `(layers, tokens, width)`, and weights of tokens."""
    found = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, key=key: found.setdefault(key, []).append(inputs[0]))
        for key, module in model.vision_model.named_modules()
        if key.endswith(name)
    ]
    with torch.no_grad():
        for batch in batches:
            model.vision_model(batch["pixel_values"])
    for handle in handles:
        handle.remove()
    read = torch.stack([torch.cat(one) for one in found.values()]).double()  # (layers, items, tokens, width)
    weights = torch.ones(read.shape[1:3], dtype=torch.float64)
    weights[:, 0] = 16
    return read.flatten(1, 2), weights.flatten()


@pytest.mark.parametrize(("module", "space"), [("out_proj", "value"), ("fc2", "ffn")])
def test_lifts_are_the_least_squares_guess_of_all_from_those_kept(shared_teacher, batches, module, space):
    teacher = folded(shared_teacher)
    statistics = calibrate(teacher, batches, neuron_covariance=True)
    operators = calibrated_operators(statistics, teacher, student_config(teacher.config, NARROW))
    read, weights = hooked(teacher, batches, module)
    for index, tokens in enumerate(read):
        kept = operators[f"vision_{space}"][index].argmax(dim=1)
        tokens = (tokens - weights @ tokens / weights.sum()) * weights.sqrt()[:, None]
        inputs = tokens[:, kept]
        ridge = (1e-3 * inputs.square().sum() / len(kept)).sqrt() * torch.eye(len(kept), dtype=torch.float64)
        padded = torch.cat([tokens, torch.zeros(len(kept), tokens.shape[1], dtype=torch.float64)])
        expected = torch.linalg.lstsq(torch.cat([inputs, ridge]), padded).solution
        lift = operators[f"vision_{space}_in"][index]
        assert lift.shape == expected.shape and (lift - expected.float()).norm() < 1e-3 * expected.norm()
        assert (lift[:, kept] - torch.eye(len(kept))).norm() > 1e-3  # the ridge is there


def test_without_covariances_of_neurons_the_kept_ones_are_read_alone(shared_teacher, batches):
    teacher = folded(shared_teacher)
    operators = calibrated_operators(calibrate(teacher, batches), teacher, student_config(teacher.config, NARROW))
    for tower in TOWERS:
        assert torch.equal(operators[f"{tower}_ffn_in"], operators[f"{tower}_ffn"])


def test_a_joint_embedding_is_mapped_to_its_main_axes(shared_teacher, batches):
    teacher = folded(shared_teacher)
    statistics = calibrate(teacher, batches)
    size = dataclasses.replace(NARROW, projection_dim=5)
    embed = calibrated_operators(statistics, teacher, student_config(teacher.config, size))["embed"].double()
    torch.testing.assert_close(embed @ embed.T, torch.eye(5).double(), atol=1e-5, rtol=0)
    moment = statistics["vision"].embeds + statistics["text"].embeds
    most = torch.linalg.eigvalsh(moment)[-5:].sum()
    torch.testing.assert_close((embed @ moment @ embed.T).trace(), most, atol=1e-5, rtol=0)
    assert "embed" not in calibrated_operators(statistics, teacher, student_config(teacher.config, NARROW))


def test_means_of_lost_heads_and_neurons_are_made_up_for_in_biases(shared_teacher, batches, others):
    """Of a teacher whose lost heads and neurons add the same to all tokens, nothing is lost but their columns."""
    teacher = frugal(shared_teacher)
    with torch.no_grad():
        for tower in TOWERS:
            for layer in getattr(teacher, f"{tower}_model").encoder.layers:
                unused = (layer.mlp.fc2.weight == 0).all(dim=0)
                layer.mlp.fc1.weight[unused], layer.mlp.fc1.bias[unused] = 0, 0.1
                layer.mlp.fc2.weight[:, unused] = layer.mlp.fc2.bias[:, None]
                attention = layer.self_attn
                unused = (attention.out_proj.weight == 0).all(dim=0)
                attention.v_proj.weight[unused], attention.v_proj.bias[unused] = 0, 0.2
                attention.out_proj.weight[:, unused] = attention.out_proj.bias[:, None]
    mapper = started(teacher, dataclasses.replace(NARROW, refit=False), batches)
    for tower in TOWERS:
        assert max(losses(mapper, teacher, tower, others, DEPTHS[tower])) < 8e-3
