"""
Evaluates any CLIP model folder or Hub id: retrieval on image–text pairs, zero-shot classification on labeled images.

    python recipes/evaluate.py --model student --eval_data test.parquet --output results.json
    python recipes/evaluate.py --model student --eval_data test.parquet --label_column group --templates 'a {}'
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from clipmap_hf.training.parsing import parse_arguments


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "Hub id or folder of a CLIPModel."})
    eval_data: str = field(metadata={"help": "Hub id, image folder, or glob of parquet files or webdataset tars."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    eval_split: str = field(
        default="train", metadata={"help": "Split of `eval_data` (plain files have only `train`)."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(default="caption", metadata={"help": "Column of the captions."})
    label_column: str | None = field(default=None, metadata={"help": "Classify by this column instead of retrieving."})
    templates: list[str] = field(
        default_factory=list, metadata={"help": "Prompts with {} for the class name; eight of OpenAI's by default."}
    )
    batch_size: int = field(default=256, metadata={"help": "Images at a time."})
    image_backend: Literal["pil", "torchvision"] = field(default="pil", metadata={"help": "Of the image processor."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def main() -> None:
    (arguments,) = parse_arguments(EvaluateArguments, description=__doc__)
    import transformers

    from clipmap_hf.distributed import join_processes
    from clipmap_hf.models import load_model, load_processor

    processes = join_processes()
    model = load_model(arguments.model, revision=arguments.model_revision).to(processes.device)
    processor = load_processor(arguments.model, revision=arguments.model_revision, backend=arguments.image_backend)
    metrics = (retrieval if arguments.label_column is None else classification)(arguments, model, processor)
    processes.print("\n".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
    if arguments.output is not None and processes.is_main_process:
        result = {"metrics": metrics, "arguments": asdict(arguments), "transformers": transformers.__version__}
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


def retrieval(arguments: EvaluateArguments, model, processor) -> dict[str, float]:
    from clipmap_hf.data.evaluation_pairs import evaluation_pairs
    from clipmap_hf.evaluation.retrieval import evaluate_retrieval

    pairs = evaluation_pairs(
        arguments.eval_data,
        processor,
        split=arguments.eval_split,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        batch_size=arguments.batch_size,
    )
    return evaluate_retrieval(model, pairs)


def classification(arguments: EvaluateArguments, model, processor) -> dict[str, float]:
    from clipmap_hf.data.pairs import load_pairs
    from clipmap_hf.evaluation.labeled import class_names, labeled_batches
    from clipmap_hf.evaluation.zero_shot import DEFAULT_TEMPLATES, evaluate_zero_shot, zero_shot_classifier

    images = load_pairs(
        arguments.eval_data,
        split=arguments.eval_split,
        image_column=arguments.image_column,
        caption_columns=[arguments.label_column],
    )
    names = class_names(images, arguments.label_column)
    classifier = zero_shot_classifier(model, processor.tokenizer, names, arguments.templates or DEFAULT_TEMPLATES)
    batches = labeled_batches(images, processor.image_processor, arguments.label_column, names, arguments.batch_size)
    return evaluate_zero_shot(model, batches, classifier)


if __name__ == "__main__":
    main()
