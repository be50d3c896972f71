"""Every way in which the operators of a mapping may start, in one table."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.config.heads import head_width
from clipmap_hf.families import BOTH_TOWERS, Family, family_for
from clipmap_hf.mapping.depth import DEPTH_RULES
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.models.finite import check_finite
from clipmap_hf.starts.calibrated.start import calibrated
from clipmap_hf.starts.free import diagonal, kaiming, random, start_by, xavier
from clipmap_hf.starts.selection.criteria import magnitude, manual, random_selection, taylor
from clipmap_hf.starts.selection.importance import importance
from clipmap_hf.starts.selection.mope import mope
from clipmap_hf.starts.selection.start import select_by


__all__ = [
    "STARTS",
    "Start",
    "check_heads",
    "check_start",
    "default_start",
    "make_plan",
    "named_start",
    "start_mapper",
    "start_of",
    "uses_pairs",
]

Batches = Iterable[Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Start:
    """
    A way to start.

    Args:
        make: From the teacher, the plan and batches of calibration pairs to the mapper.
        reads_pairs: Whether it looks at the batches.
        matches: Whether it needs texts there that belong to their images.
        depth_rule: The depth rule that it brings with it, beside those of `DEPTH_RULES`.
        folds: Whether the teacher is folded and the student's weights are corrected (`MappingPlan`).
        layerwise: The towers that it goes through layer by layer, which a family must allow.
        solves: Whether its refit sets the statistics of BatchNorms, so that they are not to be measured.
        narrows: Whether it can make heads narrower.
        adds: Whether a layer may have more heads than one of the teacher's, if it stands for several.
    """

    make: Callable[[PreTrainedModel, MappingPlan, Batches], WeightMapper]
    reads_pairs: bool = False
    matches: bool = False
    depth_rule: str | None = None
    folds: bool = False
    layerwise: frozenset[str] = frozenset()
    solves: bool = False
    narrows: bool = True
    adds: bool = False

    def fits(self, family: Family) -> bool:
        """Whether it is written for a family."""
        return self.layerwise <= family.layerwise


STARTS = {
    "calibrated": Start(
        calibrated,
        reads_pairs=True,
        depth_rule="similarity",
        folds=True,
        layerwise=frozenset({"text"}),  # a vision tower may be a ResNet
        solves=True,
        adds=True,
    ),
    "calibrated_whole": Start(
        partial(calibrated, classic=True),
        reads_pairs=True,
        depth_rule="similarity",
        folds=True,
        layerwise=BOTH_TOWERS,
        adds=True,
    ),
    "diagonal": Start(start_by(diagonal)),
    "importance": Start(select_by(importance), reads_pairs=True, depth_rule="similarity", layerwise=BOTH_TOWERS),
    "kaiming": Start(start_by(kaiming)),
    "magnitude": Start(select_by(magnitude), depth_rule="score"),
    "manual": Start(select_by(manual), depth_rule="score"),
    "mope": Start(
        select_by(mope), reads_pairs=True, matches=True, depth_rule="score", layerwise=BOTH_TOWERS, narrows=False
    ),
    "random": Start(start_by(random)),
    "random_selection": Start(select_by(random_selection), depth_rule="score"),
    "taylor": Start(select_by(taylor), reads_pairs=True, matches=True, depth_rule="score"),
    "xavier": Start(start_by(xavier)),
}


def start_mapper(teacher: PreTrainedModel, config: ClipMapConfig, batches: Batches | None = None) -> WeightMapper:
    """
    Starts to map a teacher into a smaller model.

    Args:
        teacher: The model to compress; what a start computes, it computes where the teacher lies.
        config: The student's size and how the operators start, `diagonal` by default.
        batches: Of `pixel_values`, `input_ids` and, for selections, `attention_mask` and `image_of_text` (see
            `pair_batches`), for the starts that read pairs, and to measure a ResNet's BatchNorms; gone through several
            times. Of several processes, each has its own.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If the start does not fit the family, the depth rule or the presence of batches; if there are no
            pairs, or no images; if the sizes do not fit the teacher, or a weight of it is NaN or infinite.
    """
    check_finite(teacher.state_dict(), "The teacher")
    check_start(config, family_for(teacher.config), has_pairs=batches is not None)
    plan = make_plan(teacher, config)
    check_heads(plan)
    mapper = start_of(config).make(teacher, plan, () if batches is None else batches)
    is_solved = start_of(config).solves and config.refit
    if batches is not None and config.norm_statistics == "measured" and not is_solved:
        mapper.measure_statistics(batches)
    return mapper


def make_plan(teacher: PreTrainedModel, config: ClipMapConfig) -> MappingPlan:
    """The plan of a mapping that starts as `config` says."""
    return MappingPlan.make(teacher, config, folds=start_of(config).folds)


def start_of(config: ClipMapConfig) -> Start:
    """The start that a config names; `diagonal`, if it names none."""
    return STARTS[config.initializer or "diagonal"]


def default_start(family: Family, has_pairs: bool) -> str:
    """
    Names the start of a student that names none: `calibrated` from pairs, `diagonal` without. Families with BatchNorms
    start as `diagonal` in any case, since there pairs measure the norms.
    """
    return "calibrated" if has_pairs and not family.has_statistics else "diagonal"


def named_start(config: ClipMapConfig, family: Family, has_pairs: bool) -> ClipMapConfig:
    """
    Returns a config that names its start, after `check_start`.

    Args:
        config: The student's; `default_start` decides if it names none.
        family: The teacher's.
        has_pairs: Whether there is calibration data.

    Raises:
        ValueError: As in `check_start`.
    """
    named = dataclasses.replace(config, initializer=config.initializer or default_start(family, has_pairs))
    check_start(named, family, has_pairs)
    return named


def uses_pairs(config: ClipMapConfig, family: Family) -> bool:
    """Whether a student begins with pairs: its start reads them, or BatchNorms are measured on them."""
    return start_of(config).reads_pairs or (family.has_statistics and config.norm_statistics == "measured")


def check_heads(plan: MappingPlan) -> None:
    """
    Checks that a start can make a student's heads, before anything is computed.

    Args:
        plan: Of the mapping.

    Raises:
        ValueError: If heads become narrower or more, and the start cannot do that.
    """
    name, start = plan.config.initializer or "diagonal", start_of(plan.config)
    for tower in plan.cut:
        big, small = (getattr(config, f"{tower}_config") for config in (plan.teacher, plan.student))
        old, new = head_width(big), head_width(small)
        if new < old and not start.narrows:
            others = sorted(name for name, other in STARTS.items() if other.narrows)
            raise ValueError(
                f"initializer={name!r} keeps whole heads, {old} wide, but those of the {tower} tower would be {new} "
                f"wide. Give a width that is a multiple of {old} and no number of heads; or start by one of {others}."
            )
        if small.num_attention_heads > big.num_attention_heads and not start.adds:
            others = sorted(name for name, other in STARTS.items() if other.adds)
            raise ValueError(
                f"initializer={name!r} cannot make {small.num_attention_heads} heads of the {tower} tower's "
                f"{big.num_attention_heads}. Ask for fewer, or start by one of {others}: there, a layer may have "
                "heads of several of the teacher's."
            )


def check_start(config: ClipMapConfig, family: Family, has_pairs: bool) -> None:
    """
    Checks that a start can be made, before anything is computed.

    Args:
        config: Names the start and the depth rule.
        family: The teacher's.
        has_pairs: Whether there is calibration data.

    Raises:
        ValueError: If the start needs pairs and there are none, or there are some and nothing reads them; if it is not
            written for the family; if it solves BatchNorms that are to be inherited; if the depth rule is that of
            another start.
    """
    name, start = config.initializer or "diagonal", start_of(config)
    if not start.fits(family):
        allowed = sorted(name for name, other in STARTS.items() if other.fits(family))
        readers = [name for name in allowed if STARTS[name].reads_pairs]
        raise ValueError(
            f"initializer={name!r} goes through the teacher's layers one by one, which is not written for the family "
            f"{family.name!r}. Name one of {allowed}; those of them that read calibration data are {readers}."
        )
    if family.has_statistics and config.norm_statistics == "inherited" and start.solves and config.refit:
        raise ValueError(
            f"norm_statistics='inherited' does not fit the refit of initializer={name!r}, which gives the BatchNorms "
            "the statistics of what it has solved. Leave norm_statistics out, or give refit=False."
        )
    if start.reads_pairs > has_pairs or has_pairs > uses_pairs(config, family):
        verb = "does not start from data; leave calibration_data out" if has_pairs else "needs calibration_data"
        readers = sorted(name for name, other in STARTS.items() if other.reads_pairs)
        raise ValueError(f"initializer={name!r} {verb}. Those that need it are {readers}.")
    rules = sorted({*DEPTH_RULES, start.depth_rule} - {None})
    if config.depth not in rules:
        raise ValueError(f"depth={config.depth!r} is no rule of initializer={name!r}; allowed are {rules}.")
