"""Texts in a language that the tokenizer hardly knows."""

import logging
from collections.abc import Sequence

import pytest
from transformers import AutoTokenizer, BertTokenizer

from clipmap_hf import DistillationArguments, DistillationTrainer
from clipmap_hf.data.language import spelling_warning
from clipmap_hf.demo import TEACHER


KNOWN = {
    "English": ["a dog runs across the green field", "two people are sitting at a table in a restaurant"],
    "German": ["ein Hund läuft über die grüne Wiese", "zwei Menschen sitzen an einem Tisch im Restaurant"],
    "French": ["un chien court dans le champ vert", "deux personnes sont assises à une table"],
    "with a name of another script": ["the word собака means dog, and a dog runs across the green field"],
}
SPELLED = {
    "Russian": ["собака бежит по зелёному полю", "два человека сидят за столом в ресторане"],
    "Greek": ["ένας σκύλος τρέχει στο πράσινο λιβάδι"],
    "Arabic": ["كلب يجري في الحقل الأخضر"],
    "Hindi": ["एक कुत्ता हरे मैदान में दौड़ता है"],
    "Chinese": ["一只狗在绿色的草地上奔跑", "两个人坐在餐厅的桌子旁"],
    "Korean": ["개가 푸른 들판을 달린다"],
}


@pytest.fixture(scope="module")
def tokenizer():
    """Of the embedded teacher, which knows English."""
    return AutoTokenizer.from_pretrained(str(TEACHER))


@pytest.mark.parametrize("language", KNOWN)
def test_languages_of_the_tokenizers_letters_are_not_warned_of(tokenizer, language):
    assert spelling_warning(tokenizer, KNOWN[language]) is None


@pytest.mark.parametrize("language", SPELLED)
def test_a_language_that_is_spelled_in_bytes_is_warned_of(tokenizer, language):
    text = SPELLED[language][0]
    numbers = [len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in SPELLED[language]]
    rate = sum(numbers) / sum(len("".join(part.split())) for part in SPELLED[language])
    assert f"such as {text[:40]!r}: it takes {rate:.2f} tokens a character" in spelling_warning(
        tokenizer, SPELLED[language]
    )


@pytest.fixture
def chinese(tmp_path):
    """A tokenizer of characters, as that of Chinese-CLIP."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "photo",
        "of",
        "dog",
        ".",
        *"一只狗在绿色的草地上奔跑两个人坐在餐厅桌子旁",
    ]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(words)), encoding="utf-8")
    return BertTokenizer(str(path))


def test_a_tokenizer_that_has_a_token_for_each_ideograph_knows_chinese(chinese):
    assert spelling_warning(chinese, SPELLED["Chinese"]) is None


def test_unknown_tokens_are_warned_of(chinese):
    assert "100% of them are unknown" in spelling_warning(chinese, SPELLED["Greek"])


def test_without_texts_there_is_nothing_to_warn_of(tokenizer):
    assert spelling_warning(tokenizer, []) is None and spelling_warning(tokenizer, [" "]) is None


@pytest.fixture
def trained(tiny_pairs, tmp_path, caplog):
    """Distills the embedded teacher's student on captions or texts; returns what was logged."""

    def run(captions: list[str], texts: Sequence[str] = ()) -> str:
        pairs = [(row["image"], captions[index % len(captions)]) for index, row in enumerate(tiny_pairs)]
        caplog.clear()
        args = DistillationArguments(str(tmp_path / "out"), max_steps=1, batch_size=4, resume="never")
        trainer = DistillationTrainer(str(TEACHER), str(TEACHER), args, pairs, text_dataset=texts)
        with caplog.at_level(logging.WARNING):
            trainer.train()
            trainer.train()
        return caplog.text

    return run


def test_a_run_says_once_that_its_captions_are_spelled(trained):
    assert trained(SPELLED["Russian"]).count("The tokenizer hardly knows the language of the texts") == 1


def test_a_run_with_texts_from_elsewhere_reads_those_alone(trained):
    assert "hardly knows" not in trained(SPELLED["Russian"], KNOWN["English"])
    assert "hardly knows" in trained(KNOWN["English"], SPELLED["Greek"])
