"""Settings that differ are named, whatever is nested in what."""

from clipmap_hf.files.differences import differences


def test_equal_settings_do_not_differ_whatever_their_order_and_kind_of_sequence():
    assert differences({"a": 1, "b": {"c": (1, 2)}}, {"b": {"c": [1, 2]}, "a": 1}) == {}


def test_leaves_of_inner_mappings_and_lists_of_mappings_are_named():
    before = {"vision": {"layers": 12, "width": 768}, "teachers": [{"id": "a"}, {"id": "b"}]}
    now = {"vision": {"layers": 12, "width": 384}, "teachers": [{"id": "a"}, {"id": "c"}]}
    assert differences(before, now) == {"vision.width": ("768", "384"), "teachers.1.id": ('"b"', '"c"')}


def test_what_only_one_of_them_has_is_named():
    assert differences({"a": None}, {"b": {}}) == {"a": ("null", "nothing"), "b": ("nothing", "{}")}


def test_true_is_not_one():
    assert differences({"a": True}, {"a": 1}) == {"a": ("true", "1")}
