import string

import pytest
import torch
from conftest import IMAGE_SIZE, randomize
from transformers import (
    CLIPImageProcessorPil,
    CLIPProcessor,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2TextModelWithProjection,
    XLMRobertaTokenizer,
)

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.collate import PairCollator, tokenized
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.features import encode_texts
from clipmap_hf.models.loading import load_processor
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.models.towers import Tower, ends_at_largest_id
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.mapping import MappingTrainer
from clipmap_hf.starts.calibrated.batches import calibration_batch
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments
from clipmap_hf.training.run_arguments import RunArguments


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2),
    text=TowerConfig(hidden_size=16, num_hidden_layers=2),
    refit_steps=2,
)


@pytest.fixture(scope="module")
def folder(metaclip2, tmp_path_factory):
    """A MetaCLIP 2 whose tokenizer is of the released models' kind: texts end at id 2, and it knows no length."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = ["▁", *string.ascii_lowercase]
    tokenizer = XLMRobertaTokenizer(vocab=[*((one, 0.0) for one in special), *((one, -1.0) for one in letters)])
    config = MetaClip2Config.from_dict(metaclip2.config.to_dict())
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    for name, value in {**ids, "vocab_size": len(tokenizer)}.items():
        setattr(config.text_config, name, value)
    folder = tmp_path_factory.mktemp("metaclip2")
    randomize(MetaClip2Model(config)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_texts_are_cut_where_the_positions_end(folder):
    tokenizer = load_processor(str(folder)).tokenizer
    tokens = tokenized(tokenizer, ["red bar", "red bar " * 10])
    assert tokens["input_ids"].shape == (2, 16)
    assert (tokens["input_ids"] == 2).sum(dim=1).tolist() == [1, 1]  # the end is kept


def test_the_tower_pools_where_the_model_does(folder):
    """An end token of 2 says the largest id in old configs of CLIP, but id 2 here."""
    model = MetaClip2Model.from_pretrained(folder).eval()
    batch = tokenized(load_processor(str(folder)).tokenizer, ["red bar", "blue"])
    made_up = calibration_batch({"pixel_values": torch.zeros(2, 3, 32, 32)}, model.config, 0)
    made_up["attention_mask"] = torch.ones_like(made_up["input_ids"])
    tower = Tower(model, "text")
    assert not ends_at_largest_id(model.config.text_config)
    for texts in (batch, made_up):
        assert (texts["input_ids"] == 2).any(dim=1).all()
        with torch.no_grad():
            stream = tower.embed(texts)
            for layer in tower.layers:
                stream = tower.through(layer, stream)
            found = torch.nn.functional.normalize(tower.embeds(stream, tower.ends(texts)), dim=-1)
            expected = encode_texts(model, texts["input_ids"], texts["attention_mask"])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_metaclip2_is_compressed_from_end_to_end(folder, pairs_parquet, tmp_path, fresh_accelerator):
    data = DataArguments(train_data=str(pairs_parquet), eval_data=str(pairs_parquet))
    numbers = {"max_steps": 2, "batch_size": 8}
    compressor = ClipMapCompressor.from_pretrained(
        folder, SMALL, calibration_data=str(pairs_parquet), calibration_pairs=16
    )
    assert compressor.map_config.initializer == "calibrated"
    context = RunContext(RunArguments(output_dir=str(tmp_path / "mapped")), data)
    MappingTrainer(compressor, MappingStageArguments(**numbers), context=context).train()
    mapped = MetaClip2Model.from_pretrained(tmp_path / "mapped")
    exported = compressor.export().cpu()
    torch.testing.assert_close(dict(mapped.state_dict()), dict(exported.state_dict()), atol=0, rtol=0)

    run = RunArguments(output_dir=str(tmp_path / "distilled"))
    distillation, context = DistillationStageArguments(**numbers), RunContext(run, data)
    DistillationTrainer(mapped, Teacher.load(str(folder)), distillation, context=context).train()
    student, processor = MetaClip2Model.from_pretrained(run.output_dir), load_processor(run.output_dir)
    collator = PairCollator(processor.tokenizer, processor.image_processor)
    batches = [collator(list(load_pairs(str(pairs_parquet))))]
    assert evaluate_retrieval(student, batches) == evaluate_retrieval(mapped, batches)  # which was trained in place
    assert "`MetaClip2VisionModelWithProjection`" in (tmp_path / "distilled" / "README.md").read_text(encoding="utf-8")
    tower = MetaClip2TextModelWithProjection.from_pretrained(run.output_dir).eval()
    texts = tokenized(processor.tokenizer, ["red bar", "blue"])
    with torch.no_grad():
        alone = torch.nn.functional.normalize(tower(**texts).text_embeds, dim=-1)
        torch.testing.assert_close(alone, encode_texts(student.eval(), *texts.values()), atol=1e-6, rtol=0)
