"""Arguments that say where pairs come from and how they are read, as dataclasses and command-line options."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from clipmap_hf.config.ranges import check_ranges
from clipmap_hf.data.held_texts import PartedTexts, parted_texts
from clipmap_hf.data.text_sources import CAPTIONS
from clipmap_hf.data.texts import Texts, load_texts, with_words


__all__ = ["CalibrationArguments", "DataArguments", "ReadingArguments"]


@dataclass
class ReadingArguments:
    """How image–text pairs are read."""

    streaming: bool = field(
        default=False, metadata={"help": "Read `train_data` shard by shard instead of making a local table of it."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Size of the buffer that shuffles a stream, in rows per worker."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training images to hold out and evaluate on, in place of `eval_data`; equal "
            "images are never on both sides. Without captions, the same share of the texts is held out too."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split of `train_data` and `train_images`."})
    eval_split: str = field(
        default="train", metadata={"help": "Split of `eval_data` (plain files have only `train`)."}
    )
    image_column: str = field(
        default="image",
        metadata={
            "help": "Column of the images. In tars an ending such as `jpg`; `image` is every ending that images have."
        },
    )
    caption_column: list[str] = field(
        default_factory=lambda: ["caption"],
        metadata={"help": "Columns of captions: strings, or lists of captions. Evaluation reads the first column."},
    )
    keyword_column: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns of keyword lists. A caption may then be made of some of the keywords."},
    )
    caption_sampling: Literal["first", "random"] | None = field(
        default=None,
        metadata={
            "help": "Train on the first caption column, or on a random column of captions or keywords; by default "
            "`random` if there are several."
        },
    )
    train_texts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts to train beside the images, which need not belong to them: queries.txt, labels:names.txt, "
            "titles.csv:title, owner/name:title, words, or captions (the images' own, the default). name=2 draws "
            "twice as often."
        },
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0],
        metadata={"help": "Smallest and largest area of the random crop, as shares of the image."},
    )
    flip: float = field(default=0.0, metadata={"help": "Probability of a horizontal flip."})
    rotation: float = field(default=0.0, metadata={"help": "Largest random rotation, in degrees."})
    color_jitter: float = field(
        default=0.0, metadata={"help": "Largest relative change of brightness, contrast and saturation."}
    )
    grayscale: float = field(default=0.0, metadata={"help": "Probability of turning an image gray."})
    mix: float = field(
        default=0.0,
        metadata={
            "help": "Probability of mixing an image with another one (mixup or cutmix), and of mixing the words of "
            "captions. The teacher embeds the mix."
        },
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Largest share of unusable rows to skip. With more, the run stops."}
    )
    image_backend: Literal["pil", "torchvision"] = field(
        default="pil", metadata={"help": "Backend of the image processor in evaluation."}
    )
    teacher_index: bool = field(
        default=False,
        metadata={
            "help": "Evaluate also what the student's texts find among the teacher's images, and the reverse: metrics "
            "that begin with `index_`."
        },
    )

    def __post_init__(self):
        for name in ("caption_column", "keyword_column", "train_texts"):
            if isinstance(column := getattr(self, name), str):
                setattr(self, name, [column])
        check_ranges(self, at_least_0=("flip", "rotation", "color_jitter", "grayscale", "max_bad_fraction"))
        check_ranges(self, above_0=("shuffle_buffer",))
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix={self.mix} must be a probability, between 0 and 1.")
        if self.mix and self.streaming:
            raise ValueError("A stream has no images at hand to mix others with; leave out mix, or streaming.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be at least 0 and below 1.")
        if self.validation_fraction and self.streaming:
            raise ValueError("A stream is not split by validation_fraction; name eval_data, or leave out streaming.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be two ascending shares of the area, such as 0.9 1.0."
            )


@dataclass
class _Sources:
    train_data: str | None = field(
        default=None,
        metadata={
            "help": "Pairs: folder, path or glob of parquet files or webdataset tars, or Hub id, with `:config` if it "
            "has several configurations."
        },
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": "Pairs to measure retrieval on, in the same forms as `train_data`; or, with `train_texts`, images "
            "alone, to measure agreement with the teacher on."
        },
    )
    train_images: str | None = field(
        default=None,
        metadata={
            "help": "Images whose captions are not read, in place of `train_data` or beside it, in the same forms. "
            "`train_texts` names texts for them; by default `words`."
        },
    )


@dataclass
class DataArguments(ReadingArguments, _Sources):
    """Where the image–text pairs come from and how they are read. In Python, they may be any `PairSource`."""

    def __post_init__(self):
        super().__post_init__()
        self._check_images()
        if self.train_texts:
            _ = self._given_texts  # what cannot be read is an error before anything is loaded
        if self.validation_fraction and self.eval_data is not None:
            raise ValueError(
                "Evaluation is on eval_data or on a validation_fraction of the training data; leave out either."
            )

    def _check_images(self) -> None:
        if self.train_data is None and self.train_images is None:
            raise ValueError("Name what to train on: pairs in train_data, or images without captions in train_images.")
        if self.train_data is not None and self.train_images is not None and self.streaming:
            raise ValueError("A stream is of one source; leave out streaming, or one of train_data and train_images.")

    def name_texts(self) -> None:
        """Names in `train_texts` also those that are added by default."""
        if not isinstance(self.train_texts, Texts):
            self.train_texts = self.shown_texts.get("train_texts", [])

    @property
    def paired(self) -> bool:
        """Whether each text belongs to its image."""
        return self.train_images is None and (self._given_texts is None or self._given_texts.pairs)

    @property
    def shown_texts(self) -> dict[str, list[str]]:
        """The entry of texts in a recipe, with those that are added by default; empty without."""
        names = self._given_texts.names if self._given_texts is not None else []
        return {"train_texts": names} if names else {}

    @cached_property
    def parted_texts(self) -> PartedTexts | None:
        """The texts that `train_texts` names, a share held out where captions are not read; `None` without any."""
        texts = self._given_texts
        return texts and parted_texts(texts, 0.0 if texts.has_captions else self.validation_fraction)

    @property
    def texts(self) -> Texts | None:
        """The texts to train beside the images; `None` for their own captions."""
        return self.parted_texts and self.parted_texts.trained

    @property
    def sampling(self) -> Literal["first", "random"]:
        """How captions are sampled: as asked for, or at random if there are several columns."""
        several = len([*self.caption_column, *self.keyword_column]) > 1
        return self.caption_sampling or ("random" if several else "first")

    @property
    def read_columns(self) -> list[str]:
        """The columns of the training data that texts come from; none if the images' own captions are not read."""
        reads_captions = self._given_texts is None or self._given_texts.has_captions
        return [*self.caption_column, *self.keyword_column] if reads_captions else []

    @property
    def evaluated(self) -> tuple[str | None, str]:
        """Source and split of the evaluation pairs. The source is `None` if nothing is evaluated."""
        if self.validation_fraction:
            return self.train_images if self.train_data is None else self.train_data, self.train_split
        return self.eval_data, self.eval_split

    @cached_property
    def _given_texts(self) -> Texts | None:
        """The texts that are named, with `words` where images without captions have too few."""
        named = self.train_texts if isinstance(self.train_texts, Texts) else load_texts(self.train_texts)
        if self.train_images is None and (named is None or named.pairs):
            return named
        if self.train_data is None and named is not None and named.has_captions:
            raise ValueError("train_images are read without captions; name others in train_texts, or give train_data.")
        captions = {} if self.train_data is None else {CAPTIONS: []}
        return with_words(named or Texts(captions, dict.fromkeys(captions, 1.0)))


@dataclass
class CalibrationArguments:
    """The calibration pairs, which the starts `calibrated`, `importance`, `taylor` and `mope` need, and BatchNorms."""

    calibration_data: str | None = field(
        default=None,
        metadata={
            "help": "Calibration pairs, with the columns of `train_data`; by default what is trained on. Images alone "
            "will do."
        },
    )
    calibration_pairs: int = field(
        default=2048, metadata={"help": "Number of calibration pairs, of all processes together."}
    )

    def __post_init__(self):
        check_ranges(self, above_0=("calibration_pairs",))
