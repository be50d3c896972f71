r"""
Pushes a student's folder, as a recipe wrote it, to the Hub: creates the repository if needed, and makes one commit.

    hf auth login
    python recipes/push.py --folder student --repo_id me/clip-small --private true

Read its README.md before. The token is that of the login, or of the environment variable HF_TOKEN; a command line is
seen by others. After a lost connection, run the same command again.
"""

from dataclasses import dataclass, field

from clipmap_hf.training.parsing import parse_arguments


@dataclass
class PushArguments:
    folder: str = field(metadata={"help": "Folder of a student; checkpoints and logs in it stay here."})
    repo_id: str = field(metadata={"help": "Where to: `user/name`."})
    include_map: bool = field(default=False, metadata={"help": "Push `map/` too, with which mapping can go on."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; made if needed."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    commit_message: str = field(default="Upload compressed CLIP", metadata={"help": "Of the commit."})


def main() -> None:
    (arguments,) = parse_arguments(PushArguments, description=__doc__)
    from clipmap_hf.hub.push import push_folder

    print(push_folder(**vars(arguments)))


if __name__ == "__main__":
    main()
