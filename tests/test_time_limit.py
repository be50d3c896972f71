"""A time is read as people write it, and its share falls due."""

import pytest

from clipmap_hf.config.times import seconds_of
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.time_limit import TimeLimit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), (600, 600), ("600", 600), (0.5, 0.5)],
)
def test_times_are_seconds_or_have_units(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "2d", "h2", "0", "-3", "2h x"])
def test_what_is_no_time_is_refused_with_what_is(text):
    with pytest.raises(ValueError, match="must be seconds above 0, or a time such as 2h, 90m or 1h30m"):
        RunArguments("out", max_time=text)


def test_the_share_goes_on_from_what_was_used_before():
    assert TimeLimit(None, used=100.0).share == 0
    assert 0.5 <= TimeLimit("200s", used=100.0).share < 0.6
    assert TimeLimit("1m", used=100.0).share == 1
