"""One folder to the Hub, in one commit."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi


__all__ = ["push_folder"]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload compressed CLIP",
    token: str | bool | None = None,
    delete_patterns: list[str] | None = None,
) -> CommitInfo:
    """
    Creates the repository if needed and uploads the folder as one commit; checkpoints in it stay here.

    Args:
        folder: What to upload.
        repo_id: `user/name`.
        private: Whether a new repository is private; the account's default if `None`.
        revision: Branch to commit to; made if needed.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Of the commit.
        token: As in transformers; the stored login by default.
        delete_patterns: Files of the repository to delete in the same commit unless they are uploaded anew.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        delete_patterns=delete_patterns,
        ignore_patterns=["checkpoints/*", "*/checkpoints/*", ".*.tmp/*", "*/.*.tmp/*"],
    )
