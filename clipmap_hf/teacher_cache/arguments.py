"""Arguments that say where teachers' embeddings are kept, as a dataclass and as command-line options."""

from dataclasses import dataclass, field

from clipmap_hf.config.ranges import check_ranges


__all__ = ["TeacherCacheArguments"]


@dataclass
class TeacherCacheArguments:
    """Where the teachers' embeddings are kept, so that they are computed once."""

    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the embeddings, created if needed. By default, no embeddings are kept."},
    )
    views: int | None = field(
        default=None,
        metadata={"help": "Views of each image and caption to keep (by default 4). Training uses them in turn."},
    )

    def __post_init__(self):
        check_ranges(self, above_0=("views",))
        if self.teacher_cache is None and self.views is not None:
            raise ValueError(f"views={self.views} is for a teacher_cache; name its folder, or leave views out.")
        if self.teacher_cache is not None and self.views is None:
            self.views = 4
