"""A small CLIP-style byte-pair tokenizer, trained on the captions at hand."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


__all__ = ["train_clip_tokenizer"]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int = 2048, context_length: int = 32) -> CLIPTokenizer:
    """
    Learns byte-pair merges from `texts` and returns a stock `CLIPTokenizer` (lower-cased, `</w>` word ends, start and
    end tokens last in the vocabulary as in OpenAI's).

    Args:
        texts: The captions to learn from.
        vocab_size: Upper bound of the vocabulary, the 512 byte symbols and two special tokens included.
        context_length: `model_max_length` of the tokenizer, in tokens, start and end included.

    Raises:
        ValueError: If `vocab_size` leaves no room for a merge.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [symbol + "</w>" for symbol in alphabet]
    merges_wanted = vocab_size - len(base) - 2
    if merges_wanted < 1:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for merges; it must be at least {len(base) + 3}.")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    stock = CLIPTokenizer(vocab={token: i for i, token in enumerate([*base, BOS, EOS])}, merges=[])
    bpe.normalizer = stock.backend_tokenizer.normalizer  # clean and split words exactly as the result will
    bpe.pre_tokenizer = stock.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    # BpeTrainer keeps only the symbols it saw, so the full byte alphabet is put back and the merges follow it.
    learned = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:merges_wanted]
    tokens = dict.fromkeys(base + ["".join(pair) for pair in learned] + [BOS, EOS])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=context_length)
