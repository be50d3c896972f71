"""What recipes ask for by name: the model to compress and the size to make of it."""

from dataclasses import dataclass, field

from clipmap_hf.models.model_id import ModelId


__all__ = ["StudentArguments", "TeacherArguments"]


@dataclass
class TeacherArguments:
    """The model to compress."""

    teacher: list[str] = field(
        metadata={"help": "Hub id or folder of a CLIPModel. Of several, the first is mapped, and all together teach."}
    )
    teacher_revision: list[str] = field(
        default_factory=list, metadata={"help": "Branch, tag or commit of each teacher on the Hub."}
    )

    def __post_init__(self):
        if self.teacher_revision and len(self.teacher_revision) != len(self.teacher):
            raise ValueError(
                f"{len(self.teacher)} teachers need as many revisions, or none; got {self.teacher_revision}."
            )

    @property
    def teachers(self) -> list[ModelId]:
        """Id and revision of each."""
        revisions = self.teacher_revision or [None] * len(self.teacher)
        return [ModelId(*source) for source in zip(self.teacher, revisions, strict=True)]


@dataclass
class StudentArguments:
    """The size of the student and how its operators start; the words of `ClipMapConfig`."""

    student: str | dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "A preset: base, small or tiny, of a ResNet resnet-30m or resnet-19m; or a budget, such as "
            "params=30M or macs=2G."
        },
    )
    vision_hidden_size: int | None = field(default=None, metadata={"help": "Width of the vision tower."})
    vision_intermediate_size: int | None = field(default=None, metadata={"help": "FFN width of the vision tower."})
    vision_num_hidden_layers: int | None = field(default=None, metadata={"help": "Depth of the vision tower."})
    vision_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the vision tower."})
    vision_width: int | None = field(default=None, metadata={"help": "Width of a ResNet; that of RN50 is 64."})
    vision_layers: list[int] | None = field(default=None, metadata={"help": "Blocks of each stage of a ResNet."})
    text_hidden_size: int | None = field(default=None, metadata={"help": "Width of the text tower."})
    text_intermediate_size: int | None = field(default=None, metadata={"help": "FFN width of the text tower."})
    text_num_hidden_layers: int | None = field(default=None, metadata={"help": "Depth of the text tower."})
    text_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the text tower."})
    projection_dim: int | None = field(
        default=None, metadata={"help": "Size of the joint embedding; the teacher's by default."}
    )
    heads: str | None = field(
        default=None,
        metadata={
            "help": "Heads where no number is given: `whole` ones, as wide as the teacher's; as many, but `narrow`; "
            "or `all` of the layers that one stands for (default with calibrated)."
        },
    )
    initializer: str | None = field(
        default=None,
        metadata={
            "help": "Start of the operators: calibrated (default), calibrated_whole, importance; without data "
            "diagonal, random, kaiming, xavier; selections manual, magnitude, taylor, mope, random_selection."
        },
    )
    refit: bool | None = field(
        default=None, metadata={"help": "Whether `calibrated` solves the layers one after another (default: true)."}
    )
    refit_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of gradient descent on each tower after it was solved (default: 400)."},
    )
    depth: str | None = field(
        default=None,
        metadata={"help": "Teacher layers to start from: interval_front (default), spread, similarity or score."},
    )
    depth_per: str | None = field(default=None, metadata={"help": "One depth matrix per `tower` (default) or `kind`."})
    tie_ffn: bool | None = field(default=None, metadata={"help": "Tie fc2's input operator to fc1's output operator."})
    decay_towards: str | None = field(
        default=None,
        metadata={"help": "Weight decay pulls operators to their `initial` value (default) or to `zero`."},
    )
    norm_statistics: str | None = field(
        default=None,
        metadata={
            "help": "Statistics that a ResNet's BatchNorms start with: `measured` on calibration pairs (default) or "
            "`inherited`."
        },
    )
