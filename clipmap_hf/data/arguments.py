"""Where pairs come from and how they are read, as dataclasses that the command line reads too."""

from dataclasses import dataclass, field
from typing import Literal

from clipmap_hf.config.ranges import check_ranges


__all__ = ["CalibrationArguments", "DataArguments"]


@dataclass
class DataArguments:
    """Where the image–text pairs come from and how they are read."""

    train_data: str = field(
        metadata={"help": "Hub id, image folder, or path or glob of parquet files or webdataset tars."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read `train_data` shard by shard instead of making a local table of it."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows that a stream is shuffled among, per worker."})
    eval_data: str | None = field(default=None, metadata={"help": "Pairs to measure retrieval on; same forms."})
    train_split: str = field(default="train", metadata={"help": "Split of `train_data`."})
    eval_split: str = field(
        default="train", metadata={"help": "Split of `eval_data` (plain files have only `train`)."}
    )
    image_column: str = field(
        default="image", metadata={"help": "Column of the images (`jpg`, `png` … in webdatasets)."}
    )
    caption_column: list[str] = field(
        default_factory=lambda: ["caption"],
        metadata={"help": "Columns of the captions: strings, or lists of captions. The first column is evaluated."},
    )
    keyword_column: list[str] = field(
        default_factory=list, metadata={"help": "Columns of keyword lists; with random sampling, training joins some."}
    )
    caption_sampling: Literal["first", "random"] = field(
        default="first", metadata={"help": "Train on the first caption column, or on one of all columns."}
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0], metadata={"help": "Area range of the random resized crop."}
    )
    flip: float = field(default=0.0, metadata={"help": "Probability of a horizontal flip."})
    rotation: float = field(default=0.0, metadata={"help": "Largest random rotation, in degrees."})
    color_jitter: float = field(default=0.0, metadata={"help": "Largest change of brightness, contrast, saturation."})
    grayscale: float = field(default=0.0, metadata={"help": "Probability of dropping all color."})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Share of undecodable rows at which the run stops; fewer are skipped."}
    )
    image_backend: Literal["pil", "torchvision"] = field(
        default="pil", metadata={"help": "Backend of the image processor in evaluation."}
    )

    def __post_init__(self):
        check_ranges(self, at_least_0=("flip", "rotation", "color_jitter", "grayscale", "max_bad_fraction"))
        check_ranges(self, above_0=("shuffle_buffer",))
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be two ascending shares of the area, such as 0.9 1.0."
            )


@dataclass
class CalibrationArguments:
    """The pairs that `calibrated`, `importance`, `taylor` and `mope` start from."""

    calibration_data: str | None = field(
        default=None, metadata={"help": "Where they come from, with columns as `train_data`, which is the default."}
    )
    calibration_pairs: int = field(default=2048, metadata={"help": "How many there are, of all processes together."})

    def __post_init__(self):
        check_ranges(self, above_0=("calibration_pairs",))
