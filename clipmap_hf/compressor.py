"""`ClipMapCompressor`: a teacher, the operators that map it, and the student they make, behind one object."""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from clipmap_hf.config import Budget, ClipMapConfig, requested_config
from clipmap_hf.costs.cost import CostReport
from clipmap_hf.data.calibration_pairs import sampled_pairs
from clipmap_hf.data.held_batches import HeldBatches
from clipmap_hf.data.pairs import PairSource, holds_pairs
from clipmap_hf.distributed import calibration_device
from clipmap_hf.families import family_for
from clipmap_hf.hub.card import config_yaml, render_card
from clipmap_hf.hub.folder import MAP_FOLDER, write_card, write_student_folder
from clipmap_hf.hub.map_folder import read_map, write_map
from clipmap_hf.hub.push import push_folder
from clipmap_hf.hub.results import SetResults
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.models.options import check_download_options
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.shapes import Choice, search_shape
from clipmap_hf.starts import named_start, start_mapper, start_of


__all__ = ["ClipMapCompressor"]


class ClipMapCompressor(nn.Module):
    """
    Compresses a CLIP model by mapping its weights into a smaller one.

    ```python
    compressor = ClipMapCompressor.from_pretrained("openai/clip-vit-base-patch16", student="small")
    compressor.save_pretrained("out")  # CLIPModel.from_pretrained("out") loads the student
    ```

    Args:
        mapper: Maps the teacher's weights into the student's.
        processor: The teacher's tokenizer and image processor; the student uses the same.
        teacher_id: Hub id or folder of the teacher, to find it again.
        teacher_revision: Its commit on the Hub.
        choice: Why the student has this shape, if it was chosen within a budget; prints as a table.
    """

    def __init__(
        self,
        mapper: WeightMapper,
        processor: ProcessorMixin,
        teacher_id: str,
        teacher_revision: str | None = None,
        choice: Choice | None = None,
    ):
        super().__init__()
        self.mapper, self.processor, self.choice = mapper, processor, choice
        self.teacher_id, self.teacher_revision = teacher_id, teacher_revision

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike | PreTrainedModel,
        student: str | Budget | Mapping[str, Any] | ClipMapConfig | None = None,
        *,
        processor: ProcessorMixin | None = None,
        initializer: str | None = None,
        calibration_data: PairSource | Iterable[Mapping[str, torch.Tensor]] | None = None,
        calibration_pairs: int = 2048,
        image_column: str = "image",
        caption_column: str | None = "caption",
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        backend: str = "pil",
        **kwargs: Any,
    ) -> "ClipMapCompressor":
        """
        With `student`, starts to compress the CLIP model at `source` (which may itself be a compressed one). Without,
        goes on with the map that lies in `source/map`; the teacher's id and revision come from there.

        Args:
            source: Hub id or folder, or the teacher itself, a `CLIPModel` with a `name_or_path`, which is copied.
            student: A key of `PRESETS`; a `Budget` or its values by name, such as `{"params": "30M"}`, within which
                `choose_shape` finds the best shape (`choice` then explains it); or a `ClipMapConfig`.
            processor: Tokenizer and image processor of a teacher given as a model; by default those at its
                `name_or_path`.
            initializer: How the operators start, if `student` does not say it: by default `calibrated` with
                calibration data, `diagonal` without, and `diagonal` for a ResNet.
            calibration_data: What starts read that look at pairs, such as `calibrated`: anything `load_pairs` reads,
                a `Dataset` or a list of `(image, text)` among it; or batches of `pixel_values` and `input_ids`, in a
                list or a `DataLoader`.
            calibration_pairs: How many pairs to take of a data set.
            image_column: Its column of images.
            caption_column: Its column of captions; `None` for images alone, so that texts are made up.
            revision: Branch, tag or commit of `source` on the Hub.
            dtype: The teacher's weights are cast to it when loaded; the mapping itself is always fp32.
            device: Where the compressor lies afterwards, the CPU by default; `device_map` means the same, as in
                transformers. A start that reads pairs is computed on the process's accelerator anyhow.
            backend: Of the image processor, `pil` or `torchvision`.
            kwargs: Passed to every download (`token`, `cache_dir`, `local_files_only`, …).

        Raises:
            TypeError: If an argument is unknown, with the nearest that is known; or if `source` is none of these.
            ValueError: If `student` is unknown, does not fit the teacher, is a budget that no shape meets, or is
                missing where there is no map; if calibration data is missing or not used; if weights do not fit.
            OSError: If a file is missing or the Hub cannot be reached.
        """
        device = kwargs.pop("device_map", device)
        check_download_options(cls.from_pretrained, kwargs)
        options = {"backend": backend, "dtype": dtype, **kwargs}
        if student is None:
            if isinstance(source, PreTrainedModel) or processor is not None:
                raise ValueError("A map has its own teacher and processor; to compress a model, give the student.")
            if initializer is not None or calibration_data is not None:
                raise ValueError("A map that is gone on with has started already; leave initializer and data out.")
            source = ModelId(os.fspath(source), revision)
            return cls.from_map(source, partial(Teacher.load, **options), **kwargs).to(device)
        config = requested_config(student, initializer)
        teacher = Teacher.take(source, revision, processor, **options)
        if holds_pairs(calibration_data):
            given = {"image_column": image_column, "caption_column": caption_column, "once": start_of(config).matches}
            calibration_data = sampled_pairs(calibration_data, teacher.processor, calibration_pairs, **given)
        return cls.from_teacher(teacher, config, calibration_data).to(device)

    @classmethod
    def from_teacher(
        cls,
        teacher: Teacher,
        config: ClipMapConfig,
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
    ) -> "ClipMapCompressor":
        """
        Starts to compress a teacher that is loaded.

        Args:
            teacher: The model to compress. What reads pairs is computed on `calibration_device`, where it is left.
            config: The student's size, or its budget, and how the operators start.
            batches: Of calibration pairs, as `start_mapper` takes them, if the start reads pairs.

        Raises:
            TypeError: If `batches` is an iterator.
            ValueError: As in `start_mapper` and `search_shape`.
        """
        config = named_start(config, family_for(teacher.model.config), has_pairs=batches is not None)
        if batches is not None:
            batches = batches if isinstance(batches, HeldBatches) else HeldBatches(batches)
            teacher.model.to(calibration_device())
        choice = None if config.budget is None else search_shape(teacher.model, config, batches)
        config = config if choice is None else choice.config
        mapper = start_mapper(teacher.model, config, batches).cpu()
        return cls(mapper, teacher.processor, *teacher.source, choice).eval()

    @classmethod
    def from_map(
        cls, source: ModelId, load: Callable[[str, str | None], Teacher] = Teacher.load, **kwargs: Any
    ) -> "ClipMapCompressor":
        """
        Goes on with the map that lies in the folder or repository `source`.

        Args:
            source: Where the map is.
            load: From id and revision to the teacher that the map names.
            kwargs: Passed to every download.

        Raises:
            ValueError: If there is no map, or its weights do not fit.
            OSError: If a file of it is missing, or its teacher cannot be loaded.
        """
        teacher, mapper = read_map(source, load, **kwargs)
        return cls(mapper.cpu(), teacher.processor, *teacher.source).eval()

    def __repr__(self) -> str:
        sizes = []
        for tower in ("vision_config", "text_config"):
            teacher, student = (getattr(config, tower) for config in (self.mapper.plan.teacher, self.config))
            shapes = (f"{size.hidden_size} × {size.num_hidden_layers}" for size in (teacher, student))
            sizes.append(f"{tower.removesuffix('_config')} {' → '.join(shapes)}")
        return f"ClipMapCompressor({self.teacher_id!r}, {self.map_config.initializer}, {', '.join(sizes)})"

    @property
    def map_config(self) -> ClipMapConfig:
        """The student's size and how its operators started."""
        return self.mapper.map_config

    @property
    def config(self) -> PretrainedConfig:
        """The student's model config."""
        return self.mapper.config

    def forward(self, **inputs: torch.Tensor):
        """The student's `CLIPOutput` for `input_ids`, `attention_mask` and `pixel_values`."""
        return self.mapper(**inputs)

    def get_image_features(self, **inputs: torch.Tensor):
        """What the student's `get_image_features` gives for `pixel_values`."""
        return self.mapper.get_image_features(**inputs)

    def get_text_features(self, **inputs: torch.Tensor):
        """What the student's `get_text_features` gives for `input_ids` and `attention_mask`."""
        return self.mapper.get_text_features(**inputs)

    def cost(self) -> CostReport:
        """Parameters, MACs per tower, bytes and heads of teacher and student; prints as a table with a note."""
        return self._cost

    @cached_property
    def _cost(self) -> CostReport:  # counted once: every save shows it
        return CostReport.of(self.mapper.plan.teacher, self.mapper.config)

    def export(self) -> PreTrainedModel:
        """The student as it stands, an ordinary `CLIPModel`."""
        return self.mapper.export()

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        include_map: bool = True,
        dtype: torch.dtype | None = None,
        results: Sequence[SetResults] = (),
        recipe: str | None = None,
    ) -> None:
        """
        Writes the student (loadable by plain transformers) and, in `map/`, what is needed to go on mapping.

        Args:
            folder: Made if needed.
            include_map: Whether to write `map/`, which is several times the student's size.
            dtype: Of the student's weights, such as `torch.float16`; by default they stay fp32, as the map does.
            results: What was measured, for the card.
            recipe: The resolved arguments as YAML, for the card; by default those of the mapping alone.

        Raises:
            ValueError: If `folder` is the teacher's.
        """
        folder = Path(folder)
        if folder.resolve() == Path(self.teacher_id).resolve():
            raise ValueError(
                f"{str(folder)!r} holds the teacher, which the student would overwrite; name another folder."
            )
        student = self.export().to(dtype or torch.float32)
        write_student_folder(folder, student, self.processor, keep_map=include_map)
        if include_map:
            content = {
                "teacher": self.teacher_id,
                "teacher_revision": self.teacher_revision,
                "map": self.map_config.to_dict(),
            }
            write_map(folder / MAP_FOLDER, content, self.mapper.state_dict())
        card = render_card(
            self.teacher_id,
            str(self.cost()),
            model_class=type(student).__name__,
            method="Its weights are mapped from the teacher's by operators, one per axis (CLIP-Map, started as "
            f"`{self.map_config.initializer}`), without distillation.",
            revision=self.teacher_revision,
            results=results,
            recipe=recipe or config_yaml(self.teacher_id, self.map_config),
        )
        write_card(folder, card, results)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_map: bool = False,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload compressed CLIP",
        token: str | bool | None = None,
    ) -> CommitInfo:
        """
        The same folder as `save_pretrained`, to the Hub; arguments as in transformers, and as in `push_folder`.

        Raises:
            ValueError: If the map is to be pushed but its teacher is a local folder, which nobody else could find.
            OSError: If the Hub refuses or the connection is lost; the message says how to go on.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_map=include_map)
            return push_folder(
                folder,
                repo_id,
                include_map=include_map,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
            )
