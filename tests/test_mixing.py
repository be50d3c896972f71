"""Mixes of training images and texts."""

import random

import pytest
import torch
from datasets import Dataset
from PIL import Image

from clipmap_hf import ClipMapConfig, DistillationArguments, TowerConfig, compress
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator, decoded
from clipmap_hf.data.mixing import Mixing, cutmix, mixed_text, mixup
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.texts import Texts
from clipmap_hf.teacher_cache.manifest import cache_manifest


SMALL = ClipMapConfig(vision=TowerConfig(hidden_size=32), text=TowerConfig(hidden_size=32))
RED, BLUE = (Image.new("RGB", (32, 16), color) for color in ((200, 0, 0), (0, 0, 100)))


@pytest.fixture
def rows(pairs_parquet) -> Dataset:
    return load_pairs(str(pairs_parquet))


@pytest.fixture
def collator(tiny_processor):
    def make(mixing: Mixing | None, texts: Texts | None = None) -> PairCollator:
        processors = (tiny_processor.tokenizer, tiny_processor.image_processor)
        return PairCollator(*processors, augmentation=Augmentation(), mixing=mixing, texts=texts)

    return make


def pixels(collator: PairCollator, rows, epoch: int = 0) -> torch.Tensor:
    return collator([row | {"epoch": epoch} for row in rows])["pixel_values"]


def test_mixup_is_the_weighted_mean():
    assert mixup(RED, BLUE, 0.25).getpixel((3, 3)) == (50, 0, 75)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_cutmix_keeps_the_share_of_the_area(share):
    mixed = cutmix(RED, BLUE, share, random.Random(0))
    colors = {color: count for count, color in mixed.getcolors()}
    assert set(colors) <= {(200, 0, 0), (0, 0, 100)}
    assert colors.get((200, 0, 0), 0) / (32 * 16) == pytest.approx(share, abs=0.05)
    assert RED.getcolors() == [(512, (200, 0, 0))]  # the image itself is left alone


def test_a_mixed_text_has_words_that_stand_side_by_side_in_the_texts():
    texts = ["a red  circle", "blue bar"]
    found = {mixed_text(texts, random.Random(seed)) for seed in range(500)}
    first, second = ["a", "red", "circle", "a red", "red circle", "a red circle"], ["blue", "bar", "blue bar"]
    assert found == {f"{one}{between}{other}" for one in first for other in second for between in (" ", ", ")}
    assert {mixed_text(texts[1:], random.Random(seed)) for seed in range(50)} == set(second)


def test_texts_that_are_named_are_taught_as_they_are(collator, rows):
    texts = Texts({"given": ["red circle", "blue bar"]}, {"given": 1.0})
    own = collator(Mixing(1.0, rows), texts)
    drawn = {own.view(row, *decoded(row), view).texts[0] for row in rows for view in range(3)}
    assert drawn == {"red circle", "blue bar"}


def test_captions_are_mixed_as_often_as_the_probability_says(collator, rows):
    own = collator(Mixing(0.4, rows))
    kept = [own.view(row, *decoded(row), view).texts[0] == row["caption"] for row in rows for view in range(20)]
    assert sum(kept) / len(kept) == pytest.approx(0.6, abs=0.1)  # and some of one caption alone are whole


def test_own_captions_are_mixed_with_those_of_partners(collator, rows):
    captions = {row["caption"] for row in rows}
    own = collator(Mixing(1.0, rows))
    drawn = {own.view(row, *decoded(row), view).texts[0] for row in rows for view in range(5)}
    words = {word for caption in captions for word in caption.split()}
    assert len(drawn - captions) > 30 and {word for text in drawn for word in text.replace(",", "").split()} <= words


def test_mixes_depend_on_seed_row_and_view_alone(collator, rows):
    mixed = pixels(collator(Mixing(1.0, rows)), rows)
    torch.testing.assert_close(pixels(collator(Mixing(1.0, rows)), list(rows)[::-1]).flip(0), mixed, rtol=0, atol=0)
    assert (pixels(collator(Mixing(1.0, rows)), rows, epoch=1) != mixed).any()
    assert (pixels(collator(None), rows) != mixed).flatten(1).any(dim=1).float().mean() > 0.8


def test_the_probability_says_how_many_are_mixed(collator, rows):
    plain = torch.cat([pixels(collator(None), rows, epoch) for epoch in range(20)])
    mixed = torch.cat([pixels(collator(Mixing(0.3, rows)), rows, epoch) for epoch in range(20)])
    share = (plain != mixed).flatten(1).any(dim=1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.06)  # of 480
    torch.testing.assert_close(pixels(collator(Mixing(0.0, rows)), rows), pixels(collator(None), rows), rtol=0, atol=0)


def test_a_partner_that_cannot_be_read_leaves_the_example_as_it_is(collator, rows):
    broken = Dataset.from_list([{"image": {"bytes": b"no image", "path": None}, "caption": None}])
    torch.testing.assert_close(
        pixels(collator(Mixing(1.0, broken)), rows), pixels(collator(None), rows), rtol=0, atol=0
    )
    mixed = collator(Mixing(1.0, broken))
    drawn = [mixed.view(row, *decoded(row), view).texts[0] for row in rows for view in range(3)]
    assert all(
        text in row["caption"] for text, row in zip(drawn, [row for row in rows for _ in range(3)], strict=True)
    )


def test_a_cache_of_other_mixes_is_another_cache(collator, rows):
    def manifest(mixing):
        return cache_manifest([], collator(mixing), 2, {})

    mixing = Mixing(0.5, rows)
    assert manifest(mixing) == manifest(Mixing(0.5, rows))
    others = [None, Mixing(0.6, rows), Mixing(0.5, rows.select(range(5))), Mixing(0.5, rows.select([1, 0]))]
    assert all(manifest(other) != manifest(mixing) for other in others)


def test_a_student_learns_from_mixes_through_a_cache_as_without_it(teacher_folder, pairs_parquet, tmp_path):
    def trained(name: str, **cache) -> torch.Tensor:
        arguments = DistillationArguments(
            str(tmp_path / name), max_steps=3, batch_size=8, losses={"feature": 2000.0}, mix=0.7, **cache
        )
        result = compress(teacher_folder, SMALL, arguments, train_dataset=str(pairs_parquet), calibration_pairs=8)
        return result.model.visual_projection.weight.detach()

    weight = trained("cached", teacher_cache=str(tmp_path / "cache"), views=1)
    torch.testing.assert_close(trained("live"), weight, rtol=1e-2, atol=1e-3)  # a cache holds half precision


@pytest.mark.parametrize("given", [{"mix": 0.5}, {"train_texts": ["words"]}, {}])
def test_fewer_images_than_a_batch_fill_it_in_several_views(given, teacher_folder, pairs_parquet, tmp_path):
    losses = {"losses": {"feature": 2000.0}}
    arguments = DistillationArguments(str(tmp_path), max_steps=2, batch_size=60, **losses, **given)

    def run():
        return compress(teacher_folder, SMALL, arguments, train_dataset=str(pairs_parquet), calibration_pairs=8)

    if given:
        assert run().pairs == 120
    else:  # pairs whose losses may compare them with each other
        with pytest.raises(ValueError, match="batch_size=60 is larger than the 24 training pairs"):
            run()


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid", "interactive"])
def test_a_loss_of_pairs_does_not_go_with_mixes(loss, teacher_folder, pairs_parquet, tmp_path):
    arguments = DistillationArguments(str(tmp_path), max_steps=1, batch_size=8, losses={loss: 1.0}, mix=0.5)
    with pytest.raises(ValueError, match=rf"\['{loss}'\] need texts that belong to their images, and mix changes"):
        compress(teacher_folder, SMALL, arguments, train_dataset=str(pairs_parquet), calibration_pairs=8)


def test_mixes_that_cannot_be_are_refused(teacher_folder, pairs_parquet, tmp_path):
    with pytest.raises(ValueError, match="mix=1.5 must be a probability"):
        DataArguments("x", mix=1.5)
    with pytest.raises(ValueError, match="A stream has no images at hand"):
        DataArguments("x", mix=0.5, streaming=True)
    arguments = DistillationArguments(str(tmp_path), max_steps=1, mix=0.5)
    with pytest.raises(ValueError, match="mix them there"):
        compress(teacher_folder, SMALL, arguments, train_dataset=str(pairs_parquet), transform=lambda image: image)
