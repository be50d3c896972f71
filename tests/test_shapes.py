"""The best shape within a budget."""

import itertools
import math

import pytest
import torch
from transformers import CLIPConfig

from clipmap_hf import PRESETS, Budget, ClipMapConfig, TowerConfig
from clipmap_hf.config import presets_of, student_config
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.models.towers import Tower
from clipmap_hf.shapes import choice as choice_module
from clipmap_hf.shapes import choose_shape, kept_energy, latency, search_shape
from clipmap_hf.shapes.energy import tower_kept_energy
from clipmap_hf.shapes.grid import COUNTED, Shape, TowerGrid, counted_costs, extend_to_depths, grid_of, with_shape
from clipmap_hf.shapes.latency import latency_costs, measured_latency
from clipmap_hf.starts.calibrated.axes import residual_axes
from clipmap_hf.starts.calibrated.batches import calibration_batch
from clipmap_hf.starts.calibrated.statistics import calibrate


@pytest.fixture
def teacher(tiny_config) -> CLIPConfig:
    """Vision 64 × 4 and text 48 × 3, heads of 16."""
    return tiny_config()


@pytest.fixture(scope="module")
def vit_b_16() -> CLIPConfig:
    return CLIPConfig(vision_config={"patch_size": 16})


def cost_of(teacher: CLIPConfig, config: ClipMapConfig, measure: str) -> int:
    cost = model_cost(student_config(teacher, config))
    return {"params": cost.parameters, "macs": cost.macs, "bytes": cost.bytes}[measure]


def shape_of(config: ClipMapConfig) -> Shape:
    return Shape(
        config.vision.hidden_size,
        config.vision.num_hidden_layers,
        config.text.hidden_size,
        config.text.num_hidden_layers,
    )


# What there is to choose from, and what it costs


def test_widths_are_multiples_of_the_head_width_and_depths_any(teacher):
    assert grid_of(teacher, ClipMapConfig()) == {
        "vision": TowerGrid((16, 32, 48, 64), (1, 2, 3, 4)),
        "text": TowerGrid((16, 32, 48), (1, 2, 3)),
    }


def test_sizes_that_are_given_are_the_only_ones(teacher):
    config = ClipMapConfig(TowerConfig(num_attention_heads=8), TowerConfig(48, num_hidden_layers=2))
    assert grid_of(teacher, config) == {
        "vision": TowerGrid((64,), (1, 2, 3, 4)),  # heads alone are those of the teacher's width
        "text": TowerGrid((48,), (2,)),
    }
    with pytest.raises(ValueError, match="text.hidden_size=40 is not a multiple of the teacher's head width 16"):
        grid_of(teacher, ClipMapConfig(text=TowerConfig(40)))


@pytest.mark.parametrize(
    ("measure", "config"),
    [
        *((measure, ClipMapConfig()) for measure in COUNTED),
        ("params", ClipMapConfig(TowerConfig(intermediate_size=100), projection_dim=24)),
        ("params", ClipMapConfig(text=TowerConfig(num_hidden_layers=2))),
    ],
    ids=[*COUNTED, "FFN and projection given", "depth given"],
)
def test_costs_of_both_towers_add_up_to_those_of_the_model(teacher, config, measure):
    grid = grid_of(teacher, config)
    costs = counted_costs(teacher, config, grid, measure)
    for shape in (Shape(16, 1, 16, 2), Shape(48, 4, 32, 2), Shape(64, 3, 48, 2)):
        vision = costs["vision"][grid["vision"].widths.index(shape[0]), shape[1] - 1]
        text = costs["text"][grid["text"].widths.index(shape[2]), grid["text"].depths.index(shape[3])]
        assert vision + text == cost_of(teacher, with_shape(config, shape), measure)


def test_costs_of_a_teacher_of_one_layer_add_up(tiny_config):
    teacher = tiny_config(text={"num_hidden_layers": 1})
    costs = counted_costs(teacher, ClipMapConfig(), grid_of(teacher, ClipMapConfig()), "params")
    assert costs["text"].shape == (3, 1)
    assert costs["vision"][-1, -1] + costs["text"][-1, -1] == model_cost(teacher).parameters


# The choice


@pytest.mark.parametrize("preset", presets_of(TowerConfig))
def test_at_the_cost_of_a_shape_of_the_literature_that_shape_is_chosen(vit_b_16, preset):
    params = cost_of(vit_b_16, PRESETS[preset], "params")
    chosen = choose_shape(vit_b_16, ClipMapConfig(budget={"params": params}))
    assert shape_of(chosen.config) == shape_of(PRESETS[preset])
    assert chosen.candidates[0].cost == params and chosen.candidates[0].score == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("measure", "share"), [("params", 0.3), ("bytes", 0.6), ("macs", 0.2)])
def test_a_chosen_shape_fits_and_nothing_larger_does(teacher, measure, share):
    limit = round(share * COUNTED[measure](teacher))
    chosen = choose_shape(teacher, ClipMapConfig(budget={measure: limit}), shown=1000)
    assert chosen.config.budget is None and len(chosen.candidates) == chosen.fitting
    grid, steps = grid_of(teacher, ClipMapConfig()), (16, 1, 16, 1)
    tables = counted_costs(teacher, ClipMapConfig(), grid, measure)
    costs = {
        Shape(16 * (i + 1), j + 1, 16 * (k + 1), m + 1): float(tables["vision"][i, j] + tables["text"][k, m])
        for i, j, k, m in itertools.product(range(4), range(4), range(3), range(3))
    }
    larger = lambda shape: (  # noqa: E731
        Shape(*(size + step * (axis == grown) for axis, (size, step) in enumerate(zip(shape, steps, strict=True))))
        for grown in range(4)
    )
    full = {s for s in costs if costs[s] <= limit and all(costs.get(one, math.inf) > limit for one in larger(s))}
    assert {one.shape for one in chosen.candidates} == full
    assert {one.shape: one.cost for one in chosen.candidates} == {shape: costs[shape] for shape in full}
    assert shape_of(chosen.config) == chosen.candidates[0].shape
    scores = [one.score for one in chosen.candidates]
    assert scores == sorted(scores, reverse=True)


def test_sizes_and_options_that_are_given_stay(teacher):
    given = ClipMapConfig(TowerConfig(intermediate_size=64), TowerConfig(48, num_hidden_layers=2), refit_steps=7)
    config = ClipMapConfig(given.vision, given.text, budget={"params": 100_000}, refit_steps=7)
    chosen = choose_shape(teacher, config)
    assert chosen.config == with_shape(given, shape_of(chosen.config))
    assert chosen.config.text == given.text and chosen.config.vision.intermediate_size == 64


def test_a_budget_that_the_teacher_meets_leaves_nothing_to_compress(teacher):
    own = cost_of(teacher, ClipMapConfig(), "params")
    for kept in (None, {"vision": torch.ones(4, 4), "text": torch.ones(3, 3)}):
        with pytest.raises(ValueError, match=rf"nothing to compress: the teacher has params={own:,}\. Allow less"):
            choose_shape(teacher, ClipMapConfig(budget={"params": "1G"}), kept)


def test_a_budget_that_cannot_be_met_says_what_the_smallest_shape_costs(teacher):
    smallest = cost_of(teacher, with_shape(ClipMapConfig(), Shape(16, 1, 16, 1)), "params")
    with pytest.raises(ValueError, match=rf"vision 16 × 1 and text 16 × 1 .* has params={smallest:,}\. Allow more"):
        choose_shape(teacher, ClipMapConfig(budget={"params": smallest - 1}))
    chosen = choose_shape(teacher, ClipMapConfig(budget={"params": smallest}))
    assert shape_of(chosen.config) == Shape(16, 1, 16, 1)


def test_without_a_budget_there_is_nothing_to_choose(teacher):
    with pytest.raises(ValueError, match="has no budget"):
        choose_shape(teacher, ClipMapConfig())


def test_the_shape_that_keeps_most_is_chosen(teacher):
    """Vision loses by depth only, text by width only."""
    kept = {
        "vision": torch.linspace(0.2, 1, 4).expand(4, 4),
        "text": torch.linspace(0.2, 1, 3)[:, None].expand(3, 3),
    }
    chosen = choose_shape(teacher, ClipMapConfig(budget={"params": 100_000}), kept)
    shape = shape_of(chosen.config)
    assert (shape.vision_depth, shape.text_width) == (4, 48) and shape.vision_width < 64 and shape.text_depth < 3
    assert chosen.candidates[0].score == pytest.approx(0)


def test_a_choice_prints_why_and_the_candidates(teacher):
    lines = str(choose_shape(teacher, ClipMapConfig(budget={"params": "100k"}), shown=3)).splitlines()
    assert lines[0].startswith("Budget params=100,000: ")
    assert lines[1].startswith(
        "The first is nearest to the shapes of the literature, interpolated at this cost: vision"
    )
    header = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert header == ["vision, width × depth", "text, width × depth", "params (M)", "of the budget", "distance"]
    assert len(lines) == 8
    kept = {"vision": torch.full((4, 4), 0.5), "text": torch.full((3, 3), 0.5)}
    text = str(choose_shape(teacher, ClipMapConfig(budget={"macs": "1M"}), kept))
    assert "| macs (M) |" in text and " 25.0% |" in text and "vision times text" in text


# What is kept


def test_a_whole_tower_keeps_everything_and_a_smaller_one_less(tiny_teacher, tiny_batch):
    for name, table in kept_energy(tiny_teacher, [tiny_batch]).items():
        tower = getattr(tiny_teacher.config, f"{name}_config")
        assert table.shape == (tower.num_attention_heads, tower.num_hidden_layers)
        torch.testing.assert_close(table[-1, -1], torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-9)
        assert (table > 0).all() and (table.diff(dim=0) > 0).all() and (table.diff(dim=1) > 0).all()


def test_what_is_kept_is_the_formula(tiny_teacher, tiny_batch):
    batch = calibration_batch(tiny_batch, tiny_teacher.config, 0)
    statistics, tower = calibrate(tiny_teacher, [batch])["vision"], Tower(tiny_teacher, "vision")
    heads, layers, width = 2, 3, 64
    axes = residual_axes(statistics.read, heads * 16).double()
    centering = torch.eye(width, dtype=torch.float64) - 1 / width
    read = centering @ statistics.read @ centering
    sizes = [torch.linalg.svdvals(one).sqrt().sqrt().mean() ** 4 for one in read]
    share = torch.stack([one / size for one, size in zip(read, sizes, strict=True)])
    total = share[:-1].sum(0) + 4 * share[-1]
    lost = -torch.log((axes @ total @ axes.T).trace() / total.trace())
    dropped = statistics.changed.argmin()
    for index, layer in enumerate(tower.layers):
        covariance, written = statistics.attended[index].covariance, layer.self_attn.out_proj.weight.double()
        strongest = statistics.head_energy[index].topk(heads).indices.sort().values
        kept = (strongest[:, None] * 16 + torch.arange(16)).flatten()
        guess = covariance[:, kept] @ torch.linalg.solve(covariance[kept][:, kept], covariance[kept])
        explained = (written @ guess @ written.T).trace() / (written @ covariance @ written.T).trace()
        lost += statistics.changed[index] * (1 if index == dropped else 1 - explained)
    actual = tower_kept_energy(statistics, tower)[heads - 1, layers - 1]
    torch.testing.assert_close(actual, torch.exp(-lost), rtol=1e-4, atol=0)


def test_batches_that_cannot_be_read_again_are_an_error(tiny_teacher, tiny_batch):
    with pytest.raises(TypeError, match="several times; give a list or a DataLoader"):
        kept_energy(tiny_teacher, iter([tiny_batch]))


# Time


def test_costs_by_depth_are_a_line():
    expected = torch.tensor([[1.0, 3.0, 5.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(extend_to_depths([1, 2], [3, 3], [1, 2, 3]), expected, rtol=0, atol=0)


@pytest.fixture
def stopwatch(monkeypatch):
    """Measures nothing: a layer takes its width in ms, a model 10 ms besides, all of it `factor` times when whole."""
    asked = []

    def measure(config, budget, towers=("vision", "text"), factor=1.0):
        sizes = {name: getattr(config, f"{name}_config") for name in towers}
        asked.append({name: (one.hidden_size, one.num_hidden_layers) for name, one in sizes.items()})
        return {name: factor * (5 + one.hidden_size * one.num_hidden_layers) for name, one in sizes.items()}

    monkeypatch.setattr(latency, "measured_latency", measure)
    monkeypatch.setattr(choice_module, "measured_latency", lambda *given: measure(*given, factor=1.25))
    return asked


def test_each_width_is_measured_at_one_and_two_layers(teacher, stopwatch):
    grid = grid_of(teacher, ClipMapConfig())
    costs = latency_costs(teacher, ClipMapConfig(), grid, Budget(latency_ms=100))
    assert len(stopwatch) == 8 and stopwatch[0] == {"vision": (16, 1), "text": (16, 1)}
    assert stopwatch[-1] == {"vision": (64, 2)}  # the text tower is no wider than 48
    assert costs["vision"].tolist() == [[5 + width * depth for depth in (1, 2, 3, 4)] for width in (16, 32, 48, 64)]


def test_what_the_chosen_shape_takes_is_measured_and_chosen_again_if_it_is_too_much(teacher, stopwatch):
    found = choose_shape(teacher, ClipMapConfig(budget={"latency_ms": 200}))
    assert found.measured_ms <= 200 and found.candidates[0].cost == pytest.approx(found.measured_ms)
    assert len(stopwatch) == 8 + 2  # by the first choice, all take a quarter more
    assert str(found).endswith(f"Measured, the chosen shape takes {found.measured_ms:.2f} ms.")
    assert "| latency (ms) |" in str(found)


def test_a_latency_that_is_too_long_to_the_end_is_said(teacher, stopwatch, monkeypatch):
    monkeypatch.setattr(choice_module, "measured_latency", lambda *_: {"vision": 100.0, "text": 102.0})
    found = choose_shape(teacher, ClipMapConfig(budget={"latency_ms": 200}))
    assert str(found).endswith("Measured, the chosen shape takes 202.00 ms, more than the budget.")
    monkeypatch.setattr(choice_module, "measured_latency", lambda *_: {"vision": 500.0})
    with pytest.raises(ValueError, match="cannot be met"):  # scaled by what it measures, nothing fits
        choose_shape(teacher, ClipMapConfig(budget={"latency_ms": 60}))


def test_latencies_are_measured_on_random_models(teacher, monkeypatch):
    monkeypatch.setattr(latency, "_SECONDS", 1e-3)
    times = measured_latency(teacher, Budget(latency_ms=1, batch_size=2))
    assert list(times) == ["vision", "text"] and all(0 < one < 1e4 for one in times.values())
    assert list(measured_latency(teacher, Budget(latency_ms=1), ["text"])) == ["text"]


@pytest.mark.parametrize("family", ["siglip", "chinese_clip"])
def test_kept_energy_of_a_family_that_it_cannot_read_says_what_to_do(family, request, tiny_batch):
    model = request.getfixturevalue(family)
    with pytest.raises(ValueError, match=rf"'{family}'.*widths and depths.*choose_shape\(teacher\.config, config\)"):
        kept_energy(model, [tiny_batch])
    cost = model_cost(model.config).parameters
    config = ClipMapConfig(initializer="taylor", budget=Budget(params=cost // 2))
    with pytest.raises(ValueError, match="an initializer that reads none, such as 'diagonal'"):
        search_shape(model, config, [tiny_batch])
    assert choose_shape(model.config, config).candidates  # as the message says
