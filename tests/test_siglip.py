from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    SiglipModel,
    SiglipProcessor,
    pipeline,
)

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, TowerConfig, embedding_width, student_config
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.collate import PairCollator, tokenized
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.evaluation.zero_shot import evaluate_zero_shot, zero_shot_classifier
from clipmap_hf.families import SIGLIP
from clipmap_hf.models.features import ClipFeatures, encode_images, encode_texts
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.models.towers import Tower
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.mapping import MappingTrainer
from clipmap_hf.starts import STARTS, check_start, start_mapper
from clipmap_hf.starts.selection.masks import Masks
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments
from clipmap_hf.training.optimization import parameter_groups
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.logits import clamp_scale, learn_bias, logit_parameters, set_scale
from clipmap_hf.training.stages.mapping import MappingStage


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=2)
)
GOES_THROUGH_LAYERS = sorted(name for name, start in STARTS.items() if start.layerwise)
SELECTIONS = ("magnitude", "manual", "random_selection", "taylor")
MIXED = {"affinity": 1.0, "sigmoid": 0.1}


@pytest.fixture
def processor(siglip_processor) -> SiglipProcessor:
    return siglip_processor


@pytest.fixture
def folder(siglip_folder) -> Path:
    return siglip_folder


@pytest.fixture
def batch(folder, pairs_parquet) -> dict[str, torch.Tensor]:
    loaded = load_processor(str(folder))
    collated = PairCollator(loaded.tokenizer, loaded.image_processor)(list(load_pairs(str(pairs_parquet)))[::3])
    return {name: collated[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def test_texts_have_the_full_length_and_no_mask(folder, processor):
    tokenizer = load_processor(str(folder)).tokenizer
    assert isinstance(load_processor(str(folder)), SiglipProcessor)
    tokens = tokenized(tokenizer, ["red bar", "red " * 100])
    assert tokens["input_ids"].shape == (2, 64) and tokens["attention_mask"].all()
    expected = processor.tokenizer(["red bar"], padding="max_length", max_length=64, return_tensors="pt")
    torch.testing.assert_close(tokens["input_ids"][:1], expected["input_ids"], atol=0, rtol=0)


def test_features_are_the_models_own(siglip, batch):
    with torch.no_grad():
        output = siglip(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])  # as trained: no mask at all
        images = encode_images(siglip, batch["pixel_values"])
        texts = encode_texts(siglip, batch["input_ids"], batch["attention_mask"])
    features = ClipFeatures.from_output(output, siglip.logit_scale, siglip.logit_bias)
    torch.testing.assert_close(features.logits_per_image(), output.logits_per_image, atol=1e-5, rtol=0)
    torch.testing.assert_close(images, output.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, output.text_embeds, atol=1e-6, rtol=0)


def test_the_joint_embedding_is_as_wide_as_the_vision_tower(siglip):
    student = student_config(siglip.config, SMALL)
    assert student.text_config.projection_size == embedding_width(student) == 32
    with pytest.raises(
        ValueError, match="projection_dim=48, but in a model of type 'siglip' images have no projection"
    ):
        student_config(siglip.config, ClipMapConfig(projection_dim=48))


def test_a_front_slice_is_what_it_says(siglip):
    """`in_proj` holds query, key and value: the front of each is kept, not the front of all three."""
    teacher, student = siglip.state_dict(), start_mapper(siglip, SMALL).export().state_dict()
    name = "vision_model.head.attention.in_proj_weight"
    expected = teacher[name].unflatten(0, (3, 64))[:, :32, :32].flatten(0, 1)
    torch.testing.assert_close(student[name], expected, atol=0, rtol=0)
    name = "vision_model.head.mlp.fc1.weight"
    torch.testing.assert_close(student[name], teacher[name][:128, :32], atol=0, rtol=0)
    name = "text_model.head.weight"
    torch.testing.assert_close(student[name], teacher[name][:32, :16], atol=0, rtol=0)
    for name in ("logit_scale", "logit_bias"):
        torch.testing.assert_close(student[name], teacher[name], atol=0, rtol=0)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_keep_whole_parts(siglip, batch, name):
    batches = [batch] if STARTS[name].reads_pairs else None
    mapper = start_mapper(siglip, ClipMapConfig(vision=SMALL.vision, text=SMALL.text, initializer=name), batches)
    for operator in mapper.operators.values():
        assert (operator().sum(dim=-1) == 1).all() and (operator().amax(dim=-1) == 1).all()
    heads = mapper.operators["vision_pool"]().argmax(dim=-1).unflatten(0, (2, 16))
    assert (heads == heads[:, :1] + torch.arange(16)).all() and (heads[:, 0] % 16 == 0).all()


@pytest.mark.parametrize("name", ["magnitude", "taylor"])
def test_dead_parts_of_the_pooling_head_are_not_kept(siglip, batch, name):
    model = SiglipModel(siglip.config)
    model.load_state_dict(siglip.state_dict())
    head = model.vision_model.head
    for tensor in (head.attention.in_proj_weight.data, head.attention.in_proj_bias.data):
        tensor.unflatten(0, (3, 4, 16))[:, 0] = 0  # the first of four heads
    head.attention.out_proj.weight.data[:, :16] = 0
    head.mlp.fc1.weight.data[:100], head.mlp.fc1.bias.data[:100], head.mlp.fc2.weight.data[:, :100] = 0, 0, 0
    batches = [batch] if STARTS[name].reads_pairs else None
    mapper = start_mapper(model, ClipMapConfig(vision=SMALL.vision, initializer=name), batches)
    assert mapper.operators["vision_pool"]().argmax(dim=-1).min() >= 16
    assert mapper.operators["vision_pool_ffn"]().argmax(dim=-1).min() >= 100


@pytest.mark.parametrize("name", GOES_THROUGH_LAYERS)
def test_starts_that_go_through_layers_are_refused_with_those_that_work(folder, pairs_parquet, name):
    check_start(ClipMapConfig(initializer="taylor"), SIGLIP, has_pairs=True)
    with pytest.raises(
        ValueError, match=rf"initializer='{name}' goes through .* family 'siglip'.*'diagonal'.*'taylor'"
    ):
        ClipMapCompressor.from_pretrained(folder, SMALL, initializer=name, calibration_data=str(pairs_parquet))


def test_what_goes_through_layers_is_refused(siglip):
    with pytest.raises(ValueError, match="'siglip' cannot be gone through layer by layer"):
        Tower(siglip, "vision")
    with pytest.raises(ValueError, match="'siglip' cannot be masked"):
        Masks(siglip.config, SIGLIP)


def test_the_cost_is_that_of_the_formula(siglip):
    cost = model_cost(siglip.config)
    assert cost.parameters == sum(parameter.numel() for parameter in siglip.parameters())

    def layers(tokens: int, width: int, count: int) -> int:
        return count * (tokens * (4 * width**2 + 2 * width * 4 * width) + 2 * tokens**2 * width)

    vision = 16 * 3 * 8 * 8 * 64 + layers(16, 64, 4)
    head = 64**2 * (1 + 2 * 16 + 1) + 2 * 16 * 64 + 2 * 64 * 256  # query, keys and values, out; attention; MLP
    assert cost.vision_macs == vision + head
    assert cost.text_macs == layers(64, 48, 3) + 48 * 64


def test_the_contrastive_stage_trains_the_sigmoid_loss_and_its_bias(siglip, batch):
    model = SiglipModel(siglip.config)
    stage = ContrastiveStage(model, logit_scale=10.0, learn_logit_scale=True)
    assert model.logit_bias.item() == -10 and logit_parameters(model) == [model.logit_scale, model.logit_bias]
    output = stage([batch])
    with torch.no_grad():
        expected = model(**batch, return_loss=True).loss
    torch.testing.assert_close(output["loss"], expected, atol=1e-5, rtol=0)
    output["loss"].backward()
    assert model.logit_bias.grad.item() != 0 and model.logit_scale.grad.item() != 0
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    stage([{name: tensor[half] for name, tensor in batch.items()} for half in (slice(4), slice(4, 8))])[
        "loss"
    ].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-5, rtol=1e-4)
    undecayed = [p for group in parameter_groups(stage, 0.2) if not group["weight_decay"] for p in group["params"]]
    assert {id(model.logit_scale), id(model.logit_bias)} <= {id(parameter) for parameter in undecayed}


def test_the_bias_is_trained_by_the_sigmoid_loss_only(siglip, tiny_teacher, batch):
    student = start_mapper(siglip, SMALL).export()
    DistillationStage(student, teachers=[siglip])
    assert not student.logit_bias.requires_grad
    stage = DistillationStage(student, teachers=[siglip], losses=MIXED)
    assert stage([batch])["sigmoid"].item() > 0 and student.logit_bias.requires_grad
    mapper = start_mapper(siglip, SMALL)
    MappingStage(mapper, losses={"sigmoid": 1.0})([batch])["loss"].backward()
    assert mapper.logit_bias.grad.item() != 0 and mapper.operators["vision_pool"].delta.grad.abs().max() > 0
    with pytest.raises(ValueError, match="learns a logit bias, which models of type 'siglip' have"):
        DistillationStage(tiny_teacher, teachers=[tiny_teacher], losses={"sigmoid": 1.0})


def test_scale_and_bias_are_set_learned_and_bounded(siglip):
    model = SiglipModel(siglip.config)
    set_scale(model, 10.0, learn=True)
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor([10.0]), atol=1e-4, rtol=0)
    model.logit_scale.data.fill_(9.0)
    clamp_scale(model)
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor([100.0]), atol=1e-2, rtol=0)
    learn_bias(model, {"affinity": 1.0}, first=-3.0)
    assert model.logit_bias.item() == -3 and not model.logit_bias.requires_grad


@pytest.mark.slow
def test_a_siglip_is_compressed_from_end_to_end(folder, pairs_parquet, tiny_pairs, tmp_path, fresh_accelerator):
    data = DataArguments(train_data=str(pairs_parquet), eval_data=str(pairs_parquet))
    numbers = {"max_steps": 2, "batch_size": 8, "micro_batch_size": 4}
    compressor = ClipMapCompressor.from_pretrained(folder, SMALL)
    assert "without token embedding" in str(compressor.cost())
    run = RunArguments(output_dir=str(tmp_path / "mapped"))
    arguments = MappingStageArguments(losses={"sigmoid": 1.0}, **numbers)
    MappingTrainer(compressor, arguments, context=RunContext(run, data)).train()
    mapped = SiglipModel.from_pretrained(tmp_path / "mapped")
    assert not torch.equal(mapped.logit_bias, load_model(str(folder)).logit_bias)
    again = ClipMapCompressor.from_pretrained(tmp_path / "mapped")
    exported = again.to(compressor.mapper.logit_scale.device).export().cpu()  # mapped where it was written
    torch.testing.assert_close(dict(mapped.state_dict()), dict(exported.state_dict()), atol=0, rtol=0)

    run = RunArguments(output_dir=str(tmp_path / "distilled"))
    teacher = Teacher.load(str(folder))
    cache = TeacherCacheArguments(teacher_cache=str(tmp_path / "cache"), views=1)
    distillation = DistillationStageArguments(losses=MIXED, **numbers)
    DistillationTrainer(mapped, teacher, distillation, context=RunContext(run, data, None, cache)).train()
    student, processor = SiglipModel.from_pretrained(run.output_dir), load_processor(run.output_dir)
    collator = PairCollator(processor.tokenizer, processor.image_processor)
    metrics = evaluate_retrieval(student, [collator(list(load_pairs(str(pairs_parquet))))])
    assert 0 <= metrics["mean_recall"] <= 1
    names = sorted({row["keywords"][0] for row in tiny_pairs})
    classifier = zero_shot_classifier(student, processor.tokenizer, names, ["a {} drawing"])
    labels = torch.tensor([names.index(row["keywords"][0]) for row in tiny_pairs])
    pixels = processor.image_processor([row["image"] for row in tiny_pairs], return_tensors="pt")["pixel_values"]
    assert (
        0 <= evaluate_zero_shot(student, [{"pixel_values": pixels, "labels": labels}], classifier)["accuracy@1"] <= 1
    )

    card = (tmp_path / "distilled" / "README.md").read_text(encoding="utf-8")
    assert "import SiglipModel, AutoProcessor" in card and "`SiglipVisionModel`" in card
    assert isinstance(AutoProcessor.from_pretrained(run.output_dir, backend="pil"), SiglipProcessor)
    classify = pipeline("zero-shot-image-classification", model=run.output_dir)
    assert len(classify(tiny_pairs[0]["image"], candidate_labels=names)) == len(names)
