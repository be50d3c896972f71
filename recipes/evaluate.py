"""
Evaluates any CLIP model, a folder or Hub id, by retrieval and zero-shot classification.

Retrieval is measured on image–text pairs, classification on labeled images, and both on the sets of the literature.

    python recipes/evaluate.py --model student --sets imagenet1k cifar10 mscoco --output results
    python recipes/evaluate.py --model student --suite paper --output results
    python recipes/evaluate.py --model student --eval_data test.parquet --output results.json
    python recipes/evaluate.py --model student --eval_data test.parquet --label_column group --templates 'a {}'
    python recipes/evaluate.py --model student --index_model teacher --eval_data test.parquet

    python recipes/evaluate.py --model student --eval_data photos/ --agreement_with teacher --texts queries.txt

A student for a fixed list of texts (`compress.py --labels`) is evaluated on that list: its labels are the classes and
captions that it knows, and the texts of an agreement.

With `--index_model`, the student's texts search the other model's images, and the student's images its texts: what an
index that was made by the teacher is worth to the student.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from clipmap_hf.cli.parsing import parse_arguments


@dataclass
class EvaluateArguments:
    model: str = field(
        metadata={"help": "Hub id or folder of a CLIPModel, or of a student for a fixed list of texts."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Hub id, image folder, or glob of parquet files or webdataset tars."}
    )
    sets: list[str] = field(default_factory=list, metadata={"help": "Instead: names of `EVAL_SETS`."})
    suite: str | None = field(default=None, metadata={"help": "Instead: all sets of a paper; `paper` is CLIP-Map's."})
    sets_dir: str | None = field(
        default=None, metadata={"help": "Folder of local sets; by default, those on the Hub."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    eval_split: str = field(
        default="train", metadata={"help": "Split of `eval_data` (plain files have only `train`)."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(default="caption", metadata={"help": "Column of the captions."})
    index_model: str | None = field(
        default=None,
        metadata={"help": "Search this model's embeddings by the model's queries: an index that exists stays in use."},
    )
    agreement_with: str | None = field(
        default=None,
        metadata={
            "help": "Instead: how far the model agrees with this one, on images without captions and on `texts`."
        },
    )
    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "Texts of an agreement: queries.txt, labels:names.txt, pairs.parquet:title or words."},
    )
    label_column: str | None = field(default=None, metadata={"help": "Classify by this column instead of retrieving."})
    classnames: str | None = field(
        default=None,
        metadata={"help": "Text file with a class name a line, in the order of the class numbers in `label_column`."},
    )
    templates: list[str] = field(
        default_factory=list, metadata={"help": "Prompts with {} for the class name; eight of OpenAI's by default."}
    )
    batch_size: int = field(default=256, metadata={"help": "Images at a time."})
    image_backend: Literal["pil", "torchvision"] = field(default="pil", metadata={"help": "Of the image processor."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode the images of sets."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results; of sets, a folder."})

    def __post_init__(self):
        by_sets = bool(self.sets or self.suite)
        if by_sets == (self.eval_data is not None):
            raise ValueError("Give either eval_data, or sets or a suite.")
        if by_sets and (self.output is None or self.label_column is not None or self.templates):
            raise ValueError("Sets need an output folder, and have labels and templates of their own.")
        if self.classnames is not None and self.label_column is None:
            raise ValueError("classnames name the classes of label_column; give that too, or leave them out.")
        if self.texts and self.agreement_with is None:
            raise ValueError("The texts are those of an agreement; give agreement_with too, or leave them out.")
        if self.agreement_with is not None and (
            by_sets or self.label_column is not None or self.index_model is not None
        ):
            raise ValueError(
                "An agreement is measured by itself, on eval_data; leave out sets, labels and index_model."
            )
        if self.index_model is not None and (by_sets or self.label_column is not None):
            raise ValueError("index_model is for retrieval on eval_data; leave it out, or the sets or label_column.")


def main() -> None:
    (arguments,) = parse_arguments(EvaluateArguments, description=__doc__)
    import transformers

    from clipmap_hf.distributed import join_processes
    from clipmap_hf.evaluation.sets import chosen_sets
    from clipmap_hf.models.label_model import is_label_folder, load_label_model
    from clipmap_hf.models.loading import load_model, load_processor

    sets = None if arguments.eval_data is not None else chosen_sets(arguments.sets, arguments.suite)
    processes = join_processes()
    source = {"source": arguments.model, "revision": arguments.model_revision}
    if of_labels := is_label_folder(**source):
        check_labels(arguments)
        arguments.templates = ["{}"]  # its labels as they are
        model, processor = load_label_model(**source, backend=arguments.image_backend)
    else:
        if arguments.agreement_with is not None and not arguments.texts:
            raise ValueError("An agreement is with a model and on texts; give texts too, such as --texts queries.txt.")
        model, processor = load_model(**source), load_processor(**source, backend=arguments.image_backend)
    model.to(processes.device)
    if sets is not None:
        processes.print(on_sets(arguments, model, processor, sets))
        return
    if arguments.agreement_with is not None:
        measure = agreement_on_labels if of_labels else agreement
    else:
        measure = retrieval if arguments.label_column is None else classification
    metrics = measure(arguments, model, processor)
    processes.print("\n".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
    if arguments.output is not None and processes.is_main_process:
        result = {"metrics": metrics, "arguments": asdict(arguments), "transformers": transformers.__version__}
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def check_labels(arguments: EvaluateArguments) -> None:
    """Refuses what a student that knows a list of texts and no others cannot be asked."""
    asked = [name for name in ("sets", "suite", "index_model", "texts", "templates") if getattr(arguments, name)]
    if asked:
        raise ValueError(
            f"{arguments.model!r} is a student for a fixed list of texts, and {asked} ask for others. Leave them out; "
            "what it knows is measured on eval_data."
        )


def on_sets(arguments: EvaluateArguments, model, processor, sets) -> str:
    from clipmap_hf.evaluation.suite import evaluate_sets, summary_table

    named = {"model_id": arguments.model, "revision": arguments.model_revision}
    reading = {name: getattr(arguments, name) for name in ("sets_dir", "batch_size", "num_workers")}
    return summary_table(evaluate_sets(model, processor, sets, arguments.output, **named, **reading))


def retrieval(arguments: EvaluateArguments, model, processor) -> dict[str, float]:
    from clipmap_hf.evaluation.retrieval import evaluate_retrieval
    from clipmap_hf.models.loading import load_model

    index = arguments.index_model and load_model(arguments.index_model).to(model.device)
    return evaluate_retrieval(
        model,
        arguments.eval_data,
        processor=processor,
        index_model=index,
        split=arguments.eval_split,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        batch_size=arguments.batch_size,
    )


def agreement(arguments: EvaluateArguments, model, processor) -> dict[str, float]:
    from clipmap_hf.data.texts import load_texts
    from clipmap_hf.evaluation.agreement import evaluate_agreement
    from clipmap_hf.models.loading import load_model

    return evaluate_agreement(
        model,
        load_model(arguments.agreement_with).to(model.device),
        arguments.eval_data,
        load_texts(arguments.texts).distinct,
        processor=processor,
        image_column=arguments.image_column,
        split=arguments.eval_split,
        batch_size=arguments.batch_size,
    )


def agreement_on_labels(arguments: EvaluateArguments, model, processor) -> dict[str, float]:
    """With the same texts for both, an agreement is one of images."""
    from clipmap_hf.evaluation.agreement import evaluate_agreement
    from clipmap_hf.models.label_model import LabelModel
    from clipmap_hf.models.loading import load_model

    teacher = load_model(arguments.agreement_with).to(model.text_embeds.device)
    found = evaluate_agreement(
        model,
        LabelModel(teacher, model.text_embeds, model.logit_scale.exp()),
        arguments.eval_data,
        processor.tokenizer.labels,
        processor=processor,
        image_column=arguments.image_column,
        split=arguments.eval_split,
        batch_size=arguments.batch_size,
    )
    return {name: value for name, value in found.items() if name in ("decisions", "image_neighbors", "image_cosine")}


def classification(arguments: EvaluateArguments, model, processor) -> dict[str, float]:
    from clipmap_hf.evaluation.zero_shot import DEFAULT_TEMPLATES, evaluate_zero_shot

    names = arguments.classnames and Path(arguments.classnames).read_text(encoding="utf-8").splitlines()
    return evaluate_zero_shot(
        model,
        arguments.eval_data,
        processor=processor,
        label_column=arguments.label_column,
        classnames=names,
        image_column=arguments.image_column,
        split=arguments.eval_split,
        templates=arguments.templates or DEFAULT_TEMPLATES,
        batch_size=arguments.batch_size,
    )


if __name__ == "__main__":
    main()
