"""Which of the teacher's blocks a block of a student's stage comes from, and which it stands for."""

from collections.abc import Sequence

from clipmap_hf.starts.calibrated.streams import segments


__all__ = ["block_segments", "block_sources"]


def block_sources(begins: Sequence[int]) -> list[int]:
    """
    The teacher's block that each block of a student's stage comes from.

    Args:
        begins: Those of the blocks behind the first, counted without the first of the stage.
    """
    return [0, *(begin + 1 for begin in begins)]


def block_segments(begins: Sequence[int], blocks: int) -> list[range]:
    """
    The teacher's blocks that each block of a student's stage stands for: the first for the first alone, and the others
    from one kept block to the next; if there are no others, the first stands for all.

    Args:
        begins: As above.
        blocks: How many the teacher's stage has.
    """
    if not begins:
        return [range(blocks)]
    return [range(1), *(range(part.start + 1, part.stop + 1) for part in segments(begins, blocks - 1))]
