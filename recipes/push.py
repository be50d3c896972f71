r"""
Pushes a student's folder, as a recipe wrote it, to the Hub.

The repository is created if needed, and everything is one commit.

    hf auth login
    python recipes/push.py --folder student --repo_id me/clip-small --private true

    python recipes/push.py --folder student --repo_id me/clip-small --results results --teacher_results teacher-results

Read its README.md before; with `--results`, what recipes/evaluate.py measured on sets is put into it first. The token
is that of the login, or of the environment variable HF_TOKEN; a command line is seen by others. After a lost
connection, run the same command again.
"""

from dataclasses import dataclass, field

from clipmap_hf.cli.parsing import parse_arguments


@dataclass
class PushArguments:
    folder: str = field(metadata={"help": "Folder of a student; checkpoints and logs in it stay here."})
    repo_id: str = field(metadata={"help": "Where to: `user/name`."})
    results: str | None = field(default=None, metadata={"help": "Folder of `evaluate.py --sets`, for the card."})
    teacher_results: str | None = field(default=None, metadata={"help": "The same of the teacher, to stand beside."})
    include_map: bool = field(default=False, metadata={"help": "Push `map/` too, with which mapping can go on."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; made if needed."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    commit_message: str = field(default="Upload compressed CLIP", metadata={"help": "Of the commit."})

    def __post_init__(self):
        if self.teacher_results is not None and self.results is None:
            raise ValueError("teacher_results stand beside the student's results; give both.")


def main() -> None:
    (arguments,) = parse_arguments(PushArguments, description=__doc__)
    from clipmap_hf.hub.folder import add_results
    from clipmap_hf.hub.push import push_folder
    from clipmap_hf.hub.results import read_results
    from clipmap_hf.models.fingerprints import model_fingerprint
    from clipmap_hf.models.loading import load_model

    options = dict(vars(arguments))
    results, teacher_results = options.pop("results"), options.pop("teacher_results")
    if results is not None:
        weights = model_fingerprint(load_model(arguments.folder))
        add_results(arguments.folder, read_results(results, teacher_results, weights=weights))
    print(push_folder(**options))


if __name__ == "__main__":
    main()
