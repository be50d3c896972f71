"""Finds the license of a student, which is that of its teacher, in the teacher's card."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from clipmap_hf.models.model_id import names_folder


__all__ = ["teacher_license"]

_KEYS = ("license", "license_name", "license_link")


def teacher_license(teacher: str, revision: str | None = None) -> dict[str, str]:
    """
    Reads a teacher's license from its card, in its folder or in the cache of the Hub. Nothing is downloaded.

    Args:
        teacher: Hub id or folder of the teacher.
        revision: The teacher's branch, tag or commit on the Hub.

    Returns:
        The card's metadata `license` and, if it has them, `license_name` and `license_link`. If no license is found,
        because the card is gone, cannot be read or states none, it is `{"license": "unknown"}`.
    """
    card = Path(teacher, "README.md")
    if not names_folder(teacher):
        cached = try_to_load_from_cache(teacher, "README.md", revision=revision)
        card = Path(cached) if isinstance(cached, str) else card  # no string: not cached, or known not to exist
    metadata = _metadata(card)
    found = {key: metadata[key] for key in _KEYS if isinstance(metadata.get(key), str)}
    return found if "license" in found else {"license": "unknown"}


def _metadata(card: Path) -> dict[str, Any]:
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # a card that is gone or cannot be read states no license
        return {}
