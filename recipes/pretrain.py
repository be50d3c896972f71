"""
Trains a `CLIPModel` from scratch: a teacher, or the from-scratch baseline of a student.

It learns from image–text pairs. The architecture is given by numbers, or taken from another model with
`--config_from`; with numbers, a small BPE tokenizer is trained on the captions as well.

    python recipes/pretrain.py --train_data pairs.parquet --eval_data test.parquet --output_dir teacher
    accelerate launch recipes/pretrain.py --config_from student --train_data pairs.parquet --output_dir baseline
"""

from dataclasses import dataclass, field

from clipmap_hf.cli.parsing import arguments_yaml, parse_arguments
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.run_arguments import RunArguments


@dataclass
class ArchitectureArguments:
    config_from: str | None = field(
        default=None, metadata={"help": "Id or folder of a CLIP whose shape, tokenizer and processor to take."}
    )
    image_size: int = field(default=64, metadata={"help": "Side of the square input, in pixels."})
    patch_size: int = field(default=16, metadata={"help": "Side of a patch, in pixels."})
    head_width: int = field(default=32, metadata={"help": "Width of an attention head."})
    vision_hidden_size: int = field(default=192, metadata={"help": "Width of the vision tower."})
    vision_num_hidden_layers: int = field(default=8, metadata={"help": "Depth of the vision tower."})
    text_hidden_size: int = field(default=128, metadata={"help": "Width of the text tower."})
    text_num_hidden_layers: int = field(default=4, metadata={"help": "Depth of the text tower."})
    projection_dim: int = field(default=128, metadata={"help": "Width of the joint embedding."})
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary of the new tokenizer."})
    context_length: int = field(default=24, metadata={"help": "Longest caption, in tokens."})


def main() -> None:
    data, architecture, run, arguments = parse_arguments(
        DataArguments, ArchitectureArguments, RunArguments, StageArguments, description=__doc__
    )
    from accelerate.utils import set_seed
    from transformers import AutoModel

    from clipmap_hf.distributed import join_processes
    from clipmap_hf.families import family_for
    from clipmap_hf.models.loading import load_config, load_processor
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.pretraining import PretrainingTrainer
    from clipmap_hf.ternary.integration import as_float_config

    join_processes()
    context = RunContext(run, data, arguments_yaml(data, architecture, run, arguments))
    set_seed(run.seed)
    if architecture.config_from is not None:
        config = as_float_config(load_config(architecture.config_from))
        processor = load_processor(architecture.config_from, backend=data.image_backend)
    elif not data.paired:
        raise ValueError("A tokenizer is learned from captions; give pairs, without train_images and train_texts.")
    else:
        columns = [*data.caption_column, *data.keyword_column]
        config, processor = new_architecture(architecture, context.pairs.pairs, columns)
    family_for(config)  # raises if this is no CLIP
    model = AutoModel.from_config(config)
    PretrainingTrainer(model, arguments, processing_class=processor, context=context).train()


def new_architecture(shape: ArchitectureArguments, pairs, caption_columns: list[str]):
    """A `CLIPConfig` of the given shape, and a processor whose tokenizer is learned from the captions."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPProcessor

    from clipmap_hf.data.captions import caption_text, filled_texts
    from clipmap_hf.data.tokenizer import train_clip_tokenizer

    texts = (caption_text(row) for column in caption_columns for row in pairs[column] if filled_texts(row))
    tokenizer = train_clip_tokenizer(texts, shape.vocab_size, shape.context_length)
    tower = {"vision": (shape.vision_hidden_size, shape.vision_num_hidden_layers)}
    tower["text"] = (shape.text_hidden_size, shape.text_num_hidden_layers)
    sizes = {
        name: {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // shape.head_width,
            "projection_dim": shape.projection_dim,
            "hidden_act": "gelu",
        }
        for name, (width, layers) in tower.items()
    }
    sizes["vision"] |= {"image_size": shape.image_size, "patch_size": shape.patch_size}
    sizes["text"] |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": shape.context_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(vision_config=sizes["vision"], text_config=sizes["text"], projection_dim=shape.projection_dim)
    square = {"height": shape.image_size, "width": shape.image_size}
    image_processor = CLIPImageProcessorPil(size=square, do_center_crop=False)
    return config, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
