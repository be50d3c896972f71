"""What calibration measures is what hooks see in the plain model."""

from collections import defaultdict

import pytest
import torch
from calibrated_starts import TOWERS, random_pairs, split
from conftest import CLIP_KINDS, clip_of_kind, randomize
from torch.nn import functional as F
from transformers import CLIPModel

import clipmap_hf.starts.calibrated.statistics
from clipmap_hf.starts.calibrated.batches import calibration_batch
from clipmap_hf.starts.calibrated.statistics import POOLED_WEIGHT, TowerStatistics, calibrate


@pytest.fixture(params=CLIP_KINDS)
def model(tiny_config, request) -> CLIPModel:
    return clip_of_kind(tiny_config(), request.param)


@pytest.fixture
def pairs(shared_teacher) -> dict[str, torch.Tensor]:
    return random_pairs(shared_teacher.config, 12)


# Statistics by hand


def seen(model: CLIPModel, pairs: dict, tower: str) -> dict[str, list[torch.Tensor]]:
    """What modules of a tower of plain transformers read, and its embeddings, in fp64."""
    found, handles, module = defaultdict(list), [], getattr(model, f"{tower}_model")

    def keep(name: str):
        return lambda _, inputs: found[name].append(inputs[0].double())

    for name, part in module.named_modules():
        if name.endswith(("layer_norm1", "layer_norm2", "out_proj", "fc2", "pre_layrnorm")):
            handles.append(part.register_forward_pre_hook(keep(name.split(".")[-1])))
    with torch.no_grad():
        if tower == "vision":
            output, embeds = module(pixel_values=pairs["pixel_values"]), model.get_image_features
            embeds = embeds(pixel_values=pairs["pixel_values"]).pooler_output
        else:
            norm = module.final_layer_norm
            handles.append(norm.register_forward_pre_hook(keep("last")))
            output, embeds = module(input_ids=pairs["input_ids"]), model.get_text_features
            embeds = embeds(input_ids=pairs["input_ids"]).pooler_output
    for handle in handles:
        handle.remove()
    found = {name: tensors[: len(tensors) // 2] for name, tensors in found.items()}  # the tower has run twice
    return found | {
        "behind": [
            *found["layer_norm1"][1:],
            found["last"][0] if tower == "text" else output.last_hidden_state.double(),
        ],
        "embeds": [embeds.double()],
    }


@torch.no_grad()
def by_hand(model: CLIPModel, pairs: dict, tower: str) -> TowerStatistics:
    """`TowerStatistics`, in which `attended` and `activated` are pairs of mean and covariance."""
    found, config = seen(model, pairs, tower), getattr(model.config, f"{tower}_config")
    items, tokens, width = found["layer_norm1"][0].shape
    end = model.config.text_config.vocab_size - 1
    ends = [0] * items if tower == "vision" else [row.index(end) for row in pairs["input_ids"].tolist()]
    places = [
        (item, token) for item in range(items) for token in range(tokens if tower == "vision" else ends[item] + 1)
    ]
    rows = torch.tensor([item * tokens + token for item, token in places])
    weights = torch.tensor([POOLED_WEIGHT if token == ends[item] else 1.0 for item, token in places]).double()
    weights /= weights.sum()

    def counted(stream: torch.Tensor) -> torch.Tensor:
        return stream.flatten(0, 1)[rows]

    def norm(stream: torch.Tensor) -> torch.Tensor:
        centered = stream - stream.mean(dim=-1, keepdim=True)
        return centered / (centered.square().mean(dim=-1, keepdim=True) + config.layer_norm_eps).sqrt()

    def moment(rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        weights = torch.full((len(rows),), 1 / len(rows)).double() if weights is None else weights
        return torch.einsum("t,ta,tb->ab", weights, rows, rows)

    def spread(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = weights @ counted(stream)
        return mean, moment(counted(stream) - mean, weights)

    norms = [stream for both in zip(found["layer_norm1"], found["layer_norm2"], strict=True) for stream in both]
    pooled = found["behind"][-1][torch.arange(items), torch.tensor(ends)]
    cosines = [
        weights @ F.cosine_similarity(counted(into), counted(out))
        for into, out in zip(found["layer_norm1"], found["behind"], strict=True)
    ]
    heads, neurons = [], []
    for index, layer in enumerate(getattr(model, f"{tower}_model").encoder.layers):
        attended, activated = counted(found["out_proj"][index]), counted(found["fc2"][index])
        attended, activated = attended - weights @ attended, activated - weights @ activated
        written = layer.self_attn.out_proj.weight.double()
        size = width // config.num_attention_heads
        slices = [slice(head * size, (head + 1) * size) for head in range(config.num_attention_heads)]
        heads.append([weights @ (attended[:, one] @ written[:, one].T).square().sum(dim=1) for one in slices])
        columns = layer.mlp.fc2.weight.double().T
        neurons.append(
            [weights @ torch.outer(activated[:, j], columns[j]).square().sum(dim=1) for j in range(len(columns))]
        )
    return TowerStatistics(
        read=torch.stack([*(moment(norm(counted(stream)), weights) for stream in norms), moment(norm(pooled))]),
        means=torch.stack([*(weights @ norm(counted(stream)) for stream in norms), norm(pooled).mean(dim=0)]),
        embedded=moment(found["pre_layrnorm"][0].flatten(0, 1)) if tower == "vision" else None,
        embeds=moment(found["embeds"][0] / found["embeds"][0].norm(dim=1, keepdim=True)),
        attended=[spread(stream) for stream in found["out_proj"]],
        activated=[spread(stream) for stream in found["fc2"]],
        changed=1 - torch.stack(cosines),
        head_energy=torch.tensor(heads),
        neuron_energy=torch.tensor(neurons),
    )


def assert_same(given: TowerStatistics, expected: TowerStatistics, tolerance: float = 1e-5) -> None:
    for name in ("read", "means", "embeds", "changed", "head_energy", "neuron_energy"):
        torch.testing.assert_close(getattr(given, name), getattr(expected, name), atol=tolerance, rtol=tolerance)
    for name in ("attended", "activated"):
        for one, two in zip(getattr(given, name), getattr(expected, name), strict=True):
            mean, variance = (two.mean, two.variance) if hasattr(two, "mean") else (two[0], two[1].diagonal())
            torch.testing.assert_close(one.mean, mean, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(one.variance, variance, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tower", TOWERS)
def test_statistics_are_those_of_the_plain_model(model, pairs, tower):
    given, expected = calibrate(model, split(pairs, 5), neuron_covariance=True)[tower], by_hand(model, pairs, tower)
    assert_same(given, expected)
    for name in ("attended", "activated"):
        for one, (_, covariance) in zip(getattr(given, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(one.covariance, covariance, atol=1e-5, rtol=1e-5)
    if tower == "vision":
        torch.testing.assert_close(given.embedded, expected.embedded, atol=1e-5, rtol=1e-5)


# What they do not depend on


def test_how_pairs_are_cut_into_batches_does_not_matter(shared_teacher, pairs):
    whole, cut = (calibrate(shared_teacher, split(pairs, size)) for size in (12, 5))
    for tower in TOWERS:
        assert_same(cut[tower], whole[tower])
    torch.testing.assert_close(cut["vision"].embedded, whole["vision"].embedded, atol=1e-5, rtol=1e-5)


def test_padding_does_not_matter(shared_teacher, pairs):
    shorter = int((pairs["input_ids"] != pairs["input_ids"].max()).sum(dim=1).max()) + 1
    assert shorter < pairs["input_ids"].shape[1]
    cut = pairs | {"input_ids": pairs["input_ids"][:, :shorter]}
    assert_same(*(calibrate(shared_teacher, [one])["text"] for one in (cut, pairs)))


def test_what_pads_does_not_matter(shared_teacher, pairs):
    ids = pairs["input_ids"]
    behind = (ids == ids.max()).cumsum(dim=1) > 1
    assert behind.any()
    assert_same(
        *(calibrate(shared_teacher, [pairs | {"input_ids": one}])["text"] for one in (ids.where(~behind, 3), ids))
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_variances_are_the_same_with_covariances_and_without(shared_teacher, pairs, tower):
    alone, whole = (calibrate(shared_teacher, [pairs], neuron_covariance=one)[tower] for one in (False, True))
    assert all(one.diagonal for one in alone.activated) and not any(one.diagonal for one in whole.activated)
    assert_same(alone, whole, tolerance=1e-12)


def test_the_pooled_token_counts_more_and_alone_in_the_last_norm(shared_teacher, pairs, monkeypatch):
    before = calibrate(shared_teacher, [pairs])
    monkeypatch.setattr(clipmap_hf.starts.calibrated.statistics, "POOLED_WEIGHT", 1.0)
    after = calibrate(shared_teacher, [pairs])
    for tower in TOWERS:
        moved = (before[tower].read - after[tower].read).abs().amax(dim=(1, 2))
        assert (moved[:-1] > 1e-2).all() and moved[-1] == 0


def test_calibration_leaves_no_gradients_and_the_model_as_it_is(tiny_teacher, shared_teacher, pairs):
    statistics = calibrate(tiny_teacher, [pairs])
    assert not statistics["text"].head_energy.requires_grad and not statistics["vision"].read.requires_grad
    for name, tensor in tiny_teacher.state_dict().items():
        assert torch.equal(tensor, shared_teacher.state_dict()[name]), name


def test_activations_that_are_not_finite_are_an_error_that_names_the_tower(shared_teacher, pairs):
    pairs["pixel_values"][3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"vision tower.*not finite.*pixel_values"):
        calibrate(shared_teacher, [pairs])


def test_without_pairs_there_is_nothing_to_calibrate_with(shared_teacher):
    with pytest.raises(ValueError, match="no pairs to calibrate with"):
        calibrate(shared_teacher, [])


# Batches


def test_a_batch_keeps_its_texts_and_nothing_that_is_not_read(shared_teacher, tiny_batch):
    batch = calibration_batch(tiny_batch, shared_teacher.config, 0)
    assert set(batch) == {"pixel_values", "input_ids"} < set(tiny_batch)
    assert all(batch[name] is tiny_batch[name] for name in batch)


@pytest.fixture(params=["end token", "old end token"])
def text_config(tiny_config, request):
    config = tiny_config()
    if request.param == "old end token":
        config.text_config.eos_token_id = 2
    return config


def made_up(config, index: int = 0, count: int = 40) -> torch.Tensor:
    return calibration_batch({"pixel_values": torch.zeros(count, 3, 32, 32)}, config, index)["input_ids"]


def test_made_up_texts_are_valid_and_of_many_lengths(text_config):
    ids, text = made_up(text_config), text_config.text_config
    end = text.vocab_size - 1
    assert ids.shape == (40, text.max_position_embeddings) and ids.dtype == torch.long
    assert ids.min() >= 0 and ids.max() == end and (ids[:, 0] == text.bos_token_id).all()
    lengths = (ids == end).int().argmax(dim=1)
    behind = torch.arange(ids.shape[1]) >= lengths[:, None]
    assert (ids[behind] == end).all() and not (ids[~behind] == end).any()
    assert lengths.min() == 2 and lengths.max() == text.max_position_embeddings - 1  # a word at least
    assert len(lengths.unique()) > 8 and len(ids.unique()) > text.vocab_size / 2


def test_made_up_texts_are_the_same_for_the_same_batch(text_config):
    torch.manual_seed(1)
    first = made_up(text_config, 3)
    torch.manual_seed(2)
    assert torch.equal(made_up(text_config, 3), first)
    assert not torch.equal(made_up(text_config, 4), first)


def test_made_up_texts_differ_between_batches_and_processes(text_config, as_process):
    texts = set()
    for process in range(2):
        as_process(process, 2)
        texts |= {str(made_up(text_config, index).tolist()) for index in range(3)}
    assert len(texts) == 6


def test_made_up_texts_calibrate(text_config, pairs):
    model = randomize(CLIPModel(text_config)).eval()
    batch = calibration_batch({"pixel_values": pairs["pixel_values"]}, model.config, 0)
    assert_same(calibrate(model, [batch])["text"], by_hand(model, batch, "text"))


def test_a_batch_without_images_is_an_error(shared_teacher, tiny_batch):
    with pytest.raises(ValueError, match="needs pixel_values, and input_ids if there are captions; got {'input_ids'}"):
        calibration_batch({"input_ids": tiny_batch["input_ids"]}, shared_teacher.config, 0)
