import string

import pytest
import torch
from conftest import IMAGE_SIZE
from transformers import (
    AutoProcessor,
    BertTokenizer,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    pipeline,
)

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.loading import load_processor
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.mapping import MappingTrainer
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments
from clipmap_hf.training.run_arguments import RunArguments


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=2)
)


@pytest.fixture(scope="module")
def folder(chinese_clip, tmp_path_factory):
    """A Chinese-CLIP with a tokenizer of letters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})
    images = ChineseCLIPImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)
    folder = tmp_path_factory.mktemp("chinese_clip")
    chinese_clip.save_pretrained(folder)
    ChineseCLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_the_token_table_is_counted_apart(chinese_clip):
    vocabulary = chinese_clip.text_model.embeddings.word_embeddings.weight
    assert model_cost(chinese_clip.config).token_embedding_parameters == vocabulary.numel()


def test_a_calibrated_start_is_refused(folder, pairs_parquet):
    with pytest.raises(ValueError, match="not written for the family 'chinese_clip'"):
        ClipMapCompressor.from_pretrained(folder, SMALL, calibration_data=str(pairs_parquet))


@pytest.mark.slow
def test_a_chinese_clip_is_compressed_from_end_to_end(folder, pairs_parquet, tiny_pairs, tmp_path, fresh_accelerator):
    data = DataArguments(train_data=str(pairs_parquet), eval_data=str(pairs_parquet))
    numbers = {"max_steps": 2, "batch_size": 8}
    compressor = ClipMapCompressor.from_pretrained(folder, SMALL)
    context = RunContext(RunArguments(output_dir=str(tmp_path / "mapped")), data)
    MappingTrainer(compressor, MappingStageArguments(**numbers), context=context).train()
    mapped = ChineseCLIPModel.from_pretrained(tmp_path / "mapped")
    exported = compressor.export().cpu()
    torch.testing.assert_close(dict(mapped.state_dict()), dict(exported.state_dict()), atol=0, rtol=0)

    run = RunArguments(output_dir=str(tmp_path / "distilled"))
    distillation, context = DistillationStageArguments(**numbers), RunContext(run, data)
    DistillationTrainer(mapped, Teacher.load(str(folder)), distillation, context=context).train()
    student, processor = ChineseCLIPModel.from_pretrained(run.output_dir), load_processor(run.output_dir)
    batches = [PairCollator(processor.tokenizer, processor.image_processor)(list(load_pairs(str(pairs_parquet))))]
    assert evaluate_retrieval(student, batches) == evaluate_retrieval(mapped, batches)  # which was trained in place
    assert isinstance(AutoProcessor.from_pretrained(run.output_dir, backend="pil"), ChineseCLIPProcessor)
    classify = pipeline("zero-shot-image-classification", model=run.output_dir)
    image = tiny_pairs[0]["image"]
    assert len(classify(image, candidate_labels=["red", "blue"], hypothesis_template="{}")) == 2
    assert "`ChineseCLIPVisionModel`" in (tmp_path / "distilled" / "README.md").read_text(encoding="utf-8")
