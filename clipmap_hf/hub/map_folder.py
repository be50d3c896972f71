"""Writes and reads `map/` in a student's folder, which holds the mapping operators and names their teacher."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from clipmap_hf.config import PRESETS, ClipMapConfig
from clipmap_hf.files.atomic import atomic_folder
from clipmap_hf.files.hub_ids import check_hub_id
from clipmap_hf.hub.folder import MAP_CONFIG, MAP_FOLDER
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.starts import make_plan


__all__ = ["MAP_WEIGHTS", "find_map", "map_file", "read_map", "read_map_config", "write_map"]

MAP_WEIGHTS = "clipmap.safetensors"


def write_map(folder: Path, content: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """
    Writes a map folder, either completely or not at all.

    Args:
        folder: The folder to write.
        content: Content of the config that `read_map_config` reads, in plain JSON types.
        weights: The mapper's state dict.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / MAP_WEIGHTS, metadata={"format": "pt"})
        (temporary / MAP_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def map_file(source: str, name: str, revision: str | None, kwargs: dict[str, Any]) -> Path | None:
    """
    Finds a file of a map, and downloads it if needed.

    Args:
        source: Hub id or folder of the student.
        name: Name of the file.
        revision: Branch, tag or commit on the Hub.
        kwargs: Further arguments of the download.

    Returns:
        Path of the file, or `None` if `source` has no such file.

    Raises:
        OSError: If the Hub cannot be reached, so that the file may exist.
    """
    if os.path.isdir(source):
        path = Path(source, MAP_FOLDER, name)
        return path if path.exists() else None
    check_hub_id(source, "model", kwargs.get("token"))
    try:
        return Path(hf_hub_download(source, f"{MAP_FOLDER}/{name}", revision=revision, **kwargs))
    except LocalEntryNotFoundError as error:
        raise OSError(f"{MAP_FOLDER}/{name} of {source!r} is not cached, and the Hub cannot be reached.") from error
    except EntryNotFoundError:
        return None


def find_map(source: str, revision: str | None = None, **kwargs: Any) -> tuple[Path, dict[str, Any]]:
    """
    Finds and reads the config of the map in a student's folder or repository.

    Args:
        source: Hub id or folder of the student.
        revision: Branch, tag or commit on the Hub.
        kwargs: Further arguments of the download.

    Returns:
        Path of the config, and its content as from `read_map_config`.

    Raises:
        ValueError: If there is no map.
        OSError: If the Hub cannot be reached.
    """
    path = map_file(source, MAP_CONFIG, revision, kwargs)
    if path is None:
        raise ValueError(
            f"{source!r} holds no {MAP_FOLDER}/{MAP_CONFIG}, so there is no mapping to continue. To start a new "
            f"mapping, give student=, which is one of {sorted(PRESETS)} or a ClipMapConfig."
        )
    return path, read_map_config(path)


def read_map_config(path: Path) -> dict[str, Any]:
    """
    Reads the config of a map: its `teacher`, its `teacher_revision`, and `map`, which is its `ClipMapConfig`.

    Raises:
        ValueError: If a key is missing or unknown.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    expected = {"teacher", "teacher_revision", "map"}
    if set(content) != expected:
        raise ValueError(f"{path} must have the keys {sorted(expected)}, got {sorted(content)}.")
    return {**content, "map": ClipMapConfig.from_dict(content["map"])}


def read_map(
    source: ModelId, load: Callable[[str, str | None], Teacher], **kwargs: Any
) -> tuple[Teacher, WeightMapper]:
    """
    Reads the map in a folder or repository.

    Args:
        source: Where it is.
        load: From id and revision to the teacher that the map names.
        kwargs: Passed to every download.

    Returns:
        The teacher, and the mapper whose weights `write_map` wrote.

    Raises:
        ValueError: If there is no map, or one of its tensors is missing, unknown or of another shape.
        OSError: If a file of it is missing, or its teacher cannot be loaded.
    """
    found, content = find_map(source.id, source.revision, **kwargs)
    try:
        teacher = load(content["teacher"], content["teacher_revision"])
    except OSError as error:
        raise OSError(
            f"The map in {source.id!r} was made from the teacher {content['teacher']!r}, which cannot be loaded: "
            f"{error} If it has moved, correct `teacher` in {found}."
        ) from error
    weights = map_file(source.id, MAP_WEIGHTS, source.revision, kwargs)
    if weights is None:
        raise OSError(f"{source.id!r} has {MAP_FOLDER}/{MAP_CONFIG} but no {MAP_FOLDER}/{MAP_WEIGHTS}.")
    plan = make_plan(teacher.model, content["map"])
    try:
        return teacher, WeightMapper.from_state(plan, plan.teacher_tensors(teacher.model), load_file(weights))
    except ValueError as error:
        raise ValueError(f"{weights} does not fit the map's config; {error}") from error
