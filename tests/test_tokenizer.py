import pytest
from transformers import AutoTokenizer

from clipmap_hf.data.tokenizer import train_clip_tokenizer


TEXTS = ["grinning face", "grinning cat", "cat face", "face with tears of joy", "cat with tears of joy"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_clip_tokenizer(TEXTS, vocab_size=560, context_length=12)


def test_frequent_words_become_one_token(tokenizer):
    assert tokenizer.tokenize("Cat FACE") == ["cat</w>", "face</w>"]


def test_rare_words_are_split_into_learned_pieces(tokenizer):
    pieces = tokenizer.tokenize("facing")
    assert len(pieces) > 1 and "".join(pieces) == "facing</w>"


@pytest.mark.parametrize("text", ["grinning cat", "zebra", "naïve café", "日本", "🙂", "x² & <y>"])
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_start_and_end_tokens_are_the_last_of_the_vocabulary(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    ids = tokenizer("cat")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_ids_are_consecutive_and_within_the_bound(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert 514 < len(tokenizer) <= 560


def test_the_vocabulary_stays_within_the_bound_on_many_merges():
    texts = [f"word{first}{second} and {second}{first}tail" for first in "abcdefgh" for second in "ijklmnop"]
    assert len(train_clip_tokenizer(texts, vocab_size=530)) == 530


def test_captions_are_truncated_to_the_context(tokenizer):
    ids = tokenizer("zebra " * 20, truncation=True)["input_ids"]
    assert len(ids) == 12 and ids[-1] == tokenizer.eos_token_id


def test_padding_is_masked(tokenizer):
    batch = tokenizer(["cat", "grinning cat face"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_equal_texts_give_equal_tokenizers(tokenizer):
    assert train_clip_tokenizer(iter(TEXTS), vocab_size=560).get_vocab() == tokenizer.get_vocab()


def test_case_does_not_matter_to_what_is_learned(tokenizer):
    assert train_clip_tokenizer([text.upper() for text in TEXTS], vocab_size=560).get_vocab() == tokenizer.get_vocab()


def test_the_saved_tokenizer_loads_as_a_stock_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "CLIPTokenizer" and loaded.model_max_length == 12
    for text in [*TEXTS[:5], "zebra 🙂"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_vocabulary_without_room_for_merges_is_an_error():
    with pytest.raises(ValueError, match="vocab_size=514 leaves no room for merges; it must be at least 515"):
        train_clip_tokenizer(TEXTS, vocab_size=514)
    assert len(train_clip_tokenizer(TEXTS, vocab_size=515)) == 515
