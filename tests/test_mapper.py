import copy
import dataclasses
import math

import pytest
import torch
from calibrated_starts import random_pairs, split, started
from conftest import randomize
from torch.func import functional_call
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import PRESETS, ClipMapConfig, TowerConfig
from clipmap_hf.mapping.depth import DEPTH_RULES, interval_front
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.starts import STARTS, make_plan, start_mapper
from clipmap_hf.training.optimization import parameter_groups


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=32, num_hidden_layers=2)
)
VARIANTS = {
    "default": SMALL,
    "tied ffn": dataclasses.replace(SMALL, tie_ffn=True),
    "depth per kind": dataclasses.replace(SMALL, depth_per="kind"),
    "smaller embedding": dataclasses.replace(SMALL, projection_dim=16),
    "odd ffn": dataclasses.replace(SMALL, vision=TowerConfig(48, 100, 3), text=TowerConfig(16, 33, 1)),
}


FREE = sorted(name for name, start in STARTS.items() if not start.reads_pairs and start.depth_rule is None)


def restored(teacher, config: ClipMapConfig, state: dict[str, torch.Tensor]) -> WeightMapper:
    plan = make_plan(teacher, config)
    return WeightMapper.from_state(plan, plan.teacher_tensors(teacher), copy.deepcopy(state))


def perturbed(mapper: WeightMapper, scale: float = 0.05) -> WeightMapper:
    """Moves every operator away from its start, as training does."""
    generator = torch.Generator().manual_seed(1)
    for operator in mapper.operators.values():
        operator.delta.data += scale * torch.randn(operator.delta.shape, generator=generator)
    return mapper


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=0, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def outputs(model, batch) -> dict[str, torch.Tensor]:
    output = model(**batch)
    return {
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logits_per_image": output.logits_per_image,
        "vision": output.vision_model_output.last_hidden_state,
        "text": output.text_model_output.last_hidden_state,
    }


# What the mapped weights are


@pytest.mark.parametrize("depth", DEPTH_RULES)
def test_same_size_with_diagonal_operators_is_the_teacher(tiny_teacher, tiny_batch, depth):
    assert (tiny_batch["attention_mask"] == 0).any()  # padded captions are among them
    mapper = start_mapper(tiny_teacher, ClipMapConfig(depth=depth)).eval()
    with torch.no_grad():
        mapped, expected = outputs(mapper, tiny_batch), outputs(tiny_teacher, tiny_batch)
    for name, tensor in expected.items():
        torch.testing.assert_close(mapped[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("student_layers", [(2, 2), (3, 1), (4, 3)], ids=str)
def test_diagonal_with_interval_front_is_leading_slices_of_the_listed_layers(tiny_teacher, student_layers):
    config = ClipMapConfig(vision=TowerConfig(32, 96, student_layers[0]), text=TowerConfig(16, 40, student_layers[1]))
    mapped = start_mapper(tiny_teacher, config).export().state_dict()
    teacher, sizes = tiny_teacher.state_dict(), {"vision": (32, 96), "text": (16, 40)}
    layers = {"vision": interval_front(4, student_layers[0]), "text": interval_front(3, student_layers[1])}
    expected = {}
    for tower, (width, ffn) in sizes.items():
        model = f"{tower}_model."
        for mine, theirs in enumerate(layers[tower]):
            new, old = (f"{model}encoder.layers.{layer}." for layer in (mine, theirs))
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
                expected[f"{new}{name}.weight"] = teacher[f"{old}{name}.weight"][:width, :width]
                expected[f"{new}{name}.bias"] = teacher[f"{old}{name}.bias"][:width]
            for name in ("layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias"):
                expected[new + name] = teacher[old + name][:width]
            expected[f"{new}mlp.fc1.weight"] = teacher[f"{old}mlp.fc1.weight"][:ffn, :width]
            expected[f"{new}mlp.fc1.bias"] = teacher[f"{old}mlp.fc1.bias"][:ffn]
            expected[f"{new}mlp.fc2.weight"] = teacher[f"{old}mlp.fc2.weight"][:width, :ffn]
            expected[f"{new}mlp.fc2.bias"] = teacher[f"{old}mlp.fc2.bias"][:width]
        norms = {"vision": ("pre_layrnorm", "post_layernorm"), "text": ("final_layer_norm",)}[tower]
        for name in (f"{norm}.{part}" for norm in norms for part in ("weight", "bias")):
            expected[model + name] = teacher[model + name][:width]
        embeddings = {"vision": ("position_embedding",), "text": ("position_embedding", "token_embedding")}[tower]
        for name in (f"{model}embeddings.{table}.weight" for table in embeddings):
            expected[name] = teacher[name][:, :width]
        projection = {"vision": "visual_projection.weight", "text": "text_projection.weight"}[tower]
        expected[projection] = teacher[projection][:, :width]
    for name in ("vision_model.embeddings.class_embedding", "vision_model.embeddings.patch_embedding.weight"):
        expected[name] = teacher[name][:32]
    assert_same(mapped, {name: expected.get(name, teacher[name]) for name in mapped})
    assert set(mapped) - set(expected) == {"logit_scale"}


def test_diagonal_keeps_whole_heads(tiny_teacher):
    """TinyCLIP's view of the same: the first heads of queries, keys and values, complete."""
    mapped = start_mapper(tiny_teacher, SMALL).export().state_dict()
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = f"vision_model.encoder.layers.0.self_attn.{projection}.weight"
        heads = tiny_teacher.state_dict()[name].view(4, 16, 64)  # (heads, head width, width)
        torch.testing.assert_close(mapped[name].view(2, 16, 32), heads[:2, :, :32], atol=0, rtol=0)


def test_spread_ends_with_the_teachers_last_layer(tiny_teacher):
    mapped = start_mapper(tiny_teacher, dataclasses.replace(SMALL, depth="spread")).export().state_dict()
    teacher = tiny_teacher.state_dict()
    for tower, last in (("vision", 3), ("text", 2)):
        name = f"{tower}_model.encoder.layers.{{}}.mlp.fc1.bias"
        torch.testing.assert_close(mapped[name.format(0)], teacher[name.format(0)][:128], atol=0, rtol=0)
        torch.testing.assert_close(mapped[name.format(1)], teacher[name.format(last)][:128], atol=0, rtol=0)


@pytest.mark.parametrize("tie_ffn", [False, True], ids=["untied", "tied"])
def test_a_mapped_layer_follows_the_papers_equations(tiny_teacher, tie_ffn):
    mapper = perturbed(start_mapper(tiny_teacher, dataclasses.replace(SMALL, tie_ffn=tie_ffn)))
    mapped, teacher = mapper.export().state_dict(), tiny_teacher.state_dict()
    ops = {name: operator().detach() for name, operator in mapper.operators.items()}
    res, depth = ops["vision_residual"], ops["vision_depth"]
    reads = ops["vision_ffn" if tie_ffn else "vision_ffn_in"]
    equations = {
        "self_attn.q_proj.weight": lambda w, i: ops["vision_query"][i] @ w @ res.T,
        "self_attn.k_proj.weight": lambda w, i: ops["vision_key"][i] @ w @ res.T,
        "self_attn.v_proj.weight": lambda w, i: ops["vision_value"][i] @ w @ res.T,
        "self_attn.out_proj.weight": lambda w, i: res @ w @ ops["vision_value"][i].T,
        "mlp.fc1.weight": lambda w, i: ops["vision_ffn"][i] @ w @ res.T,
        "mlp.fc2.weight": lambda w, i: res @ w @ reads[i].T,
        "self_attn.v_proj.bias": lambda b, i: ops["vision_value"][i] @ b,
        "self_attn.out_proj.bias": lambda b, i: res @ b,
        "mlp.fc1.bias": lambda b, i: ops["vision_ffn"][i] @ b,
        "layer_norm2.weight": lambda b, i: res @ b,
    }
    for tensor, narrowed in equations.items():
        name = f"vision_model.encoder.layers.{{}}.{tensor}"
        for layer in range(2):
            expected = sum(depth[layer, i] * narrowed(teacher[name.format(i)], i) for i in range(4))
            torch.testing.assert_close(mapped[name.format(layer)], expected, atol=1e-5, rtol=1e-5)


def test_embeddings_and_projections_follow_the_papers_equations(tiny_teacher):
    mapper = perturbed(start_mapper(tiny_teacher, dataclasses.replace(SMALL, projection_dim=16)))
    mapped, teacher = mapper.export().state_dict(), tiny_teacher.state_dict()
    vision, text, embed = (mapper.operators[name]().detach() for name in ("vision_residual", "text_residual", "embed"))
    patches = "vision_model.embeddings.patch_embedding.weight"
    expected = {
        patches: torch.einsum("dD,Dcij->dcij", vision, teacher[patches]),
        "vision_model.embeddings.class_embedding": vision @ teacher["vision_model.embeddings.class_embedding"],
        "visual_projection.weight": embed @ teacher["visual_projection.weight"] @ vision.T,
        "text_projection.weight": embed @ teacher["text_projection.weight"] @ text.T,
    }
    for table in (
        "vision_model.embeddings.position_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
    ):
        expected[table] = teacher[table] @ (vision if table.startswith("vision") else text).T
    for name, tensor in expected.items():
        torch.testing.assert_close(mapped[name], tensor, atol=1e-5, rtol=1e-5)


# The mapped forward pass and the export are one


@pytest.mark.parametrize("variant", VARIANTS)
def test_mapped_forward_equals_exported_model(tiny_teacher, tiny_batch, variant):
    mapper = perturbed(start_mapper(tiny_teacher, VARIANTS[variant])).eval()
    exported = mapper.export()
    assert type(exported) is CLIPModel and not exported.training
    with torch.no_grad():
        assert_same(outputs(mapper, tiny_batch), outputs(exported, tiny_batch))


@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "trained"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mapped_forward_in_training_equals_exported_model(tiny_teacher, tiny_batch, variant, moved):
    assert tiny_batch["input_ids"].numel() < tiny_teacher.config.text_config.vocab_size  # the token rows are looked up
    mapper = start_mapper(tiny_teacher, VARIANTS[variant]).train()
    if moved:
        mapper = perturbed(mapper)
    with torch.no_grad():
        mapped, expected = outputs(mapper, tiny_batch), outputs(mapper.export(), tiny_batch)
    # A product over few rows may add up in another order than one over the whole table; selecting cannot.
    tolerance = 1e-5 if moved else 0
    for name, tensor in expected.items():
        torch.testing.assert_close(mapped[name], tensor, atol=tolerance, rtol=tolerance)


def test_in_training_only_rows_that_are_looked_up_are_mapped(tiny_teacher):
    mapper = perturbed(start_mapper(tiny_teacher, SMALL))
    table = "text_model.embeddings.token_embedding.weight"
    whole, some = mapper.materialize()[table], mapper.materialize(torch.tensor([[5, 3], [5, 9]]))[table]
    rows = torch.tensor([3, 5, 9])
    torch.testing.assert_close(some[rows], whole[rows], atol=1e-6, rtol=1e-6)
    some[rows] = 0
    torch.testing.assert_close(some, torch.zeros_like(whole), atol=0, rtol=0)


def test_looking_up_or_mapping_the_token_table_gives_the_same_gradients(tiny_teacher, tiny_batch):
    gradients = []
    for looked_up in (True, False):
        mapper = perturbed(start_mapper(tiny_teacher, SMALL)).train()
        weights = mapper.materialize(tiny_batch["input_ids"] if looked_up else None)
        functional_call(mapper.skeleton, weights, kwargs=tiny_batch).text_embeds[:, 0].sum().backward()
        gradients.append(mapper.operators["text_residual"].delta.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_more_tokens_than_the_table_has_rows_may_be_looked_up(tiny_teacher, tiny_batch):
    mapper = perturbed(start_mapper(tiny_teacher, SMALL)).train()
    batch = {name: torch.cat([tensor] * 2) for name, tensor in tiny_batch.items()}
    assert batch["input_ids"].numel() > tiny_teacher.config.text_config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(mapper(**batch).text_embeds[:8], mapper(**tiny_batch).text_embeds)


def test_autocast_leaves_the_mapping_in_fp32(tiny_teacher, tiny_batch):
    mapper = perturbed(start_mapper(tiny_teacher, SMALL)).eval()
    plain = mapper.materialize()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(mapper.materialize(), plain)
        assert mapper(**tiny_batch).image_embeds.dtype == torch.bfloat16  # the forward pass itself is cast
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}


def test_half_precision_teachers_are_mapped_and_exported_in_fp32(tiny_teacher):
    tiny_teacher.config.dtype = torch.float16
    mapper = start_mapper(tiny_teacher.half(), SMALL)
    assert {tensor.dtype for tensor in mapper.materialize().values()} == {torch.float32}
    assert {tensor.dtype for tensor in mapper.export().state_dict().values()} == {torch.float32}


def test_what_becomes_of_an_export_does_not_reach_the_mapper(tiny_teacher, tmp_path):
    mapper = start_mapper(tiny_teacher, SMALL)
    student = mapper.export().half()
    student.save_pretrained(tmp_path)  # writes the precision into the model's config
    student.config.text_config.eos_token_id = 0
    again = mapper.export()
    assert again.config.text_config.eos_token_id == tiny_teacher.config.text_config.eos_token_id
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32}


# What is trained, and what is saved


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_operators_are_trained(tiny_teacher, tiny_batch, variant):
    mapper = start_mapper(tiny_teacher, VARIANTS[variant])
    trainable = {name for name, parameter in mapper.named_parameters() if parameter.requires_grad}
    assert trainable == {f"operators.{name}.delta" for name in mapper.operators}
    output = mapper(**tiny_batch)
    (output.image_embeds[:, 0].sum() + output.text_embeds[:, 0].sum()).backward()
    assert {name for name, p in mapper.named_parameters() if p.grad is not None} == trainable
    assert not any(buffer.requires_grad for buffer in mapper.buffers())
    assert all(p.grad is None and not p.requires_grad for p in mapper.skeleton.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_entries_off_the_diagonal_have_gradients_at_the_start(tiny_teacher, tiny_batch, variant):
    mapper = start_mapper(tiny_teacher, VARIANTS[variant])
    output = mapper(**tiny_batch)
    (output.image_embeds[:, 0].sum() + output.text_embeds[:, 0].sum()).backward()
    sizes = {"vision": (4, VARIANTS[variant].vision), "text": (3, VARIANTS[variant].text)}
    kept = {tower: interval_front(layers, size.num_hidden_layers) for tower, (layers, size) in sizes.items()}
    for name, operator in mapper.operators.items():
        value, gradient = operator().detach(), operator.delta.grad
        if value.ndim == 3:  # a teacher layer that no student layer starts from has no gradient yet
            layers = kept[name.split("_")[0]]
            value, gradient = value[layers], gradient[layers]
        assert (gradient[value == 0] != 0).float().mean() > 0.99, name


def test_operators_are_those_of_the_spaces(tiny_teacher):
    shapes = {name: tuple(operator().shape) for name, operator in start_mapper(tiny_teacher, SMALL).operators.items()}
    vision = dict.fromkeys(("query", "key", "value"), (4, 32, 64)) | {"ffn": (4, 128, 256)}
    text = dict.fromkeys(("query", "key", "value"), (3, 32, 48)) | {"ffn": (3, 128, 192)}
    expected = {f"vision_{space}": shape for space, shape in vision.items()}
    expected |= {f"text_{space}": shape for space, shape in text.items()}
    expected |= {"vision_ffn_in": (4, 128, 256), "text_ffn_in": (3, 128, 192)}
    expected |= {"vision_residual": (32, 64), "text_residual": (32, 48)}
    assert shapes == expected | {"vision_depth": (2, 4), "text_depth": (2, 3)}


def test_tie_ffn_leaves_one_ffn_operator(tiny_teacher):
    operators = start_mapper(tiny_teacher, VARIANTS["tied ffn"]).operators
    untied = start_mapper(tiny_teacher, SMALL).operators
    assert set(untied) - set(operators) == {"vision_ffn_in", "text_ffn_in"}


def test_depth_per_kind_has_a_matrix_for_each_module_of_a_layer(tiny_teacher):
    operators = start_mapper(tiny_teacher, VARIANTS["depth per kind"]).operators
    modules = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "layer_norm1", "layer_norm2")
    expected = {f"{tower}_depth_{module}" for tower in ("vision", "text") for module in modules}
    assert {name for name in operators if "depth" in name} == expected


def test_depth_per_kind_mixes_each_kind_on_its_own(tiny_teacher):
    mapper = start_mapper(tiny_teacher, VARIANTS["depth per kind"])
    before = mapper.export().state_dict()
    mapper.operators["vision_depth_fc1"].delta.data[0, 3] = 0.5
    after = mapper.export().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"vision_model.encoder.layers.0.mlp.fc1.{part}" for part in ("weight", "bias")}


def test_a_smaller_joint_embedding_is_one_operator_for_both_towers(tiny_teacher):
    mapper = start_mapper(tiny_teacher, VARIANTS["smaller embedding"])
    assert mapper.operators["embed"]().shape == (16, 32)
    before = mapper.export().state_dict()
    mapper.operators["embed"].delta.data[3, 20] = 0.5
    after = mapper.export().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"visual_projection.weight", "text_projection.weight"}


def test_a_joint_embedding_that_keeps_its_size_has_no_operator(tiny_teacher):
    for config in (SMALL, dataclasses.replace(SMALL, projection_dim=32)):
        assert "embed" not in start_mapper(tiny_teacher, config).operators


@pytest.mark.parametrize("decay_towards", ["initial", "zero"])
def test_weight_decay_without_gradient_pulls_where_it_was_told(tiny_teacher, decay_towards):
    mapper = start_mapper(tiny_teacher, dataclasses.replace(SMALL, decay_towards=decay_towards))
    before = {name: operator().detach().clone() for name, operator in mapper.operators.items()}
    optimizer = torch.optim.AdamW(parameter_groups(mapper, weight_decay=0.2), lr=0.01)
    for _ in range(5):
        for operator in mapper.operators.values():
            operator.delta.grad = torch.zeros_like(operator.delta)
        optimizer.step()
    for name, start in before.items():
        shrinks = decay_towards == "zero" and "depth" not in name
        expected = start * (1 - 0.01 * 0.2) ** 5 if shrinks else start
        tolerance = 1e-6 if shrinks else 0
        torch.testing.assert_close(mapper.operators[name]().detach(), expected, atol=tolerance, rtol=0)


def test_the_teacher_is_in_no_state_dict_and_not_trained(tiny_teacher):
    mapper = start_mapper(tiny_teacher, SMALL)
    saved = {f"operators.{name}.{part}" for name in mapper.operators for part in ("initial", "delta")}
    assert set(mapper.state_dict()) == saved | {"logit_scale"}
    assert {name for name, _ in mapper.named_parameters()} == {name for name in saved if "delta" in name} | {
        "logit_scale"
    }
    teacher_entries = sum(t.numel() for name, t in mapper.named_buffers() if name.startswith("teacher_"))
    assert teacher_entries == tiny_teacher.num_parameters() - 1


def test_the_mapper_keeps_no_memory_of_the_teacher(tiny_teacher):
    mapper = start_mapper(tiny_teacher, SMALL)
    before = mapper.export().state_dict()
    for parameter in tiny_teacher.parameters():
        parameter.data.zero_()
    assert_same(mapper.export().state_dict(), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_restores_the_student(tiny_teacher, variant):
    mapper = perturbed(start_mapper(tiny_teacher, VARIANTS[variant]))
    mapper.logit_scale.data.fill_(math.log(50))
    other = restored(tiny_teacher, VARIANTS[variant], mapper.state_dict())
    assert_same(other.export().state_dict(), mapper.export().state_dict())


def test_logit_scale_is_the_teachers(tiny_teacher):
    tiny_teacher.logit_scale.data.fill_(3.5)
    assert start_mapper(tiny_teacher, SMALL).export().logit_scale.item() == 3.5


def test_moving_a_mapper_moves_all_of_it(tiny_teacher, tiny_batch):
    mapper = perturbed(start_mapper(tiny_teacher, SMALL)).eval().to(torch.float64)
    assert {p.dtype for p in mapper.skeleton.parameters()} == {torch.float64}
    batch = {**tiny_batch, "pixel_values": tiny_batch["pixel_values"].double()}
    single = perturbed(start_mapper(tiny_teacher, SMALL)).eval()
    with torch.no_grad():
        double, expected = mapper(**batch).image_embeds, single(**tiny_batch).image_embeds
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, atol=1e-5, rtol=0)
    assert {p.device.type for p in mapper.to("meta").skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize("initializer", FREE)
def test_a_mapper_lies_where_its_teacher_lies(tiny_teacher, initializer):
    mapper = start_mapper(tiny_teacher.to("meta"), dataclasses.replace(SMALL, initializer=initializer))
    tensors = [*mapper.parameters(), *mapper.buffers(), *mapper.skeleton.parameters()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_train_and_eval_reach_the_skeleton(tiny_teacher):
    mapper = start_mapper(tiny_teacher, SMALL)
    assert not mapper.eval().skeleton.training
    assert mapper.train().skeleton.training


# How operators start


@pytest.mark.parametrize("name", FREE)
def test_every_initializer_starts_every_width_operator(tiny_teacher, tiny_batch, name):
    config = dataclasses.replace(SMALL, initializer=name, projection_dim=16)
    mapper, again = start_mapper(tiny_teacher, config).eval(), start_mapper(tiny_teacher, config)
    assert_same(again.state_dict(), mapper.state_dict())
    assert all(operator().any() for operator in mapper.operators.values())
    with torch.no_grad():
        assert mapper(**tiny_batch).image_embeds.isfinite().all()
    other = start_mapper(tiny_teacher, dataclasses.replace(config, seed=1))
    same = {key: torch.equal(operator(), other.operators[key]()) for key, operator in mapper.operators.items()}
    for key, equal in same.items():  # depth starts one-hot whatever the initializer
        assert equal == (name == "diagonal" or "depth" in key), key


def test_a_depth_rule_of_another_start_is_an_error_that_lists_the_allowed(tiny_teacher):
    with pytest.raises(
        ValueError,
        match=r"depth='score' is no rule of initializer='diagonal'; allowed are \['interval_front', 'spread'\]",
    ):
        start_mapper(tiny_teacher, dataclasses.replace(SMALL, depth="score"))


# Operators that start from activations, and corrections

CALIBRATED = dataclasses.replace(SMALL, initializer="calibrated", refit_steps=0)
TOKENS = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    return split(random_pairs(shared_teacher.config, 16), 8)


@pytest.fixture(scope="module")
def shared_start(shared_teacher, batches) -> WeightMapper:
    return started(shared_teacher, CALIBRATED, batches)


@pytest.fixture
def calibrated_mapper(shared_start) -> WeightMapper:
    return copy.deepcopy(shared_start)


def test_a_state_that_does_not_fit_is_an_error_that_names_the_tensors(tiny_teacher, calibrated_mapper):
    state = calibrated_mapper.state_dict()
    state["operators.text_query.delta"] = state["operators.text_query.delta"][:, :-1]
    del state["corrections.visual_projection-weight.delta"]
    state["operators.text_extra.delta"] = torch.zeros(1)
    with pytest.raises(
        ValueError,
        match=r"\['corrections.visual_projection-weight.delta', 'operators.text_extra.delta', "
        r"'operators.text_query.delta'\]",
    ):
        restored(tiny_teacher, CALIBRATED, state)


def test_corrections_are_those_of_all_tensors_but_the_token_table(tiny_teacher, calibrated_mapper):
    kinds = {spec.kind.replace(".", "-") for spec in calibrated_mapper.plan.kinds if not spec.rule.lookup}
    assert set(calibrated_mapper.corrections) == kinds and len(kinds) == len(calibrated_mapper.plan.kinds) - 1
    assert calibrated_mapper.corrections["vision_model-encoder-layers-*-mlp-fc1-bias"]().shape == (2, 128)
    for name in (*FREE, None):
        assert not start_mapper(tiny_teacher, dataclasses.replace(SMALL, initializer=name)).corrections


@pytest.mark.parametrize("variant", ["default", "depth per kind", "smaller embedding"])
@pytest.mark.parametrize("decay_towards", ["initial", "zero"])
def test_a_corrected_student_has_the_weights_it_was_given(tiny_teacher, batches, variant, decay_towards):
    changes = {"initializer": "calibrated", "refit": False, "decay_towards": decay_towards}
    mapper = started(tiny_teacher, dataclasses.replace(VARIANTS[variant], **changes), batches)
    before = mapper.export().state_dict()
    wanted = randomize(CLIPModel(mapper.config), seed=5).state_dict()
    for _ in range(2):  # the second time, it is corrected already
        mapper.correct(wanted)
        for name, tensor in mapper.export().state_dict().items():
            expected = before[name] if name in (TOKENS, "logit_scale") else wanted[name]
            torch.testing.assert_close(tensor, expected, atol=2e-6, rtol=0)


def test_a_mapper_that_folds_is_built_whole_with_corrections_of_zero(tiny_teacher, calibrated_mapper):
    plan = calibrated_mapper.plan
    operators = {name: calibrated_mapper.operators[name]().detach() + 0.1 for name in plan.operator_shapes()}
    mapper = WeightMapper(plan, plan.teacher_tensors(tiny_teacher), operators, plan.layers_by_rule())
    for name, expected in operators.items():
        torch.testing.assert_close(mapper.operators[name]().detach(), expected, atol=0, rtol=0)
    assert not any(correction().any() for correction in mapper.corrections.values())
    assert all(tensor.isfinite().all() for tensor in mapper.export().state_dict().values())


@pytest.mark.parametrize("decay_towards", ["initial", "zero"])
def test_operators_and_corrections_are_trained(tiny_teacher, tiny_batch, batches, decay_towards):
    config = dataclasses.replace(CALIBRATED, decay_towards=decay_towards, refit=False)
    mapper = started(tiny_teacher, config, batches).train()
    trainable = {name for name, parameter in mapper.named_parameters() if parameter.requires_grad}
    expected = {f"operators.{name}.delta" for name in mapper.operators}
    assert trainable == expected | {f"corrections.{name}.delta" for name in mapper.corrections}
    output = mapper(**tiny_batch)
    (output.image_embeds[:, 0].sum() + output.text_embeds[:, 0].sum()).backward()
    without = {name for name, parameter in mapper.named_parameters() if parameter.grad is None}
    assert without == {"logit_scale"}
    # A key's bias adds the same to all scores of a query, so that its gradient is rounding noise at most.
    idle = {name for name, p in mapper.named_parameters() if p.requires_grad and not p.grad.any()}
    assert not [name for name in idle if "k_proj-bias" not in name]


@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "trained"])
def test_a_calibrated_forward_equals_the_exported_model(calibrated_mapper, tiny_batch, moved):
    if moved:
        generator = torch.Generator().manual_seed(1)
        for parameter in (one.delta for one in calibrated_mapper.corrections.values()):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        perturbed(calibrated_mapper)
    with torch.no_grad():
        expected = outputs(calibrated_mapper.export(), tiny_batch)
        assert_same(outputs(calibrated_mapper.eval(), tiny_batch), expected)
        for name, tensor in outputs(calibrated_mapper.train(), tiny_batch).items():  # looks tokens up
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)


def test_a_calibrated_mapper_maps_the_rows_that_are_looked_up(calibrated_mapper):
    rows = torch.tensor([3, 5, 9])
    whole, some = calibrated_mapper.materialize(), calibrated_mapper.materialize(torch.tensor([[5, 3], [5, 9]]))
    torch.testing.assert_close(some[TOKENS][rows], whole[TOKENS][rows], atol=1e-6, rtol=1e-6)
    assert some[TOKENS].any(dim=1).sum() == 3
    for name, tensor in whole.items():
        assert name == TOKENS or torch.equal(some[name], tensor), name


@pytest.mark.parametrize("decay_towards", ["initial", "zero"])
def test_a_state_dict_restores_a_calibrated_student(tiny_teacher, batches, decay_towards):
    config = dataclasses.replace(CALIBRATED, decay_towards=decay_towards, projection_dim=16)
    mapper = perturbed(started(tiny_teacher, config, batches))
    for correction in mapper.corrections.values():
        correction.delta.data += 0.1
    other = restored(tiny_teacher, config, mapper.state_dict())
    assert_same(other.export().state_dict(), mapper.export().state_dict())


def test_weight_decay_pulls_a_calibrated_start_where_it_was_told(tiny_teacher, batches):
    students = []
    for decay_towards in ("initial", "zero"):
        config = dataclasses.replace(CALIBRATED, decay_towards=decay_towards, refit=False)
        mapper = started(tiny_teacher, config, batches)
        before = mapper.export().state_dict()
        for part in (*mapper.operators.values(), *mapper.corrections.values()):
            assert part.initial.any() == (decay_towards == "initial" and part().any())
        optimizer = torch.optim.AdamW(parameter_groups(mapper, weight_decay=0.5), lr=0.1)
        for parameter in mapper.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        after = mapper.export().state_dict()
        students.append((before, {name for name in before if not torch.equal(after[name], before[name])}))
    assert_same(students[1][0], students[0][0])  # both start alike
    assert not students[0][1] and TOKENS in students[1][1] and "visual_projection.weight" in students[1][1]


@pytest.mark.parametrize(
    ("preset", "tie_ffn", "count"),
    [
        ("base", False, 275_907_856),
        ("small", False, 137_954_216),
        ("tiny", False, 68_977_072),
        ("small", True, 75_039_656),
    ],
)
def test_operator_counts_of_the_papers_presets(preset, tie_ffn, count):
    teacher = CLIPConfig(vision_config={"patch_size": 16})
    with torch.device("meta"):
        plan = MappingPlan.make(CLIPModel(teacher), dataclasses.replace(PRESETS[preset], tie_ffn=tie_ffn))
    student, width = plan.student, sum(math.prod(shape) for shape in plan.operator_shapes().values())
    towers = [(student.vision_config, teacher.vision_config), (student.text_config, teacher.text_config)]
    depth = sum(6 * small.num_hidden_layers * big.num_hidden_layers for small, big in towers)  # q, k, v, o, fc1, fc2
    assert width + depth == count
