"""Trains a CLIP-style byte-level tokenizer on the captions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .captions import tokenizer_corpus

VOCABULARY = 1732
START, END = "<|startoftext|>", "<|endoftext|>"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def _train_merges(corpus: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learns a vocabulary and its merges with CLIP's rules."""
    engine = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    # Bytes at the end of a word are pieces of their own in CLIP's vocabulary.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        show_progress=False,
    )
    engine.train_from_iterator(corpus, trainer)
    learnt = json.loads(engine.to_str())["model"]
    vocabulary: dict[str, int] = {}
    ends = [byte + "</w>" for byte in alphabet]
    for piece in [*alphabet, *ends, *learnt["vocab"], START, END]:
        vocabulary.setdefault(piece, len(vocabulary))
    return vocabulary, [tuple(merge) for merge in learnt["merges"]]


def train(folder: Path) -> CLIPTokenizer:
    """Trains the tokenizer and writes its folder.

    Args:
        folder: Where ``CLIPTokenizer.from_pretrained`` will find it.
    """
    vocabulary, merges = _train_merges(tokenizer_corpus())
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=77,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end: a folder that exists is complete.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / "tokenizer"
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(folder)
    return tokenizer
