"""Students of a CLIP with a ResNet: TinyCLIP's slices, what else works, and what is refused by name."""

import copy
import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from clipmap_hf import shapes
from clipmap_hf.cli.arguments import StudentArguments
from clipmap_hf.cli.student import map_config
from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import (
    PRESETS,
    Budget,
    ClipMapConfig,
    ResNetTowerConfig,
    TowerConfig,
    cut_towers,
    presets_of,
    student_config,
)
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.export.onnx import GRAPHS, onnx_parity, write_onnx
from clipmap_hf.export.open_clip_folder import read_open_clip_folder, write_open_clip_folder
from clipmap_hf.families import CLIP_RESNET, family_for
from clipmap_hf.mapping.operators import project
from clipmap_hf.models.clip_resnet.config import CLIPResNetConfig
from clipmap_hf.models.clip_resnet.model import CLIPResNetModel
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.models.towers import Tower
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer, freeze_tower
from clipmap_hf.shapes import choose_shape, search_shape
from clipmap_hf.shapes.grid import COUNTED
from clipmap_hf.starts import STARTS, start_mapper
from clipmap_hf.starts.selection.masks import Masks
from clipmap_hf.starts.selection.mope import mope_errors
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.model import pack_model
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.mapping import MappingStage


RN50 = CLIPResNetConfig()
NARROW = ClipMapConfig(vision=ResNetTowerConfig(width=2), text=TowerConfig(hidden_size=32, num_hidden_layers=2))


def front(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return tensor[tuple(slice(0, size) for size in shape)]


def test_diagonal_inheritance_is_the_front_slice_of_every_tensor(clip_resnet):
    student = start_mapper(clip_resnet, ClipMapConfig(vision=ResNetTowerConfig(width=2))).export()
    teacher, tensors = clip_resnet.state_dict(), student.state_dict()
    assert {name for name, one in tensors.items() if one.shape != teacher[name].shape} >= {
        "vision_model.conv1.weight",
        "vision_model.layer2.1.bn2.running_var",
        "vision_model.layer4.0.downsample.0.weight",
        "vision_model.attnpool.positional_embedding",
    }
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, front(teacher[name], tensor.shape), atol=0, rtol=0)
        assert tensor.dtype == teacher[name].dtype


def test_square_operators_that_permute_channels_change_nothing(clip_resnet, tiny_batch):
    """A permutation is a selection, under which ReLU, BatchNorm and heads do what they did."""
    mapper = start_mapper(clip_resnet, ClipMapConfig(vision=ResNetTowerConfig(width=2)))
    sizes = {name: shape[-1] for name, shape in mapper.plan.operator_shapes().items() if name.startswith("vision_")}
    generator = torch.Generator().manual_seed(0)
    orders = {}
    for name, size in sizes.items():
        if "_pool_" in name:  # within heads; query and key have the same order
            orders[name] = torch.arange(size).view(-1, 32).flip(1).flatten()
        else:
            orders[name] = torch.randperm(size, generator=generator)
    operators = {name: torch.eye(len(order))[order] for name, order in orders.items()}
    tensors, family = clip_resnet.state_dict(), family_for(clip_resnet.config)
    moved = CLIPResNetModel(clip_resnet.config).eval()
    for name, tensor in moved.state_dict().items():
        spec, value = family.match(name), tensors[name]
        for axis, space in enumerate(spec.rule.axes):
            operator = operators.get(mapper.plan.operator_name(space, spec.tower)) if space else None
            if operator is not None:
                operator = operator.square() if spec.rule.squared else operator
                value = project(value, operator, axis - len(spec.rule.axes))
        tensor.copy_(value)
    with torch.no_grad():
        found, expected = (one.get_image_features(tiny_batch["pixel_values"]) for one in (moved, clip_resnet))
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
    assert not torch.equal(moved.vision_model.conv2.weight, clip_resnet.vision_model.conv2.weight)


def test_a_variance_goes_through_the_squares_of_an_operator(clip_resnet):
    mapper = start_mapper(clip_resnet, ClipMapConfig(vision=ResNetTowerConfig(width=2), initializer="xavier"))
    operator, norm = mapper.operators["vision_inner2b"]()[0], clip_resnet.vision_model.layer2[1].bn2
    mapped = mapper.materialize()
    torch.testing.assert_close(
        mapped["vision_model.layer2.1.bn2.running_var"], operator.square() @ norm.running_var, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(mapped["vision_model.layer2.1.bn2.weight"], operator @ norm.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        mapped["vision_model.layer2.1.conv2.weight"],
        torch.einsum(
            "ao,bi,oixy->abxy",
            operator,
            mapper.operators["vision_inner2a"]()[0],
            clip_resnet.vision_model.layer2[1].conv2.weight,
        ),
        atol=1e-6,
        rtol=0,
    )


SHALLOW = ResNetTowerConfig(layers=[2, 2, 1, 3])


def test_fewer_blocks_of_a_stage_are_the_first_ones(deep_clip_resnet):
    student = start_mapper(deep_clip_resnet, ClipMapConfig(vision=SHALLOW)).export()
    teacher, tensors = deep_clip_resnet.state_dict(), student.state_dict()
    assert student.config.vision_config.layers == [2, 2, 1, 3] and student.config.vision_config.width == 4
    gone = {".".join(name.split(".")[1:3]) for name in teacher.keys() - tensors.keys()}
    assert gone == {"layer2.2", "layer3.1", "layer4.3"}
    torch.testing.assert_close(dict(tensors), {name: teacher[name] for name in tensors}, atol=0, rtol=0)


def test_a_depth_rule_chooses_among_the_blocks_behind_the_first(deep_clip_resnet):
    config = ClipMapConfig(vision=ResNetTowerConfig(width=2, layers=[1, 2, 2, 3]), depth="spread")
    tensors = start_mapper(deep_clip_resnet, config).export().state_dict()
    teacher = deep_clip_resnet.state_dict()
    olds = {"layer2.1": "layer2.2", "layer3.1": "layer3.1", "layer4.1": "layer4.1", "layer4.2": "layer4.3"}
    for student, old in olds.items():
        for name in (name for name in tensors if f".{student}." in name):
            expected = front(teacher[name.replace(student, old)], tensors[name].shape)
            torch.testing.assert_close(tensors[name], expected, atol=0, rtol=0)


@pytest.mark.parametrize("depth_per", ["tower", "kind"])
def test_a_shallower_student_is_mapped_saved_and_taken_up(deep_clip_resnet, tiny_batch, depth_per):
    config = dataclasses.replace(NARROW, vision=ResNetTowerConfig(width=2, layers=[2, 2, 1, 3]), depth_per=depth_per)
    mapper = start_mapper(deep_clip_resnet, config, [tiny_batch])
    depths = {name: tuple(one().shape) for name, one in mapper.operators.items() if "depth" in name}
    stages = {"layers_0": (1, 1), "layers_1": (1, 2), "layers_3": (2, 3)}
    modules = [f"_{kind}{place}" for kind in ("conv", "bn") for place in "123"] if depth_per == "kind" else [""]
    assert {name: depths[name] for name in depths if name.startswith("vision")} == {
        f"vision_{stage}_depth{module}": shape for stage, shape in stages.items() for module in modules
    }
    stage = MappingStage(mapper).train()
    stage([tiny_batch])["loss"].backward()
    assert all(mapper.operators[f"vision_inner{place}a"].delta.grad.any() for place in (1, 2, 4))
    again = type(mapper).from_state(mapper.plan, mapper.plan.teacher_tensors(deep_clip_resnet), mapper.state_dict())
    torch.testing.assert_close(dict(again.export().state_dict()), dict(mapper.export().state_dict()), atol=0, rtol=0)


def test_every_space_of_the_table_has_a_size(clip_resnet):
    config = clip_resnet.config
    sizes = {"stem1": 2, "stem2": 2, "stem3": 4, "stream1": 16, "stream4": 128, "first1a": 4, "inner2b": 8}
    for space, size in {**sizes, "first4a": 32, "pool_value": 128, "embed": 32}.items():
        assert CLIP_RESNET.size(space, "vision", config) == size


def test_sizes_of_published_models():
    """RN50's are open_clip's; TinyCLIP names its two by theirs, 30 M + 29 M and 19 M + 19 M (text without table)."""
    rn50 = CLIPResNetConfig()
    found = {}
    for name, size in (("RN50", ClipMapConfig()), *((name, PRESETS[name]) for name in presets_of(ResNetTowerConfig))):
        with torch.device("meta"):
            model = CLIPResNetModel(student_config(rn50, size))
        count = sum(one.numel() for one in model.parameters())
        vision = sum(one.numel() for one in model.vision_model.parameters())
        table = model.text_model.embeddings.token_embedding.weight.numel()
        found[name] = tuple(round(part / 1e6, 1) for part in (count, vision, count - vision - table))
    assert found == {"RN50": (102.0, 38.3, 38.4), "resnet-30m": (83.8, 29.6, 28.9), "resnet-19m": (63.4, 18.6, 19.5)}


@pytest.mark.parametrize("preset", presets_of(ResNetTowerConfig))
def test_at_the_cost_of_tinyclips_student_that_student_is_chosen(preset):
    config = student_config(RN50, PRESETS[preset])
    choice = choose_shape(RN50, ClipMapConfig(budget={"params": model_cost(config).parameters}))
    assert choice.config.vision == PRESETS[preset].vision
    assert choice.config.text.num_hidden_layers == PRESETS[preset].text.num_hidden_layers
    assert student_config(RN50, choice.config).to_dict() == config.to_dict()
    assert f"{config.vision_config.width} × 16" in str(choice)


@pytest.mark.parametrize(("measure", "limit"), [("params", "40M"), ("macs", "2G"), ("bytes", "200M")])
def test_a_budget_is_met_and_not_by_a_head_or_layer_more(measure, limit):
    budget = Budget.from_dict({measure: limit})
    choice = choose_shape(RN50, ClipMapConfig(vision=ResNetTowerConfig(layers=[3, 4, 5, 3]), budget=budget))
    chosen = student_config(RN50, choice.config)
    assert chosen.vision_config.layers == [3, 4, 5, 3] and chosen.vision_config.width % 2 == 0
    wider = dataclasses.replace(choice.config, vision=ResNetTowerConfig(chosen.vision_config.width + 2, [3, 4, 5, 3]))
    costs = [COUNTED[measure](config) for config in (chosen, student_config(RN50, wider))]
    assert costs[0] == choice.candidates[0].cost <= budget.limit < costs[1]


def test_a_latency_budget_measures_a_resnet_at_its_own_depth(clip_resnet, monkeypatch):
    def measured(config, budget, towers=("vision", "text")):
        sizes = {"vision": config.vision_config.width, "text": config.text_config.num_hidden_layers}
        return {name: float(sizes[name]) for name in towers}

    for module in (shapes.latency, shapes.choice):
        monkeypatch.setattr(module, "measured_latency", measured)
    choice = choose_shape(clip_resnet.config, ClipMapConfig(budget={"latency_ms": 4}))
    assert (choice.config.vision.width, choice.config.text.num_hidden_layers) == (2, 2)


def test_a_budget_is_searched_by_the_literature_though_pairs_measure_the_norms(clip_resnet_folder, pairs_parquet):
    given = {"calibration_data": str(pairs_parquet), "calibration_pairs": 16}
    compressor = ClipMapCompressor.from_pretrained(clip_resnet_folder, {"params": "60k"}, **given)
    assert model_cost(compressor.config).parameters <= 60_000 and compressor.config.vision_config.width == 2
    assert "nearest to the shapes of the literature" in str(compressor.choice)
    expected = search_shape(load_model(str(clip_resnet_folder)), ClipMapConfig(budget={"params": "60k"})).config
    assert compressor.map_config.vision == expected.vision and compressor.map_config.text == expected.text


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (ResNetTowerConfig(width=3), r"vision\.width=3 does not fit the teacher; it must be even.*\[2, 4\]"),
        (ResNetTowerConfig(width=6), r"vision\.width=6 does not fit the teacher.*\[2, 4\]"),
        (ResNetTowerConfig(width=2.0), r"vision\.width=2\.0 does not fit"),
        (ResNetTowerConfig(layers=[1, 3, 1, 1]), r"vision\.layers=\[1, 3, 1, 1\] does not fit .* \[1, 2, 1, 1\]"),
        (ResNetTowerConfig(layers=[1, 0, 1, 1]), r"vision\.layers=\[1, 0, 1, 1\] does not fit"),
        (ResNetTowerConfig(layers=[1, 2, 1]), r"vision\.layers=\[1, 2, 1\] does not fit .* each of its 4 stages"),
        (TowerConfig(hidden_size=64), r"vision is given by \['hidden_size'\].*\['width', 'layers'\]"),
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_is_an_error(clip_resnet, size, message):
    with pytest.raises(ValueError, match=message):
        student_config(clip_resnet.config, ClipMapConfig(vision=size))


def test_a_preset_of_another_kind_of_teacher_is_an_error_that_names_those_that_fit(clip_resnet, shared_teacher):
    for teacher, wrong, fitting in (
        (clip_resnet, "small", r"\['resnet-30m', 'resnet-19m'\]"),
        (shared_teacher, "resnet-19m", r"\['base', 'small', 'tiny'\]"),
    ):
        with pytest.raises(ValueError, match=f"tower is of another kind.*Its presets are {fitting}"):
            start_mapper(teacher, PRESETS[wrong])


def test_arguments_change_a_preset_of_a_resnet():
    small = map_config(StudentArguments(student="resnet-19m", vision_width=40, text_num_hidden_layers=5))
    assert (small.vision, small.text) == (ResNetTowerConfig(width=40), TowerConfig(num_hidden_layers=5))
    assert map_config(StudentArguments(student="resnet-30m")) == PRESETS["resnet-30m"]
    assert map_config(StudentArguments(student="resnet-30m", vision_hidden_size=64)).vision == TowerConfig(64)


def test_the_size_of_a_resnet_does_not_fit_a_transformer(shared_teacher):
    with pytest.raises(ValueError, match=r"vision is given by \['width'\].*'hidden_size'"):
        student_config(shared_teacher.config, ClipMapConfig(vision=ResNetTowerConfig(width=2)))


def test_a_text_tower_alone_is_made_smaller(clip_resnet):
    config = ClipMapConfig(text=TowerConfig(hidden_size=32))
    assert cut_towers(clip_resnet.config, student_config(clip_resnet.config, config)) == ("text",)
    student = start_mapper(clip_resnet, config).export()
    torch.testing.assert_close(
        dict(student.vision_model.state_dict()), dict(clip_resnet.vision_model.state_dict()), atol=0, rtol=0
    )


def test_costs_are_those_of_the_convolutions(clip_resnet):
    cost = model_cost(clip_resnet.config)
    assert cost.parameters == sum(one.numel() for one in clip_resnet.parameters())
    # By hand: kernel × channels × places, of the stem, and of each stage's blocks; then the pool's five products.
    stem = (9 * 3 * 2 + 9 * 2 * 2 + 9 * 2 * 4) * 256
    first = (4 * 4 + 9 * 4 * 4 + 4 * 16 + 4 * 16) * 64
    second = (16 * 8 + 9 * 64) * 64 + (8 * 32 + 16 * 32) * 16 + (32 * 8 + 9 * 64 + 8 * 32) * 16
    third = (32 * 16 + 9 * 256) * 16 + (16 * 64 + 32 * 64) * 4
    fourth = (64 * 32 + 9 * 1024) * 4 + (32 * 128 + 64 * 128) * 1
    pool = (1 + 2 + 2) * 128 * 128 + 2 * 2 * 128 + 128 * 32
    assert cost.vision_macs == stem + first + second + third + fourth + pool


def test_a_student_is_written_loaded_and_run_by_open_clips_format(clip_resnet_folder, tiny_batch, tmp_path):
    compressor = ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW)
    compressor.save_pretrained(tmp_path / "student")
    student = load_model(str(tmp_path / "student"))
    assert type(student) is CLIPResNetModel and student.config.vision_config.width == 2
    again = ClipMapCompressor.from_pretrained(tmp_path / "student").export()
    torch.testing.assert_close(dict(again.state_dict()), dict(student.state_dict()), atol=0, rtol=0)
    write_open_clip_folder(tmp_path / "there", student, compressor.processor)
    back, _ = read_open_clip_folder(str(tmp_path / "there"))
    torch.testing.assert_close(dict(back.state_dict()), dict(student.state_dict()), atol=0, rtol=0)
    assert "image_embeds" in back(**tiny_batch)


def test_the_card_of_a_student_says_how_it_is_loaded(clip_resnet_folder, tmp_path, monkeypatch):
    ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    begin = card.index("```python\n") + len("```python\n")
    code = card[begin : card.index("```", begin)]
    assert code.startswith("import clipmap_hf")
    Image.new("RGB", (40, 32)).save(tmp_path / "animal.jpg")
    monkeypatch.chdir(tmp_path)
    shown = {"load_processor": load_processor}  # which works without torchvision
    exec(code.replace("AutoProcessor.from_pretrained(folder)", "load_processor(folder)"), shown)
    assert type(shown["model"]) is CLIPResNetModel
    assert "convert_open_clip" in card and "VisionModel" not in card and "transformers.CLIPResNetModel" not in card


@pytest.mark.parametrize("initializer", sorted(STARTS))
def test_starts_work_or_are_refused_by_name(clip_resnet, initializer, tiny_batch):
    batches = [tiny_batch] if STARTS[initializer].reads_pairs else None
    config = ClipMapConfig(vision=ResNetTowerConfig(width=2), initializer=initializer, refit_steps=0)
    if STARTS[initializer].fits(family_for(clip_resnet.config)):
        assert start_mapper(clip_resnet, config, batches).export().get_image_features(tiny_batch["pixel_values"])
        return
    message = rf"'{initializer}' .* family 'clip_resnet'\. Name one of \['calibrated', 'diagonal', 'kaiming', "
    with pytest.raises(ValueError, match=message):
        start_mapper(clip_resnet, config, batches)


def test_a_start_from_data_is_refused_by_name(clip_resnet_folder, pairs_parquet):
    given = {"calibration_data": str(pairs_parquet), "initializer": "importance"}
    with pytest.raises(ValueError, match=r"'importance' goes through .* 'clip_resnet'.*\['calibrated', 'taylor'\]"):
        ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW, **given)


def test_what_needs_a_transformer_is_refused_by_name(clip_resnet, tiny_teacher):
    config = clip_resnet.config
    with pytest.raises(ValueError, match="'clip_resnet' cannot be masked; start by an initializer"):
        Masks(config, family_for(config))
    with pytest.raises(ValueError, match="Ternary .* 'clip_resnet'"):
        pack_model(clip_resnet, TernaryConfig())
    with pytest.raises(ValueError, match="'clip_resnet' cannot be gone through layer by layer"):
        Tower(clip_resnet, "vision")
    with pytest.raises(ValueError, match="'clip_resnet' cannot be gone through layer by layer"):
        mope_errors(clip_resnet, [])
    clip_resnet = copy.deepcopy(clip_resnet)  # which stages freeze
    for student, teacher in ((clip_resnet, tiny_teacher), (tiny_teacher, clip_resnet)):
        with pytest.raises(ValueError, match="hidden loss .* 'clip_resnet'"):
            DistillationStage(student, teachers=[teacher], losses={"hidden": 1, "affinity": 1})


def test_what_batch_norms_do_not_allow_is_refused_by_name(clip_resnet, tiny_batch, as_process):
    model = start_mapper(clip_resnet, NARROW).export()
    with pytest.raises(ValueError, match="freeze='vision', but the vision tower of a CLIPResNetModel has BatchNorms"):
        freeze_tower(model, "vision")
    stage = ContrastiveStage(model).train()
    with pytest.raises(ValueError, match="BatchNorms is trained on whole batches in one process.*micro_batch_size"):
        stage([tiny_batch, tiny_batch])
    before = model.vision_model.bn1.running_mean.clone()
    assert stage([tiny_batch])["loss"].isfinite()
    assert not torch.equal(before, model.vision_model.bn1.running_mean)
    as_process(0, 2)
    with pytest.raises(ValueError, match="in one process"):
        stage([tiny_batch])


def test_a_resnet_that_teaches_is_left_as_it_is(clip_resnet, tiny_teacher, tiny_batch):
    clip_resnet = copy.deepcopy(clip_resnet)
    before = {name: one.clone() for name, one in clip_resnet.state_dict().items()}
    stage = DistillationStage(tiny_teacher, teachers=[clip_resnet], losses={"affinity": 1}).train()
    assert stage([tiny_batch, tiny_batch])["loss"].isfinite()
    torch.testing.assert_close(dict(clip_resnet.state_dict()), before, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_resnet_is_compressed_and_distilled(
    clip_resnet_folder, pairs_parquet, tmp_path, tiny_batch, fresh_accelerator, cached
):
    student = ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW).export()
    before = student.vision_model.bn1.running_mean.clone()
    data = DataArguments(train_data=str(pairs_parquet), eval_data=str(pairs_parquet))
    cache = TeacherCacheArguments(str(tmp_path / "cache") if cached else None)
    context = RunContext(RunArguments(output_dir=str(tmp_path / "out")), data, cache=cache)
    arguments = DistillationStageArguments(max_steps=2, batch_size=8)
    DistillationTrainer(student, Teacher.load(str(clip_resnet_folder)), arguments, context=context).train()
    written = load_model(str(tmp_path / "out"))
    torch.testing.assert_close(dict(written.state_dict()), dict(student.cpu().state_dict()), atol=0, rtol=0)
    norms = [one for one in written.modules() if isinstance(one, nn.BatchNorm2d)]
    assert all(int(norm.num_batches_tracked) == 7 + 2 for norm in norms)
    assert not torch.equal(written.vision_model.bn1.running_mean, before)
    assert evaluate_retrieval(written, [tiny_batch | {"image_of_text": torch.arange(8)}])


@pytest.mark.slow
def test_a_run_that_is_taken_up_again_has_the_same_bits(
    clip_resnet_folder, pairs_parquet, tmp_path, fresh_accelerator
):
    """The statistics of BatchNorms are part of a checkpoint."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def train(name: str, *callbacks: type[TrainerCallback]) -> dict[str, torch.Tensor]:
        student = ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW).export()
        run = RunArguments(output_dir=str(tmp_path / name), save_steps=2)
        context = RunContext(run, DataArguments(train_data=str(pairs_parquet)), callbacks=callbacks)
        arguments = DistillationStageArguments(max_steps=4, batch_size=8)
        DistillationTrainer(student, Teacher.load(str(clip_resnet_folder)), arguments, context=context).train()
        return load_file(tmp_path / name / "model.safetensors")

    with pytest.raises(KeyboardInterrupt):
        train("stopped", Stop)
    torch.testing.assert_close(train("stopped"), train("straight"), atol=0, rtol=0)


@pytest.mark.slow
def test_the_command_compresses_and_converts(clip_resnet_folder, pairs_parquet, tmp_path):
    def run(*argv: object) -> None:
        command = [sys.executable, "-m", "clipmap_hf", *map(str, argv)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    out, there = tmp_path / "small", tmp_path / "there"
    size = ("--vision_width", 2, "--initializer", "diagonal")
    steps = ("--distillation_steps", 2, "--distillation_batch_size", 8)
    data = ("--train_data", pairs_parquet, "--eval_data", pairs_parquet)
    run("compress", "--teacher", clip_resnet_folder, *size, *data, *steps, "--output_dir", out)
    run("evaluate", "--model", out, "--eval_data", pairs_parquet)
    run("convert_open_clip", "--model", out, "--to", "open_clip", "--output_dir", there)
    run("convert_open_clip", "--model", there, "--to", "transformers", "--output_dir", tmp_path / "back")
    first, last = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "back"))
    torch.testing.assert_close(first, last, atol=0, rtol=0)


@pytest.mark.slow
def test_onnx_and_sentence_transformers_have_its_embeddings(clip_resnet_folder, tiny_batch, tiny_pairs, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = shutil.copytree(clip_resnet_folder, tmp_path / "model")
    model, processor = load_model(str(folder)), load_processor(str(folder))
    write_onnx(folder, model, processor)
    batches = [tiny_batch, {name: tensor[:3] for name, tensor in tiny_batch.items()}]
    for name in GRAPHS:
        exact = onnx_parity(folder / f"onnx/{name}.onnx", model, batches)
        assert max(error for error, _ in exact.values()) < 1e-5
        rounded = onnx_parity(folder / f"onnx/{name}_quantized.onnx", model, batches)
        assert min(cosine for _, cosine in rounded.values()) > 0.99
    other, rows = SentenceTransformer(str(folder), device="cpu"), tiny_pairs[::3]
    with torch.no_grad():
        expected = model(**tiny_batch)
    images = other.encode([row["image"] for row in rows], convert_to_tensor=True, normalize_embeddings=True)
    texts = other.encode([row["caption"] for row in rows], convert_to_tensor=True, normalize_embeddings=True)
    torch.testing.assert_close(images, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, expected.text_embeds, atol=1e-5, rtol=0)
