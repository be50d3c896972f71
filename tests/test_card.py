import pytest
import yaml
from huggingface_hub import ModelCard

from clipmap_hf.evaluation.cost import CostReport, model_cost
from clipmap_hf.hub.card import render_card
from clipmap_hf.training.arguments import RunArguments, StageArguments
from clipmap_hf.training.parsing import arguments_yaml


METHOD = "Its weights were mapped."
RESULTS = {
    "teacher": {"image_to_text_recall@1": 0.5, "mean_recall": 0.625},
    "student": {"image_to_text_recall@1": 0.25, "mean_recall": 0.3125},
}


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


def test_results_are_a_table_in_percent(cost_table):
    text = str(
        render_card(
            "openai/clip-vit-base-patch16", cost_table, model_class="CLIPModel", method=METHOD, results=RESULTS
        )
    )
    start = text.index("| model | image_to_text_recall@1")
    assert text[start:].split("\n\n")[0].splitlines() == [
        "| model | image_to_text_recall@1 | mean_recall |",
        "|---|---|---|",
        "| teacher | 50.0 | 62.5 |",
        "| student | 25.0 | 31.2 |",
    ]


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
