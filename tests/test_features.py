import math

import pytest
import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures, encode_images, encode_texts


@pytest.fixture
def output(tiny_teacher, tiny_batch):
    with torch.no_grad():
        return tiny_teacher(**tiny_batch)


def test_features_give_the_models_own_logits(tiny_teacher, output):
    features = ClipFeatures.from_output(output, tiny_teacher.logit_scale)
    assert features.logit_scale.item() == pytest.approx(math.exp(2.0), rel=1e-6)
    torch.testing.assert_close(features.logits_per_image(), output.logits_per_image, atol=1e-5, rtol=0)


def test_encoders_give_the_embeddings_of_the_joint_forward(tiny_teacher, tiny_batch, output):
    with torch.no_grad():
        images = encode_images(tiny_teacher, tiny_batch["pixel_values"])
        texts = encode_texts(tiny_teacher, tiny_batch["input_ids"], tiny_batch["attention_mask"])
    torch.testing.assert_close(images, output.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, output.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(8), atol=1e-6, rtol=0)


def test_padding_does_not_change_a_text(tiny_teacher, tiny_tokenizer):
    short = tiny_tokenizer("red bar", return_tensors="pt")
    padded = tiny_tokenizer("red bar", padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape[1] > short["input_ids"].shape[1]
    with torch.no_grad():
        embeds = [encode_texts(tiny_teacher, one["input_ids"], one["attention_mask"]) for one in (short, padded)]
    torch.testing.assert_close(embeds[0], embeds[1], atol=1e-5, rtol=0)


def test_masked_tokens_are_not_read(tiny_teacher, tiny_tokenizer):
    tokens = tiny_tokenizer(["red bar", "rod bar"], return_tensors="pt")  # they differ in the third token
    with torch.no_grad():
        open_ = encode_texts(tiny_teacher, **tokens)
        tokens["attention_mask"][:, 2] = 0
        masked = encode_texts(tiny_teacher, **tokens)
    assert (open_[0] - open_[1]).abs().max() > 1e-3
    torch.testing.assert_close(masked[0], masked[1], atol=1e-6, rtol=0)


def test_features_of_a_half_precision_model_are_fp32(tiny_teacher, tiny_batch):
    model = tiny_teacher.bfloat16()
    batch = tiny_batch | {"pixel_values": tiny_batch["pixel_values"].bfloat16()}
    with torch.no_grad():
        output = model(**batch)
        images = encode_images(model, batch["pixel_values"])
        texts = encode_texts(model, batch["input_ids"], batch["attention_mask"])
    features = ClipFeatures.from_output(output, model.logit_scale)
    read = (features.image_embeds, features.text_embeds, features.logit_scale, images, texts)
    assert output.image_embeds.dtype == torch.bfloat16 and {one.dtype for one in read} == {torch.float32}
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(8), atol=1e-6, rtol=0)  # normalized after the cast


def test_gradients_flow_through_the_encoders(tiny_teacher, tiny_batch):
    target = F.normalize(torch.ones(8, 32), dim=-1)
    (encode_images(tiny_teacher, tiny_batch["pixel_values"]) - target).pow(2).sum().backward()
    assert tiny_teacher.visual_projection.weight.grad.abs().max() > 1e-4


def test_features_and_logits_stay_fp32_and_exact_under_autocast(tiny_teacher, tiny_batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = ClipFeatures.from_output(tiny_teacher(**tiny_batch), tiny_teacher.logit_scale)
        logits = features.logits_per_image()
    assert features.image_embeds.dtype == features.text_embeds.dtype == logits.dtype == torch.float32
    for embeds in (features.image_embeds, features.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(8), atol=1e-6, rtol=0)
    exact = features.logit_scale * features.image_embeds @ features.text_embeds.T
    torch.testing.assert_close(logits, exact, atol=1e-6, rtol=0)
