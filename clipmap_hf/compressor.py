"""`ClipMapCompressor`: a teacher, the operators that map it, and the student they make, behind one object."""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from torch import nn
from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.budget import Budget
from clipmap_hf.config import PRESETS, ClipMapConfig
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.distributed import calibration_device
from clipmap_hf.evaluation.cost import CostReport, model_cost
from clipmap_hf.hub.card import config_yaml, render_card
from clipmap_hf.hub.folder import MAP_CONFIG, MAP_FOLDER, write_student_folder
from clipmap_hf.hub.map_folder import MAP_WEIGHTS, load_map_weights, map_file, read_map_config, write_map
from clipmap_hf.hub.push import push_folder
from clipmap_hf.hub.results import SetResults
from clipmap_hf.mapping.initializers import CALIBRATED_INITIALIZERS, NEED_PAIRS, SELECTIONS
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.start import start_from_activations
from clipmap_hf.models import load_model, load_processor
from clipmap_hf.selection.start import start_from_selection
from clipmap_hf.shapes import Choice, choose_shape, kept_energy


__all__ = ["ClipMapCompressor"]


class ClipMapCompressor(nn.Module):
    """
    Compresses a CLIP model by mapping its weights into a smaller one.

    ```python
    compressor = ClipMapCompressor.from_pretrained("openai/clip-vit-base-patch16", student="small")
    print(compressor.cost())
    compressor.save_pretrained("out")  # CLIPModel.from_pretrained("out") loads the student
    ```

    Args:
        teacher: The model to compress.
        config: The student's size and how the operators start.
        processor: The teacher's tokenizer and image processor; the student uses the same.
        teacher_id: Hub id or folder of the teacher, to find it again.
        teacher_revision: Its commit on the Hub.

    Attributes:
        choice: Why the student has this shape, if it was chosen within a budget; prints as a table.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        config: ClipMapConfig,
        processor: CLIPProcessor,
        teacher_id: str,
        teacher_revision: str | None = None,
    ):
        super().__init__()
        self.mapper = WeightMapper(teacher, config)
        self.teacher_config = teacher.config
        self.processor = processor
        self.teacher_id = os.path.abspath(teacher_id) if os.path.isdir(teacher_id) else teacher_id
        self.teacher_revision = teacher_revision
        self.choice: Choice | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        student: str | Budget | Mapping[str, Any] | ClipMapConfig | None = None,
        *,
        initializer: str | None = None,
        calibration_data: str | Dataset | IterableDataset | Iterable[Mapping[str, torch.Tensor]] | None = None,
        calibration_pairs: int = 2048,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "pil",
        **kwargs: Any,
    ) -> "ClipMapCompressor":
        """
        With `student`, starts to compress the CLIP model at `source` (which may itself be a compressed one). Without,
        goes on with the map that lies in `source/map`; the teacher's id and revision come from there.

        Args:
            source: Hub id or folder.
            student: A key of `PRESETS`; a `Budget` or its values by name, such as `{"params": "30M"}`, within which
                `choose_shape` finds the best shape (`choice` then explains it); or a `ClipMapConfig`.
            initializer: How the operators start, if `student` does not say it: by default `calibrated` with
                calibration data, `diagonal` without.
            calibration_data: What the initializers `calibrated` and `importance` start from: anything `load_pairs`
                reads; a data set with a column `image` and, or else texts are made up, `caption`; or batches of
                `pixel_values` and `input_ids`, in a list or a `DataLoader`.
            calibration_pairs: How many pairs to take of a data set.
            revision: Branch, tag or commit of `source` on the Hub.
            dtype: The teacher's weights are cast to it when loaded; the mapping itself is always fp32.
            backend: Of the image processor, `pil` or `torchvision`.
            kwargs: Passed to every download (`token`, `cache_dir`, `local_files_only`, …).

        Raises:
            ValueError: If `student` is unknown, does not fit the teacher, is a budget that no shape meets, or is
                missing where there is no map; if calibration data is missing or not used; if weights do not fit.
            OSError: If a file is missing or the Hub cannot be reached.
        """
        source = os.fspath(source)
        if student is None:
            if initializer is not None or calibration_data is not None:
                raise ValueError("A map that is gone on with has started already; leave initializer and data out.")
            return cls._continued(source, revision, dtype, backend, kwargs)
        config = _starting_config(student, initializer, calibration_data is not None)
        teacher, processor, commit = _load_teacher(source, revision, dtype, backend, kwargs)
        if isinstance(calibration_data, str):
            calibration_data = load_pairs(calibration_data)
        if isinstance(calibration_data, (Dataset, IterableDataset)):
            calibration_data = CalibrationPairs(calibration_data, processor, calibration_pairs)
        choice = None
        if config.budget is not None:
            has_data = calibration_data is not None
            kept = kept_energy(teacher.to(calibration_device()), calibration_data) if has_data else None
            choice = choose_shape(teacher.config, config, kept)
            config = choice.config
        compressor = cls(teacher.cpu(), config, processor, source, commit).eval()
        compressor.choice = choice
        starts = {
            **dict.fromkeys(CALIBRATED_INITIALIZERS, start_from_activations),
            **dict.fromkeys(SELECTIONS, start_from_selection),
        }
        if config.initializer in starts:
            starts[config.initializer](compressor.mapper, teacher.to(calibration_device()), calibration_data)
        return compressor

    @classmethod
    def _continued(cls, source, revision, dtype, backend, kwargs) -> "ClipMapCompressor":
        found = map_file(source, MAP_CONFIG, revision, kwargs)
        if found is None:
            raise ValueError(
                f"{source!r} holds no {MAP_FOLDER}/{MAP_CONFIG}, so there is no mapping to go on with. To start one, "
                f"say what to make: student= one of {sorted(PRESETS)}, or a ClipMapConfig."
            )
        content = read_map_config(found)
        teacher_id = content["teacher"]
        try:
            teacher, processor, commit = _load_teacher(teacher_id, content["teacher_revision"], dtype, backend, kwargs)
        except OSError as error:
            raise OSError(
                f"The map in {source!r} was made from the teacher {teacher_id!r}, which cannot be loaded: {error} If "
                f"it has moved, correct `teacher` in {found}."
            ) from error
        compressor = cls(teacher, content["map"], processor, teacher_id, commit).eval()
        weights = map_file(source, MAP_WEIGHTS, revision, kwargs)
        if weights is None:
            raise OSError(f"{source!r} has {MAP_FOLDER}/{MAP_CONFIG} but no {MAP_FOLDER}/{MAP_WEIGHTS}.")
        load_map_weights(compressor.mapper, weights)
        return compressor

    @property
    def config(self) -> ClipMapConfig:
        """The student's size and how its operators started."""
        return self.mapper.config

    def forward(self, **inputs: torch.Tensor):
        """The student's `CLIPOutput` for `input_ids`, `attention_mask` and `pixel_values`."""
        return self.mapper(**inputs)

    def cost(self) -> CostReport:
        """Parameters, MACs per tower and bytes of teacher and student; prints as a table."""
        return self._cost

    @cached_property
    def _cost(self) -> CostReport:  # counted once: every save shows it
        return CostReport(
            {"teacher": model_cost(self.teacher_config), "student": model_cost(self.mapper.student_config)}
        )

    def export(self) -> PreTrainedModel:
        """The student as it stands, an ordinary `CLIPModel`."""
        return self.mapper.export()

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        include_map: bool = True,
        results: Sequence[SetResults] = (),
        recipe: str | None = None,
    ) -> None:
        """
        Writes the student (loadable by plain transformers) and, in `map/`, what is needed to go on mapping.

        Args:
            folder: Made if needed.
            include_map: Whether to write `map/`, which is several times the student's size.
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
        student = self.export()
        card = render_card(
            self.teacher_id,
            str(self.cost()),
            model_class=type(student).__name__,
            method="Its weights are mapped from the teacher's by operators, one per axis (CLIP-Map, started as "
            f"`{self.config.initializer}`), without distillation.",
            revision=self.teacher_revision,
            results=results,
            recipe=recipe or config_yaml(self.teacher_id, self.config),
        )
        write_student_folder(folder, student, self.processor, card, results, keep_map=include_map)
        if include_map:
            content = {
                "teacher": self.teacher_id,
                "teacher_revision": self.teacher_revision,
                "map": self.config.to_dict(),
            }
            write_map(folder / MAP_FOLDER, content, self.mapper.state_dict())

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


def _load_teacher(
    source: str, revision: str | None, dtype: torch.dtype, backend: str, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, CLIPProcessor, str | None]:
    """The teacher, its processor, and its commit on the Hub."""
    teacher = load_model(source, revision=revision, dtype=dtype, **kwargs)
    processor = load_processor(source, revision=revision, backend=backend, **kwargs)
    commit = getattr(teacher.config, "_commit_hash", None) or revision  # a branch may move, a commit does not
    return teacher, processor, commit


def _starting_config(
    student: str | Budget | Mapping[str, Any] | ClipMapConfig, initializer: str | None, has_data: bool
) -> ClipMapConfig:
    """The config of `student` with its initializer decided."""
    if isinstance(student, str) and student in PRESETS:
        student = PRESETS[student]
    elif isinstance(student, (Budget, Mapping)):
        student = ClipMapConfig(budget=student)
    if not isinstance(student, ClipMapConfig):
        raise ValueError(
            f"student={student!r} is unknown; it must be one of {sorted(PRESETS)}, a budget such as "
            "{'params': '30M'}, or a ClipMapConfig."
        )
    if None not in (initializer, student.initializer) and initializer != student.initializer:
        raise ValueError(f"initializer={initializer!r}, but the student's config says {student.initializer!r}.")
    chosen = initializer or student.initializer or ("calibrated" if has_data else "diagonal")
    if (chosen in NEED_PAIRS) != has_data:
        verb = "does not start from data; leave calibration_data out" if has_data else "needs calibration_data"
        raise ValueError(f"initializer={chosen!r} {verb}. Those that need it are {sorted(NEED_PAIRS)}.")
    return dataclasses.replace(student, initializer=chosen)
