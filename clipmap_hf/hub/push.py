"""Uploads a student's folder to the Hub in one commit."""

import os
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from clipmap_hf.hub.folder import MAP_CONFIG, MAP_FOLDER
from clipmap_hf.hub.map_folder import read_map_config


__all__ = ["push_folder"]

# Files that a run leaves in a student's folder for itself. The card shows the arguments, with shortened paths.
_RUN_FILES = (
    *("checkpoints/*", "*/checkpoints/*", ".*.tmp/*", "*/.*.tmp/*"),
    *("start/*", "mapped/*", "masked/*", "[0-9]/*"),
    *("best/*", "*.tfevents.*", "arguments.yaml", "metrics.jsonl", "choice.json", "origin.json", "made_from.json"),
)
# Files that belong to other weights if the repository has them and the folder does not.
_WEIGHT_FILES = ("model*.safetensors*", "text_embeds.safetensors", "labels.json", "onnx/*", ".eval_results/*")


def push_folder(
    folder: str | Path,
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
    Uploads a student's folder as one commit, and creates the repository if needed. Checkpoints, logs and intermediate
    results of the run are not uploaded. The same commit deletes files of other weights from the repository: shards,
    ONNX files, benchmark results and a map.

    Args:
        folder: The folder to upload. It is not changed.
        repo_id: Id of the repository, `user/name`.
        include_map: Whether to upload `map/` too.
        private: Whether a new repository is private. `None` takes the account's default.
        revision: Branch to commit to. It is created if needed.
        create_pr: Whether to open a pull request instead of committing to the branch.
        commit_message: Message of the commit.
        token: Access token, as in transformers. By default, it is that of the stored login.

    Raises:
        ValueError: If `folder` is not a student's folder, or the included map's teacher is a local folder, which
            nobody else has.
        OSError: If the Hub refuses the upload or the connection is lost. The message says how to continue.
    """
    folder = Path(folder)
    _check(folder, include_map)
    map_files = [f"{MAP_FOLDER}/*"]
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            delete_patterns=[*_WEIGHT_FILES, *map_files],  # files that are uploaded again are not deleted
            ignore_patterns=[*_RUN_FILES, *([] if include_map else map_files)],
        )
    except (OSError, HTTPError, RuntimeError) as error:  # failed uploads raise a RuntimeError
        raise OSError(f"The push to {repo_id!r} did not finish: {error} {_advise(repo_id, error)}") from error


def _check(folder: Path, include_map: bool) -> None:
    missing = [name for name in ("config.json", "model.safetensors", "README.md") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} is not a student's folder: {missing} missing. Push what a recipe wrote.")
    if include_map:
        path = folder / MAP_FOLDER / MAP_CONFIG
        if not path.is_file():
            raise ValueError(f"include_map=True, but {str(folder)!r} holds no {MAP_FOLDER}/; leave the map out.")
        teacher = read_map_config(path)["teacher"]
        if os.path.isabs(teacher):
            raise ValueError(
                f"include_map=True, but the map's teacher is the local folder {teacher!r}; push the teacher and start "
                "from its id, or leave the map out."
            )


def _advise(repo_id: str, error: Exception) -> str:
    """Says how to continue after an error."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"Log in (`hf auth login`), or give a token that may write to {repo_id!r}, and push again."
    return (
        "The local folder is unchanged. Push again with the same arguments; large files that have arrived are not "
        "sent twice."
    )
