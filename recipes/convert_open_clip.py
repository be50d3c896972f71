"""
Converts a `CLIPModel` folder to an open_clip one, or back.

    python recipes/convert_open_clip.py --model student --to open_clip --output_dir student-open-clip
    python recipes/convert_open_clip.py --model student-open-clip --to transformers --output_dir student

open_clip then loads it by `open_clip.create_model_and_transforms("local-dir:student-open-clip")`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clipmap_hf.cli.parsing import parse_arguments


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or folder of the model to convert."})
    to: Literal["open_clip", "transformers"] = field(metadata={"help": "What to make of it."})
    output_dir: str = field(metadata={"help": "Folder of the result."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    repo_id: str | None = field(
        default=None, metadata={"help": "Hub id that an open_clip model will have, where it looks for its tokenizer."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of an open_clip model that brings none: a Hub id or folder."}
    )


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    from clipmap_hf.export.open_clip_folder import read_open_clip_folder, write_open_clip_folder
    from clipmap_hf.files.atomic import atomic_files
    from clipmap_hf.models.loading import load_config, load_model, load_processor

    revision = arguments.model_revision
    if arguments.to == "open_clip":
        dtype = load_config(arguments.model, revision=revision).dtype or "float32"
        model = load_model(arguments.model, revision=revision, dtype=dtype)
        processor = load_processor(arguments.model, revision=revision)
        write_open_clip_folder(arguments.output_dir, model, processor, arguments.repo_id)
    else:
        model, processor = read_open_clip_folder(arguments.model, arguments.tokenizer, revision=revision)
        with atomic_files(Path(arguments.output_dir)) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)


if __name__ == "__main__":
    main()
