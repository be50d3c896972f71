"""Tells a misspelt path from an id on the Hub, before the Hub is asked again and again."""

from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id


__all__ = ["check_hub_id"]


def check_hub_id(source: str, repo_type: Literal["model", "dataset"], token: str | bool | None = None) -> None:
    """
    Looks whether a source that is no path can be an id on the Hub. One that looks like a path beside existing files
    must also be there: the Hub is asked once.

    Args:
        source: What was given.
        repo_type: Whether a model or a data set is meant.
        token: Token for private repositories.

    Raises:
        FileNotFoundError: If there is neither such a path nor such an id.
    """
    missing = f"There is no file or folder {source!r}"
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise FileNotFoundError(f"{missing}, and an id on the Hub has the form 'owner/name'.") from error
    if not Path(source).parent.is_dir() or constants.is_offline_mode():
        return
    try:
        HfApi(token=token).repo_info(source, repo_type=repo_type, timeout=10)
    except (HTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{missing}, and the Hub did not say that it has a {repo_type} of this name: {error} "
            "Of what is cached, HF_HUB_OFFLINE=1 takes the copy without asking."
        ) from error
