"""Names a model: its folder or Hub id, and on the Hub its revision."""

from typing import NamedTuple


__all__ = ["ModelId"]


class ModelId(NamedTuple):
    """
    What a model is loaded from.

    Args:
        id: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
    """

    id: str
    revision: str | None = None
