"""Under which license a student stands: the one that its teacher's card states, if that card is at hand."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache


__all__ = ["teacher_license"]

_KEYS = ("license", "license_name", "license_link")


def teacher_license(teacher: str, revision: str | None = None) -> dict[str, str]:
    """
    The metadata `license`, and `license_name` and `license_link` if there are any, of the card in the teacher's folder
    or in the cache of the Hub; `{"license": "unknown"}` if none says it. Nothing is downloaded.

    Args:
        teacher: Hub id or folder.
        revision: Its branch, tag or commit on the Hub.
    """
    card = Path(teacher, "README.md")
    if not Path(teacher).is_dir():
        cached = try_to_load_from_cache(teacher, "README.md", revision=revision)
        card = Path(cached) if isinstance(cached, str) else card  # else it is not cached, or known not to exist
    metadata = _metadata(card) if card.is_file() else {}
    found = {key: metadata[key] for key in _KEYS if isinstance(metadata.get(key), str)}
    return found if "license" in found else {"license": "unknown"}


def _metadata(card: Path) -> dict[str, Any]:
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):  # a card that cannot be read states nothing
        return {}
