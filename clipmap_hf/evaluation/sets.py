"""The evaluation sets of the literature: where each set lies on the Hub, and which metric is reported for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


__all__ = ["EVAL_SETS", "SUITES", "EvalSet", "chosen_sets"]

_LABEL_COLUMNS = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}


@dataclass(frozen=True)
class EvalSet:
    """
    A set in the layout of `clip-benchmark`. Images with their labels or captions lie in `<split>/<number>.tar`, beside
    `<split>/nshards.txt`, or in `<split>/*.parquet`. Class names and prompts lie in `classnames.txt` and
    `zeroshot_classification_templates.txt`.

    Args:
        hub_id: Id of the data set on the Hub. Its last part is also the name of the set's folder among local sets.
        license: License of the images, as far as their collectors state it. Read their terms before you use a set.
        metrics: The measured metrics that the literature reports.
        task: `classification` has one class per image in the column `cls`, `multilabel` a 0 or 1 for every class in
            `npy`, `retrieval` one caption per line in `txt`.
        revision: Branch or commit on the Hub.
        split: Folder of the images.
        image_columns: Columns that may hold the image. Each row has exactly one of them.
    """

    hub_id: str
    license: str = "not stated"
    metrics: tuple[str, ...] = ("accuracy@1",)
    task: Literal["classification", "multilabel", "retrieval"] = "classification"
    revision: str = "main"
    split: str = "test"
    image_columns: tuple[str, ...] = ("webp", "png", "jpg", "jpeg")

    @property
    def label_column(self) -> str:
        """The column of the labels or captions."""
        return _LABEL_COLUMNS[self.task]

    @property
    def folder(self) -> str:
        """The name of the set's folder among local sets."""
        return self.hub_id.split("/")[-1]


# The CLIP paper reports these metrics, as the sets' authors do. CLIP-Map's Table 2 has `accuracy@1` for all sets.
_PER_CLASS = {"metrics": ("mean_per_class_recall",)}
_RETRIEVAL = {"task": "retrieval", "metrics": ("image_to_text_recall@1", "text_to_image_recall@1")}

# `revision` is a commit where it is known which commit holds the set, and otherwise `main`. Results state the commit.
EVAL_SETS: dict[str, EvalSet] = {
    "food101": EvalSet("clip-benchmark/wds_food101", revision="147a52fcbbb4f9d14293f9e2d821744d6883efef"),
    "cifar10": EvalSet("clip-benchmark/wds_vtab-cifar10"),
    "cifar100": EvalSet("clip-benchmark/wds_vtab-cifar100", revision="c181ce0341d21e40ebe4f35a8fc56dd547e20418"),
    "sun397": EvalSet("clip-benchmark/wds_sun397"),
    "cars": EvalSet("clip-benchmark/wds_cars", "non-commercial research"),
    "fgvc_aircraft": EvalSet("clip-benchmark/wds_fgvc_aircraft", "non-commercial research", **_PER_CLASS),
    "voc2007": EvalSet(
        "clip-benchmark/wds_voc2007_multilabel", "Flickr's terms", ("map_11_point",), task="multilabel"
    ),
    "dtd": EvalSet("clip-benchmark/wds_vtab-dtd", "research"),
    "pets": EvalSet(
        "clip-benchmark/wds_vtab-pets",
        "CC BY-SA 4.0",
        **_PER_CLASS,
        revision="3fbd1f21f076311402bb2bf2a9d1a04b72a4266d",
    ),
    "caltech101": EvalSet(
        "clip-benchmark/wds_vtab-caltech101",
        "CC BY 4.0",
        **_PER_CLASS,
        revision="96c3ed2decb80d5fe120fb8a0179f25c82cbee78",
    ),
    "flowers102": EvalSet("clip-benchmark/wds_vtab-flowers", **_PER_CLASS),
    "mnist": EvalSet("clip-benchmark/wds_mnist", revision="ba1491816962d0a3e81e178cf5f857f8ea5ebe1b"),
    "stl10": EvalSet("clip-benchmark/wds_stl10", "ImageNet's terms: non-commercial research"),
    "eurosat": EvalSet("clip-benchmark/wds_vtab-eurosat", "MIT"),
    "resisc45": EvalSet("clip-benchmark/wds_vtab-resisc45"),
    "gtsrb": EvalSet("clip-benchmark/wds_gtsrb", revision="1c13eff0803d2b02c9dc8dfe85e67770b3f0f3c5"),
    "kitti": EvalSet("clip-benchmark/wds_vtab-kitti_closest_vehicle_distance", "CC BY-NC-SA 3.0"),
    "country211": EvalSet(
        "clip-benchmark/wds_country211",
        "Creative Commons, of each image its own",
        revision="1699f138f0558342a1cbf99f7cf36b4361bb5ebc",
    ),
    "pcam": EvalSet("clip-benchmark/wds_vtab-pcam", "CC0", revision="502695fe1a141108650e3c5b91c8b5e0ff84ed49"),
    "renderedsst2": EvalSet("clip-benchmark/wds_renderedsst2", revision="66b9a461eda025201dd147e5f390f5984c33643a"),
    "imagenet1k": EvalSet(
        "clip-benchmark/wds_imagenet1k",
        "non-commercial research",
        revision="b24c7a5a3ef12df09089055d1795e2ce7c7e7397",
    ),
    "mscoco": EvalSet(
        "clip-benchmark/wds_mscoco_captions",
        "CC BY 4.0 (captions), Flickr's terms (images)",
        **_RETRIEVAL,
        revision="3bf9ad5d280b03126293bcc691585015e29ce691",
    ),
    "flickr30k": EvalSet(
        "clip-benchmark/wds_flickr30k",
        "Flickr's terms, non-commercial research",
        **_RETRIEVAL,
        revision="f8af3ceee1b944bf761340682621dfafd23974d2",
    ),
}

# CLIP-Map's Table 2 and Table 1.
SUITES: dict[str, tuple[str, ...]] = {"paper": tuple(EVAL_SETS)}


def chosen_sets(names: Sequence[str], suite: str | None = None) -> dict[str, EvalSet]:
    """
    Returns the named sets and those of a suite, each set once.

    Args:
        names: Keys of `EVAL_SETS`. A string may hold several keys, joined by commas.
        suite: A key of `SUITES`.

    Raises:
        ValueError: If a name or the suite is unknown, or nothing is chosen.
    """
    if suite is not None and suite not in SUITES:
        raise ValueError(f"suite={suite!r} is unknown; the suites are {sorted(SUITES)}.")
    wanted = [*(part for name in names for part in name.split(",") if part), *SUITES.get(suite, ())]
    unknown = sorted(set(wanted) - EVAL_SETS.keys())
    if unknown:
        raise ValueError(f"Evaluation sets {unknown} are unknown; choose from {sorted(EVAL_SETS)}.")
    if not wanted:
        raise ValueError(f"No evaluation set is named; choose from {sorted(EVAL_SETS)}.")
    return {name: EVAL_SETS[name] for name in wanted}
