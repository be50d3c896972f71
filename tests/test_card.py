import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants, parse_eval_result_entries

from clipmap_hf import ClipMapConfig, TowerConfig
from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml, parse_arguments
from clipmap_hf.cli.student import map_config
from clipmap_hf.costs.cost import CostReport, model_cost
from clipmap_hf.hub.card import add_to_card, config_yaml, hub_dataset, render_card
from clipmap_hf.hub.folder import add_results, write_card, write_student_folder
from clipmap_hf.hub.license import teacher_license
from clipmap_hf.hub.results import SetResults, benchmark_files, read_results, results_table
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.run_arguments import RunArguments


METHOD = "Its weights were mapped."
RESULTS = [
    SetResults(
        "pairs.parquet",
        {"image_to_text_recall@1": 0.25, "mean_recall": 0.3125},
        {"image_to_text_recall@1": 0.5, "mean_recall": 0.625},
        split="train",
    )
]
ON_A_SET = SetResults(
    "cars",
    {"accuracy@1": 0.123456, "accuracy@5": 0.5},
    None,
    "clip-benchmark/wds_cars",
    "c0ffee",
    "test",
    "zero-shot-image-classification",
)


@pytest.fixture(scope="module")
def cost_table(tiny_config) -> str:
    return str(
        CostReport(teacher=model_cost(tiny_config()), student=model_cost(tiny_config(text={"hidden_size": 24})))
    )


def metadata(card: ModelCard) -> dict:
    """The YAML block at the head of the file, as the Hub reads it."""
    _, block, _ = str(card).split("---\n", 2)
    return yaml.safe_load(block)


def test_a_student_of_a_hub_model_names_its_base_model(cost_table):
    data = metadata(render_card("openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD))
    assert data["base_model"] == "openai/clip-vit-base-patch16"
    assert data["base_model_relation"] == "finetune"


def test_a_student_of_a_local_model_has_no_base_model_and_shows_no_path(cost_table, teacher_folder):
    card = render_card(f"{teacher_folder}/", cost_table, model_class="CLIPModel", method=METHOD)
    assert not {"base_model", "base_model_relation"} & metadata(card).keys()
    assert f"`{teacher_folder.name}`" in str(card) and str(teacher_folder.parent) not in str(card)


def test_the_hub_learns_task_and_library(cost_table):
    data = metadata(render_card("openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD))
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert data["library_name"] == "transformers"
    assert {"clip", "clipmap_hf"} <= set(data["tags"])


def test_a_card_says_how_large_the_models_are_and_how_they_were_made(cost_table):
    text = str(render_card("openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD))
    assert cost_table in text and METHOD in text


def test_results_are_a_table_in_percent_with_the_teacher_beside(cost_table):
    text = str(
        render_card(
            "openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD, results=RESULTS
        )
    )
    lines = text[text.index("| set: metric") :].split("\n\n")[0].splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "---" not in line] == [
        ["set: metric", "teacher", "student"],
        ["pairs.parquet: image_to_text_recall@1", "50.0", "25.0"],
        ["pairs.parquet: mean_recall", "62.5", "31.2"],
    ]


def test_a_table_without_teacher_has_no_column_for_it():
    assert results_table([ON_A_SET]).splitlines()[0].split() == ["|", "set:", "metric", "|", "student", "|"]
    both = results_table([*RESULTS, ON_A_SET]).splitlines()
    assert [cell.strip() for cell in both[-1].split("|")[1:-1]] == ["cars: accuracy@5", "", "50.0"]


def test_results_stand_in_the_model_index(cost_table):
    card = render_card("me/clip", cost_table, model_class="CLIPModel", method=METHOD, results=[*RESULTS, ON_A_SET])
    (model,) = metadata(card)["model-index"]
    assert model["name"] == "compressed me/clip"
    recall, accuracy = model["results"]
    assert recall["task"] == {"type": "image-text-retrieval"}
    assert recall["dataset"] == {"name": "pairs.parquet", "type": "pairs.parquet", "split": "train"}
    assert [(one["type"], one["value"]) for one in recall["metrics"]] == [
        ("image_to_text_recall@1", 0.25),
        ("mean_recall", 0.3125),
    ]
    assert accuracy["task"] == {"type": "zero-shot-image-classification"}
    expected = {"name": "cars", "type": "clip-benchmark/wds_cars", "split": "test", "revision": "c0ffee"}
    assert accuracy["dataset"] == expected and accuracy["metrics"][0]["value"] == 0.1235


def test_only_benchmarks_of_the_hub_have_files_of_results():
    benchmark = dataclasses.replace(ON_A_SET, benchmark_task="zero-shot")
    files = benchmark_files([*RESULTS, ON_A_SET, benchmark])
    assert list(files) == ["clip-benchmark_wds_cars-zero-shot.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files["clip-benchmark_wds_cars-zero-shot.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == (
        "clip-benchmark/wds_cars",
        "zero-shot",
        "c0ffee",
    )
    assert entry.value == 12.35 and "accuracy@1" in entry.notes
    with pytest.raises(ValueError, match="give its dataset_id"):
        SetResults("cars", {"accuracy@1": 0.5}, benchmark_task="zero-shot")


def test_training_sets_of_the_hub_are_named(cost_table, pairs_parquet):
    def sets(**recipe) -> list[str] | None:
        text = yaml.safe_dump(recipe)
        card = render_card("me/clip", cost_table, model_class="CLIPModel", method=METHOD, recipe=text)
        return metadata(card).get("datasets")

    assert sets(train_data="me/pairs", calibration_data="you/pairs") == ["me/pairs", "you/pairs"]
    assert sets(train_data="me/pairs", calibration_data="me/pairs") == ["me/pairs"]
    assert sets(train_data=str(pairs_parquet)) is None and sets(train_data="data/pairs.parquet") is None
    assert sets(train_data="data/pairs-*.tar") is None and sets(output_dir="me/out") is None
    named = sets(train_images="me/photos:large", train_texts=["you/texts:title=2", "words"])
    assert named == ["me/photos", "you/texts"]
    assert sets(train_texts=["data/queries.txt", "labels:data/names.txt", "data/titles.csv:title", "captions"]) is None


def test_a_card_shows_no_folder_of_texts(cost_table):
    recipe = yaml.safe_dump({"train_texts": ["/me/queries.txt=2", "labels:/me/names.txt", "/me/pairs.parquet:title"]})
    text = str(render_card("me/clip", cost_table, model_class="CLIPModel", method=METHOD, recipe=recipe))
    assert all(f"- {name}" in text for name in ("queries.txt=2", "labels:names.txt", "pairs.parquet:title"))
    assert "/me/" not in text


@pytest.mark.parametrize("source", ["./pairs", "pairs", "a/b/c", "data/a.tar.gz", "data/*", "/data/pairs"])
def test_what_is_no_id_is_no_data_set_of_the_hub(source):
    assert hub_dataset(source) is None and hub_dataset("me/pairs") == "me/pairs"


# The license


LICENSED = "---\nlicense: other\nlicense_name: own-terms\nlicense_link: https://example.org/terms\n---\n\n# CLIP\n"


def test_the_teachers_license_is_inherited(cost_table, teacher_folder, tmp_path):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (teacher / "README.md").write_text(LICENSED)
    card = render_card(str(teacher), cost_table, model_class="CLIPModel", method=METHOD)
    found = {key: value for key, value in metadata(card).items() if key.startswith("license")}
    assert found == {
        "license": "other",
        "license_name": "own-terms",
        "license_link": "https://example.org/terms",
    }
    assert "`own-terms` (https://example.org/terms), which the teacher's card states" in str(card)


@pytest.mark.parametrize("card", [None, "no metadata\n", "---\nlicense: [mit\n---\n", "---\nlicense: 3\n---\n"])
def test_a_license_that_is_not_stated_is_unknown(cost_table, teacher_folder, tmp_path, card):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    if card is not None:
        (teacher / "README.md").write_text(card)
    rendered = render_card(str(teacher), cost_table, model_class="CLIPModel", method=METHOD)
    assert metadata(rendered)["license"] == "unknown" and "Look the license up" in str(rendered)


@pytest.mark.parametrize("teacher", ["{}/gone", "{}/gone/", "../gone", "./gone", "~/models/gone", "a/b/gone"])
def test_of_a_teacher_whose_folder_is_gone_the_card_says_that_its_license_is_unknown(cost_table, tmp_path, teacher):
    card = render_card(teacher.format(tmp_path), cost_table, model_class="CLIPModel", method=METHOD)
    assert metadata(card)["license"] == "unknown" and "the teacher's card was not at hand" in str(card)
    assert not {"base_model", "base_model_relation"} & metadata(card).keys()
    assert "version of `gone`" in str(card) and str(tmp_path) not in str(card)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_of_a_teacher_whose_card_cannot_be_read_the_license_is_unknown(teacher_folder, tmp_path, monkeypatch, error):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (teacher / "README.md").write_text(LICENSED)

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(ModelCard, "load", fail)
    assert teacher_license(str(teacher)) == {"license": "unknown"}


def test_the_license_of_a_teacher_on_the_hub_is_that_of_its_cached_card(tmp_path, monkeypatch):
    commit = "c0ffee" * 6 + "c0ff"
    snapshot = tmp_path / "models--me--clip" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert teacher_license("me/clip", commit) == {"license": "mit"}
    assert teacher_license("me/clip") == teacher_license("me/other") == {"license": "unknown"}


def test_a_student_of_a_student_inherits_through_its_card(cost_table, tmp_path):
    teacher = tmp_path / "first"
    teacher.mkdir()
    license = {"license": "mit"}
    render_card("me/clip", cost_table, model_class="CLIPModel", method=METHOD, license=license).save(
        teacher / "README.md"
    )
    assert teacher_license(str(teacher)) == license


# Results on sets, measured later


def write_results(folder: Path, weights: str = "of a student", **accuracies: float) -> Path:
    """What recipes/evaluate.py writes."""
    folder.mkdir()
    for name, accuracy in accuracies.items():
        of_set = {"hub_id": f"me/wds_{name}", "revision": "main", "split": "test", "task": "classification"}
        result = {
            "metrics": {"accuracy@5": 2 * accuracy, "accuracy@1": accuracy},
            "reported": ["accuracy@1"],
            "commit": "c0ffee",
            "settings": {"set": of_set, "files": {"0.tar": 3}, "names": "n", "templates": "t", "weights": weights},
        }
        (folder / f"{name}.json").write_text(json.dumps(result))
    (folder / "summary.json").write_text("{}")
    return folder


def test_results_on_sets_are_read_with_the_teachers(tmp_path):
    student, teacher = write_results(tmp_path / "s", cars=0.25, pets=0.125), write_results(tmp_path / "t", cars=0.5)
    cars, pets = read_results(student, teacher)
    expected = ("cars", {"accuracy@1": 0.25}, {"accuracy@1": 0.5}, "me/wds_cars", "c0ffee", "test")
    assert dataclasses.astuple(cars) == (*expected, "zero-shot-image-classification", None, None)
    assert pets.teacher is None
    assert len(read_results(student, teacher, weights="of a student")) == 2
    with pytest.raises(ValueError, match="'cars' .* was measured with other weights"):
        read_results(student, teacher, weights="of another")
    path = teacher / "cars.json"
    path.write_text(path.read_text().replace('"templates": "t"', '"templates": "other"'))
    with pytest.raises(ValueError, match="'cars' was measured on other images or prompts"):
        read_results(student, teacher)
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path)


def test_results_on_sets_are_put_into_a_folders_card_again_and_again(cost_table, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    card = render_card("me/clip", cost_table, model_class="CLIPModel", method=METHOD, results=RESULTS)
    card.save(folder / "README.md")
    for accuracy in (0.5, 0.25):
        benchmark = dataclasses.replace(ON_A_SET, student={"accuracy@1": accuracy}, benchmark_task="zero-shot")
        add_results(folder, [benchmark])
    changed = ModelCard.load(folder / "README.md")
    values = [(one.dataset_name, one.metric_type, one.metric_value) for one in changed.data.eval_results]
    assert values == [
        ("pairs.parquet", "image_to_text_recall@1", 0.25),
        ("pairs.parquet", "mean_recall", 0.3125),
        ("cars", "accuracy@1", 0.25),
    ]
    assert changed.text.count("## Zero-shot evaluation") == 1 and changed.text.count("cars: accuracy@1") == 1
    before, after = card.text.split("<!-- results on sets -->")[0], card.text.split("<!-- end of")[1]
    assert changed.text.strip().startswith(before.strip()) and changed.text.strip().endswith(after.strip())
    assert [path.name for path in (folder / ".eval_results").iterdir()] == ["clip-benchmark_wds_cars-zero-shot.yaml"]


def test_a_card_without_place_for_results_is_an_error():
    with pytest.raises(ValueError, match="no place for results"):
        add_to_card(ModelCard("---\nlicense: mit\n---\n\nHello.\n"), [ON_A_SET])


def test_new_weights_lose_the_benchmark_results_of_old_ones(tiny_teacher, tiny_processor, cost_table, tmp_path):
    card = render_card("me/clip", cost_table, model_class="CLIPModel", method=METHOD)
    benchmark = dataclasses.replace(ON_A_SET, benchmark_task="zero-shot")
    write_student_folder(tmp_path / "out", tiny_teacher, tiny_processor)
    write_card(tmp_path / "out", card, [benchmark])
    assert len(list((tmp_path / "out" / ".eval_results").iterdir())) == 1
    write_student_folder(tmp_path / "out", tiny_teacher, tiny_processor)
    assert not list((tmp_path / "out" / ".eval_results").iterdir())
    assert not (tmp_path / "out" / "README.md").exists()


def test_without_results_or_recipe_there_are_no_such_sections(cost_table):
    text = str(render_card("openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD))
    assert "## Results" not in text and "## Recipe" not in text


def test_the_recipe_can_be_copied_from_the_card(cost_table):
    recipe = arguments_yaml(RunArguments("groß"), mapping=StageArguments(learning_rate=8e-4))
    text = str(
        render_card("openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD, recipe=recipe)
    )
    block = text.split("```yaml\n")[1].split("```")[0]
    shown, saved = yaml.safe_load(block), yaml.safe_load(recipe)
    assert shown["mapping"]["learning_rate"] == 8e-4 and shown["output_dir"] == "groß"
    assert shown == {key: value for key, value in saved.items() if value is not None} | {"mapping": shown["mapping"]}


def test_a_card_shows_only_the_last_part_of_absolute_paths(cost_table):
    recipe = yaml.safe_dump(
        {"train_data": "/home/someone/pairs.parquet", "files": ["/data/a.tar", "b/c.tar"], "x": None}
    )
    text = str(render_card("openai/clip", cost_table, model_class="CLIPModel", method=METHOD, recipe=recipe))
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown == {"train_data": "pairs.parquet", "files": ["a.tar", "b/c.tar"]} and "someone" not in text


def test_a_configs_yaml_is_read_by_the_recipes(tmp_path):
    config = ClipMapConfig(vision=TowerConfig(hidden_size=32), text=TowerConfig(num_hidden_layers=2), depth="spread")
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml("me/clip", config))
    argv = ["--config", str(path), "--output_dir", "out"]
    teacher, student, run = parse_arguments(TeacherArguments, StudentArguments, RunArguments, argv=argv)
    assert teacher.teacher == ["me/clip"] and map_config(student, run.seed) == config


def test_status_and_figures_of_others_stand_where_they_are_seen(cost_table):
    common = {"model_class": "CLIPModel", "method": METHOD}
    text = str(render_card("me/clip", cost_table, **common, status="No weights yet.", figures="| theirs |"))
    assert text.index("# A compressed CLIP") < text.index("> **No weights yet.**") < text.index("## Use")
    assert "## Figures of the paper\n\n| theirs |\n" in text
    assert "Figures of the paper" not in str(render_card("me/clip", cost_table, **common))


@pytest.mark.parametrize("complete", [False, True])
def test_a_card_says_how_to_load_the_model_and_what_for(cost_table, complete):
    results = RESULTS if complete else []
    text = str(render_card("me/clip", cost_table, model_class="CLIPModel", method=METHOD, results=results))
    for word in ("CLIPModel.from_pretrained", "SentenceTransformer(folder)", "onnxruntime.InferenceSession"):
        assert word in text
    assert "## Intended use and limits" in text and "\n\n\n" not in text


def test_a_card_names_the_students_own_classes(cost_table):
    text = str(render_card("facebook/metaclip-2", cost_table, model_class="MetaClip2Model", method=METHOD))
    assert "import MetaClip2Model" in text and "`MetaClip2VisionModelWithProjection`" in text
    assert "`CLIPModel" not in text


@pytest.mark.parametrize("complete", [False, True])
def test_a_card_is_read_back_by_huggingface_hub(cost_table, tmp_path, complete):
    extras = {"results": RESULTS, "recipe": "seed: 0\n"} if complete else {}
    card = render_card("openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD, **extras)
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.text.strip().startswith("# A compressed CLIP")
    assert "{{" not in loaded.text and "{%" not in loaded.text
