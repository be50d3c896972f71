"""Arguments of the demo, as a dataclass and as command-line options."""

from dataclasses import dataclass, field

from clipmap_hf.config.ranges import check_ranges


__all__ = ["METHODS", "ContestArguments"]

# The students of each method, in the order in which they are made.
METHODS = {
    "calibrated": ("calibrated, not trained", "calibrated, distilled"),
    "ternary": ("calibrated, ternary",),
    "clip_map": ("CLIP-Map of the paper",),
    "manual": ("manual inheritance, distilled",),
    "scratch": ("from scratch",),
}


@dataclass
class ContestArguments:
    """Which students are made, and on how many pairs."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Methods to compare, of {', '.join(METHODS)}."}
    )
    pairs: int = field(
        default=32000,
        metadata={"help": "Pairs that each student sees, those of calibration included, and repetitions counted."},
    )
    views: int | None = field(
        default=None,
        metadata={
            "help": "Views of each image and caption whose teacher's embeddings are computed once, for all students "
            "together. By default, the teacher is asked at each step of each student."
        },
    )

    def __post_init__(self):
        check_ranges(self, above_0=("pairs", "views"))
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods={unknown} are unknown; choose from {list(METHODS)}.")

    @property
    def names(self) -> list[str]:
        """The teacher and the students, in the order in which they are ready."""
        return ["teacher", *(name for method in self.methods for name in METHODS[method])]
