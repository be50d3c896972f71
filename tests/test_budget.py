"""What a student may cost, as numbers, as texts and by name."""

import pytest

from clipmap_hf.config import Budget, ClipMapConfig, TowerConfig, student_config
from clipmap_hf.config.budget import MEASURES


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("30M", 30_000_000),
        ("1.5k", 1500),
        ("2 G", 2 * 10**9),
        ("1e6", 10**6),
        (7, 7),
        ("0.3M", 300_000),
        (3e4, 30_000),
    ],
)
@pytest.mark.parametrize("measure", ["params", "macs", "bytes"])
def test_a_size_is_a_number_or_a_text_with_a_decimal_unit(measure, text, number):
    budget = Budget(**{measure: text})
    assert budget == Budget(**{measure: number}) and type(budget.limit) is int
    assert (budget.measure, budget.limit, budget.batch_size, budget.device) == (measure, number, None, None)


def test_a_latency_has_a_batch_size_and_a_device():
    assert Budget(latency_ms="2.5") == Budget(latency_ms=2.5, batch_size=1, device="cpu")
    given = Budget(latency_ms="20", batch_size="8", device="cuda")
    assert (given.limit, given.batch_size, given.device) == (20.0, 8, "cuda")
    assert str(given) == "latency_ms=20.0 (batches of 8 on cuda)"


def test_every_measure_is_a_budget_by_itself():
    assert [Budget(**{name: 5}).measure for name in MEASURES] == list(MEASURES)
    assert str(Budget(params="30M")) == "params=30,000,000"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of .*'latency_ms'.*; got none of them"),
        ({"params": 1, "macs": 1}, r"exactly one of .*; got \['params', 'macs'\]"),
        (
            {"params": "30 million"},
            "params='30 million' must be a whole number above 0, such as 30000000 or 30M; units",
        ),
        ({"params": "0.5"}, "params='0.5' must be a whole number"),
        ({"bytes": "100MB"}, "bytes='100MB' must be a whole number"),
        ({"macs": 0}, "macs=0 must be a whole number above 0"),
        ({"params": True}, "params=True must be"),
        ({"params": float("nan")}, "params=nan must be"),
        ({"latency_ms": -1}, "latency_ms=-1 must be a number above 0"),
        ({"latency_ms": 5, "batch_size": 0}, "batch_size=0 must be a whole number above 0"),
        ({"params": "30M", "batch_size": 8}, r"\['batch_size'\] are for a budget of latency_ms, not of params"),
        ({"macs": "2G", "device": "cpu"}, r"\['device'\] are for a budget of latency_ms, not of macs"),
    ],
)
def test_a_budget_without_sense_is_an_error_that_says_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        Budget(**values)


def test_an_unknown_key_of_a_budget_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"Unknown keys \['parameters'\] for a budget; allowed are \['params'"):
        ClipMapConfig(budget={"parameters": "30M"})


def test_a_config_takes_a_budget_by_name_and_gives_it_back():
    config = ClipMapConfig(budget={"latency_ms": "20", "batch_size": 8}, text=TowerConfig(num_hidden_layers=2))
    assert config.budget == Budget(latency_ms=20, batch_size=8)
    assert ClipMapConfig.from_dict(config.to_dict()) == config
    assert "budget" not in ClipMapConfig().to_dict()  # maps and runs that know of none stay as they are


def test_a_budget_of_another_type_is_an_error():
    with pytest.raises(TypeError, match="budget must be a Budget or its values by name, got str"):
        ClipMapConfig(budget="30M")


def test_a_budget_alone_is_no_size(tiny_config):
    with pytest.raises(ValueError, match=r"budget params=30,000,000 are still to be chosen: .*choose_shape"):
        student_config(tiny_config(), ClipMapConfig(budget={"params": "30M"}))
