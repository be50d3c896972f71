"""Trains a small CLIP-style byte-pair tokenizer on given captions."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


__all__ = ["train_clip_tokenizer"]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int = 2048, context_length: int = 32) -> CLIPTokenizer:
    """
    Learns byte-pair merges from texts. The result is a stock `CLIPTokenizer`: it lower-cases texts and ends words with
    `</w>`, and the start and end tokens come last in the vocabulary, as in OpenAI's.

    Args:
        texts: The captions to learn from.
        vocab_size: Upper bound of the vocabulary, including the 512 byte symbols and the two special tokens.
        context_length: `model_max_length` of the tokenizer, in tokens, including the start and end tokens.

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
    bpe.normalizer = stock.backend_tokenizer.normalizer  # cleans and splits words exactly as the result will
    bpe.pre_tokenizer = stock.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    # BpeTrainer keeps only the symbols that it saw. So the full byte alphabet is added again, before the merges.
    learned = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:merges_wanted]
    tokens = dict.fromkeys(base + ["".join(pair) for pair in learned] + [BOS, EOS])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=context_length)
