import pytest
import torch

from clipmap_hf.costs import latency
from clipmap_hf.costs.latency import milliseconds, milliseconds_by_turns, random_inputs, speedups, spread
from clipmap_hf.models.features import Towers


def test_a_pass_is_timed_without_gradients():
    calls = []
    assert milliseconds(lambda: calls.append(torch.is_grad_enabled()), seconds=1e-4) > 0
    assert calls and not any(calls)


def test_models_take_turns_in_every_round(monkeypatch):
    asked = []
    monkeypatch.setattr(latency, "milliseconds", lambda run, seconds: asked.append(run) or len(asked))
    times = milliseconds_by_turns({"a": "run a", "b": "run b"}, rounds=3)
    assert asked == ["run a", "run b"] * 3
    assert times == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_ratios_are_those_of_the_rounds():
    first, other = [10.0, 40.0, 10.0], [5.0, 20.0, 2.0]  # in the second round, the machine was busy
    assert speedups(first, other) == [2.0, 2.0, 5.0]
    assert spread(speedups(first, other)) == (2.0, 2.0, 3.5)
    assert spread([1.0, 2.0, 3.0, 4.0, 10.0])._asdict() == {"median": 3.0, "lower": 2.0, "upper": 4.0}


def test_inputs_fit_the_model_and_are_of_full_length(tiny_teacher):
    batch = random_inputs(tiny_teacher.config, 3)
    assert batch["pixel_values"].shape == (3, 3, 32, 32) and batch["input_ids"].shape == (3, 16)
    assert batch["attention_mask"].all()
    with torch.no_grad():
        passes = Towers.of_model(tiny_teacher).passes(batch)
        embeds = {name: run() for name, run in passes.items()}
        expected = tiny_teacher(**batch)
    torch.testing.assert_close(embeds["vision"], expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds["text"], expected.text_embeds, atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_work_on_a_gpu_is_waited_for():
    matrix = torch.randn(8192, 8192, device="cuda")
    assert milliseconds(lambda: matrix @ matrix, seconds=0.1) > 0.5  # half a millisecond is 2 PFLOP/s
