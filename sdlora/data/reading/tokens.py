"""How many CLIP tokens a caption has, exactly and without torch: the tokenizers library reads SD1's files.

All Stable Diffusion families use this vocabulary (SDXL's second tokenizer differs only in its padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ...files import ASSETS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK_TOKENS = 75
"""Tokens of a caption that the text encoder sees at once."""

_FOLDER = ASSETS / "sd1" / "tokenizer"
# Words as CLIP's own tokenizer splits them (openai/CLIP, simple_tokenizer.py), special tokens apart.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def count_tokens(captions: Sequence[str]) -> list[int]:
    """Return the number of tokens of each caption, start and end tokens not counted."""
    if not any(captions):
        return [0] * len(captions)
    encoded = _tokenizer().encode_batch_fast(list(captions), add_special_tokens=False)
    return [len(encoding.ids) for encoding in encoded]


@cache
def _tokenizer() -> Tokenizer:
    """Load the tokenizer on first use: it takes longer than everything else that a small check does."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    files = str(_FOLDER / "vocab.json"), str(_FOLDER / "merges.txt")
    tokenizer = Tokenizer(
        BPE.from_file(*files, unk_token="<|endoftext|>", end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer
