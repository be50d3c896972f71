import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from clipmap_hf.losses import (
    EMBEDDING_LOSSES,
    LIST_LOSSES,
    LOSSES,
    PAIR_LOSSES,
    affinity_loss,
    contrastive_loss,
    feature_loss,
    hidden_loss,
    interactive_loss,
    labels_loss,
    relational_loss,
    sigmoid_loss,
)
from clipmap_hf.losses.hidden import hidden_errors
from clipmap_hf.models.features import ClipFeatures


OF_EMBEDDINGS = sorted(set(LOSSES) - {"hidden"})


def features_of_logits(logits: list[list[float]], scale: float = 1.0) -> ClipFeatures:
    """Features whose `logits_per_image` are `scale * logits` (not normalized, which no loss asks for)."""
    rows = torch.tensor(logits)
    return ClipFeatures(torch.eye(len(rows)), rows.T, torch.tensor(scale))


def random_features(seed: int, dim: int = 8, scale: float = 5.0) -> ClipFeatures:
    generator = torch.Generator().manual_seed(seed)
    embeds = [F.normalize(torch.randn(6, dim, generator=generator), dim=-1).requires_grad_() for _ in range(2)]
    return ClipFeatures(*embeds, torch.tensor(scale))


def log_softmax(values: list[float], index: int) -> float:
    return values[index] - math.log(sum(math.exp(value) for value in values))


def test_contrastive_loss_of_two_pairs_by_hand():
    # logits [[2, 2], [0, 0]]: texts of an image cannot be told apart; both texts prefer image 0
    loss = contrastive_loss(features_of_logits([[1.0, 1.0], [0.0, 0.0]], scale=2.0))
    image_to_text = math.log(2)
    text_to_image = -(log_softmax([2, 0], 0) + log_softmax([2, 0], 1)) / 2
    assert loss.item() == pytest.approx((image_to_text + text_to_image) / 2, abs=1e-6)


def test_affinity_loss_of_two_pairs_by_hand():
    student, teacher = features_of_logits([[1.0, 0.0], [0.0, 0.0]]), features_of_logits([[0.0, 0.0], [3.0, 0.0]])
    loss = affinity_loss(student, teacher)
    high = 1 / (1 + math.exp(-3))  # the teacher's softmax of (3, 0)
    # image 0: teacher undecided, student (1, 0); image 1: teacher (high, 1 - high), student undecided
    image_to_text = -(log_softmax([1, 0], 0) + log_softmax([1, 0], 1)) / 2 + math.log(2)
    # text 0: teacher (1 - high, high) over the images, student (1, 0); text 1: both undecided
    text_to_image = -((1 - high) * log_softmax([1, 0], 0) + high * log_softmax([1, 0], 1)) + math.log(2)
    assert loss.item() == pytest.approx((image_to_text / 2 + text_to_image / 2) / 2, abs=1e-6)


def test_affinity_equals_contrastive_when_the_teacher_is_certain():
    student, certain = random_features(0), features_of_logits(torch.eye(6).tolist(), scale=1000.0)
    torch.testing.assert_close(affinity_loss(student, certain), contrastive_loss(student), atol=1e-6, rtol=0)


def test_affinity_is_minimal_where_student_equals_teacher():
    teacher = random_features(0)
    student = random_features(0)
    best = affinity_loss(student, teacher)
    best.backward()
    torch.testing.assert_close(student.image_embeds.grad, torch.zeros(6, 8), atol=1e-6, rtol=0)
    torch.testing.assert_close(student.text_embeds.grad, torch.zeros(6, 8), atol=1e-6, rtol=0)
    assert all(affinity_loss(random_features(seed), teacher) > best + 0.01 for seed in range(1, 6))


def test_affinity_reads_each_models_own_scale():
    student, teacher = random_features(0), random_features(1)
    sharper = ClipFeatures(teacher.image_embeds, teacher.text_embeds, torch.tensor(50.0))
    assert abs(affinity_loss(student, sharper) - affinity_loss(student, teacher)) > 0.01


def test_sigmoid_loss_of_two_pairs_by_hand():
    features = dataclasses.replace(
        features_of_logits([[1.0, 1.0], [0.0, 0.0]], scale=2.0), logit_bias=torch.tensor([-1.0])
    )  # logits [[1, 1], [-1, -1]]
    right = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))
    wrong = math.log(1 + math.exp(1)) + math.log(1 + math.exp(-1))
    assert sigmoid_loss(features).item() == pytest.approx((right + wrong) / 2, abs=1e-6)


def test_sigmoid_loss_is_the_models_own(siglip, tiny_batch):
    with torch.no_grad():
        output = siglip(**tiny_batch, return_loss=True)
    features = ClipFeatures.from_output(output, siglip.logit_scale, siglip.logit_bias)
    torch.testing.assert_close(sigmoid_loss(features), output.loss, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["affinity", "contrastive", "relational"])
def test_a_logit_bias_does_not_matter_to_softmaxes(name):
    student, teacher = random_features(0), random_features(1)
    biased = dataclasses.replace(student, logit_bias=torch.tensor(-10.0))
    torch.testing.assert_close(LOSSES[name](biased, teacher), LOSSES[name](student, teacher), atol=1e-5, rtol=0)


def test_contrastive_loss_needs_no_teacher():
    student = random_features(0)
    assert contrastive_loss(student) == contrastive_loss(student, random_features(1))


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_gradient_reaches_only_the_student(name):
    student, teacher = random_features(0), random_features(1)
    LOSSES[name](student, teacher).backward()
    assert student.image_embeds.grad.abs().max() > 1e-4 and student.text_embeds.grad.abs().max() > 1e-4
    assert teacher.image_embeds.grad is None and teacher.text_embeds.grad is None


@pytest.mark.parametrize("name", sorted(set(OF_EMBEDDINGS) - {"feature"}))  # which has no logits
def test_a_learned_logit_scale_gets_a_gradient(name):
    embeds, scale = random_features(0), torch.tensor(5.0, requires_grad=True)
    LOSSES[name](ClipFeatures(embeds.image_embeds, embeds.text_embeds, scale), random_features(1)).backward()
    assert scale.grad.abs() > 1e-4


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_the_order_of_the_pairs_does_not_matter(name):
    student, teacher = random_features(0), random_features(1)
    order = [3, 1, 5, 0, 4, 2]
    shuffled = [ClipFeatures(f.image_embeds[order], f.text_embeds[order], f.logit_scale) for f in (student, teacher)]
    torch.testing.assert_close(LOSSES[name](*shuffled), LOSSES[name](student, teacher), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(set(OF_EMBEDDINGS) - set(LIST_LOSSES)))
def test_images_and_texts_are_treated_alike(name):
    student, teacher = random_features(0), random_features(1)
    swapped = [ClipFeatures(f.text_embeds, f.image_embeds, f.logit_scale) for f in (student, teacher)]
    torch.testing.assert_close(LOSSES[name](*swapped), LOSSES[name](student, teacher), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_embeddings_of_other_widths_cannot_be_compared(name):
    with pytest.raises(ValueError, match=r"student's width is 4 and the teachers' are \[4, 16\]"):
        LOSSES[name](random_features(0, dim=4), random_features(1, dim=4), random_features(1, dim=16))


def test_feature_loss_by_hand():
    student = ClipFeatures(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor(5.0))
    teacher = ClipFeatures(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor(5.0))
    assert feature_loss(student, teacher).item() == pytest.approx((1 + 1) / 2 + (0.36 + 0.04) / 2, abs=1e-6)
    assert feature_loss(student, teacher, student).item() == pytest.approx(1.2 / 2, abs=1e-6)


def test_interactive_loss_reads_one_side_of_each_model():
    student, teacher = random_features(0), random_features(1)
    images = ClipFeatures(student.image_embeds, teacher.text_embeds, student.logit_scale).logits_per_image()
    texts = ClipFeatures(student.text_embeds, teacher.image_embeds, student.logit_scale).logits_per_image()
    expected = sum(F.cross_entropy(logits, torch.arange(6)) for logits in (images, texts)) / 2
    torch.testing.assert_close(interactive_loss(student, teacher), expected, atol=1e-6, rtol=0)
    twice = interactive_loss(student, teacher, teacher)
    torch.testing.assert_close(twice, expected, atol=1e-6, rtol=0)


def test_a_student_that_is_its_teacher_has_learned_all_of_the_interactive_loss():
    teacher = random_features(0)
    torch.testing.assert_close(interactive_loss(teacher, teacher), contrastive_loss(teacher), atol=1e-6, rtol=0)


def test_relational_loss_is_zero_where_student_equals_teacher():
    teacher = random_features(0)
    assert relational_loss(random_features(0), teacher).item() == pytest.approx(0, abs=1e-6)
    assert relational_loss(random_features(1), teacher) > 0.01


def test_relational_loss_has_the_gradient_of_the_affinity_loss():
    gradients = []
    for loss in (relational_loss, affinity_loss):
        student = random_features(0)
        loss(student, random_features(1), random_features(2)).backward()
        gradients.append(student.image_embeds.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_labels_loss_of_two_images_and_three_texts_by_hand():
    texts = torch.eye(3)
    student, teacher = (
        ClipFeatures(torch.tensor(rows), texts, torch.tensor(scale))
        for rows, scale in (([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], 2.0), ([[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]], 1.0))
    )
    high, low = math.exp(3) / (math.exp(3) + 2), 1 / (math.exp(3) + 2)  # the teacher's softmax of (0, 3, 0)
    undecided = -math.log(3) - sum(log_softmax([1, 0, 0], index) for index in range(3)) / 3
    decided = high * math.log(3 * high) + 2 * low * math.log(3 * low)
    assert labels_loss(student, teacher).item() == pytest.approx((undecided + decided) / 2, abs=1e-6)
    assert labels_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_labels_loss_averages_the_targets_of_teachers_after_the_softmax():
    student, teachers = random_features(0), [random_features(1, dim=4), random_features(2, dim=16, scale=9.0)]
    targets = sum((t.logit_scale * t.image_embeds @ t.text_embeds.T).softmax(-1) for t in teachers) / 2
    logits = (student.logit_scale * student.image_embeds @ student.text_embeds.T).log_softmax(-1)
    expected = (targets * (targets.log() - logits)).sum(dim=-1).mean()
    torch.testing.assert_close(labels_loss(student, *teachers), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(set(OF_EMBEDDINGS) - set(EMBEDDING_LOSSES)))
def test_student_and_teacher_may_differ_in_width(name):
    loss = LOSSES[name](random_features(0, dim=4), random_features(1, dim=16))
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()


def test_targets_of_several_teachers_are_averaged_after_the_softmax():
    student, certain, undecided = (
        features_of_logits(logits) for logits in ([[1.0, 0.0], [0.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]], [[0.0] * 2] * 2)
    )
    high = (1 / (1 + math.exp(-9)) + 0.5) / 2  # of softmaxes; the mean of the logits would make it 0.989
    undecided_rows = math.log(2)
    decided_rows = -(high * log_softmax([1, 0], 0) + (1 - high) * log_softmax([1, 0], 1))
    assert affinity_loss(student, certain, undecided).item() == pytest.approx(
        (decided_rows + undecided_rows) / 2, abs=1e-6
    )


def test_teachers_of_other_widths_teach_together():
    student, teachers = random_features(0), [random_features(1, dim=4), random_features(2, dim=16, scale=9.0)]
    together = affinity_loss(student, *teachers)
    # The cross-entropy is linear in its targets, so their mean gives the mean loss.
    apart = sum(affinity_loss(student, teacher) for teacher in teachers) / 2
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    torch.testing.assert_close(affinity_loss(student, *teachers[::-1]), together, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        affinity_loss(student, teachers[0], teachers[0]), affinity_loss(student, teachers[0]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", sorted(set(OF_EMBEDDINGS) - set(PAIR_LOSSES)))
def test_distillation_without_a_teacher_is_an_error(name):
    with pytest.raises(
        ValueError, match=f"The {'affinity' if name == 'relational' else name} loss needs .* one teacher"
    ):
        LOSSES[name](random_features(0))


# Hidden states


def random_streams(layers: int, seed: int = 0, width: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, width, generator=generator) for _ in range(layers)]


@pytest.mark.parametrize(("layers", "compared"), [(1, [5]), (2, [2, 5]), (4, [1, 2, 4, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_layers_are_compared_with_those_as_far_down(layers, compared):
    teacher = random_streams(6)
    assert hidden_errors([teacher[index] for index in compared], teacher).tolist() == [0.0, 0.0]
    given = hidden_errors([teacher[index] + 2 for index in compared], teacher)
    torch.testing.assert_close(given, torch.full((2,), 4.0 * layers), atol=1e-5, rtol=0)


def test_hidden_errors_do_not_look_at_padding():
    student, teacher = random_streams(2), random_streams(2, seed=1)
    counts = torch.tensor([[1, 1, 0], [1, 1, 1]])
    student[0].requires_grad_()
    errors = hidden_errors(student, teacher, counts)
    by_hand = sum((own[0, :2] - theirs[0, :2]).square().mean() for own, theirs in zip(student, teacher, strict=True))
    torch.testing.assert_close(errors[0], by_hand, atol=1e-6, rtol=0)
    torch.testing.assert_close(errors[1], hidden_errors(student, teacher)[1], atol=1e-6, rtol=0)
    errors.sum().backward()
    assert not student[0].grad[0, 2].any() and student[0].grad[0, 1].any()


def test_the_hidden_loss_is_the_mean_of_what_features_bring():
    features = random_features(0)
    with pytest.raises(ValueError, match="needs features with hidden_errors"):
        hidden_loss(features)
    errors = torch.tensor([1.0, 2.0, 6.0])
    assert hidden_loss(ClipFeatures(features.image_embeds, features.text_embeds, features.logit_scale, errors)) == 3.0
