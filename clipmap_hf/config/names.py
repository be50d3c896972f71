"""The names that a `ClipMapConfig` may use; the functions behind them are in `starts` and `mapping`."""

__all__ = ["DEPTH_NAMES", "START_NAMES"]

# Keys of `clipmap_hf.starts.STARTS`: how operators may start.
START_NAMES = (
    "calibrated",
    "calibrated_whole",
    "diagonal",
    "importance",
    "kaiming",
    "magnitude",
    "manual",
    "mope",
    "random",
    "random_selection",
    "taylor",
    "xavier",
)
# Keys of `clipmap_hf.mapping.depth.DEPTH_RULES`, then the rules that a start brings with it.
DEPTH_NAMES = ("interval_front", "spread", "score", "similarity")
