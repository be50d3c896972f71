"""Names a model: its folder or Hub id, and on the Hub its revision."""

import os
from typing import NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


__all__ = ["ModelId", "names_folder"]


class ModelId(NamedTuple):
    """
    What a model is loaded from.

    Attributes:
        id: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
    """

    id: str
    revision: str | None = None

    def absolute(self) -> "ModelId":
        """The same model, found from whatever folder."""
        return ModelId(os.path.abspath(self.id) if os.path.isdir(self.id) else self.id, self.revision)


def names_folder(id: str) -> bool:
    """Whether an id is a folder, and not on the Hub. A folder that is gone is one if no Hub id looks like it."""
    try:
        validate_repo_id(id)
    except HFValidationError:
        return True
    return os.path.isdir(id)
