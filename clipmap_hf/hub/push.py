"""One folder to the Hub, in one commit."""

import os
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from clipmap_hf.hub.folder import MAP_CONFIG, MAP_FOLDER
from clipmap_hf.hub.map_folder import read_map_config


__all__ = ["push_folder"]

# What a run leaves in a student's folder for itself; the card has the arguments without the paths in them.
_OF_THE_RUN = (
    *("checkpoints/*", "*/checkpoints/*", ".*.tmp/*", "*/.*.tmp/*"),
    *("start/*", "mapped/*", "masked/*", "[0-9]/*"),
    *("best/*", "*.tfevents.*", "arguments.yaml", "metrics.jsonl", "choice.json", "origin.json"),
)
# Of other weights, if a repository has them and the folder does not.
_OF_WEIGHTS = ("model*.safetensors*", "onnx/*", ".eval_results/*")


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
    Creates the repository if needed and uploads a student's folder as one commit. Checkpoints, logs and what the run
    left between its stages stay here.

    Args:
        folder: What to upload; left as it is.
        repo_id: `user/name`.
        include_map: Upload `map/` too. What the repository holds of other weights, a map, ONNX files, benchmark
            results or shards, is deleted in the same commit.
        private: Whether a new repository is private; the account's default if `None`.
        revision: Branch to commit to; made if needed.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Of the commit.
        token: As in transformers; the stored login by default.

    Raises:
        ValueError: If `folder` is not a student's, or the map's teacher is a folder here, which nobody else has.
        OSError: If the Hub refuses or the connection is lost; the message says how to go on.
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
            delete_patterns=[*_OF_WEIGHTS, *map_files],  # but for what is uploaded anew
            ignore_patterns=[*_OF_THE_RUN, *([] if include_map else map_files)],
        )
    except (OSError, HTTPError, RuntimeError) as error:  # the last is what failed uploads raise
        raise OSError(f"The push to {repo_id!r} did not finish: {error} {_way_on(repo_id, error)}") from error


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


def _way_on(repo_id: str, error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"Log in (`hf auth login`), or give a token that may write to {repo_id!r}, and push again."
    return (
        "Nothing has changed here. Push again with the same arguments; large files that have arrived are not sent "
        "twice."
    )
