"""Prompts as A1111's WebUI reads them: ``(word:1.2)``, ``(word)``, ``[word]``, ``BREAK``, ``\\`` to escape.

One grammar for training, previews and generation, so that a caption means the same everywhere. A round
bracket multiplies the weight of its content by 1.1 or by the number after a colon; a square bracket divides
it by 1.1; brackets that are not closed extend to the end. Chunks of 75 tokens are filled as in the WebUI: an
item between commas that would be cut moves to the next chunk as a whole, and ``BREAK`` begins a new one.
``\\AND`` is the word: where images are drawn, ``AND`` joins prompts (:mod:`sdlora.generation.prompt_parts`).
(WebUI: modules/prompt_parser.py, sd_hijack_clip.py, sd_emphasis.py, behaviour only.)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import onto
from ..errors import ConfigError, shown

CHUNK_TOKENS = 75
MAX_CHARS = 2**17
"""Of a prompt or caption: some 400 chunks. What people write has a few hundred characters."""
_ROUND = 1.1
_BACKTRACK = 20
"""Tokens after the last comma of a full chunk that may move to the next one (the WebUI's default)."""
_LEAST_MEAN = 1e-4  # of the root mean square

_TOKEN = re.compile(
    r"""(?P<literal>\\[()\[\]\\]|\\(?:BREAK|AND)\b)
      | (?P<weight>:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\))
      | (?P<bracket>[()\[\]])
      | (?P<text>[^\\()\[\]:]+|.)""",
    re.VERBOSE | re.DOTALL,
)
_BREAK = re.compile(r"\bBREAK\b")
_MAX_OPEN = 30
"""Brackets that may be open at once; further ones are plain characters (1.1 to the 30th is 17)."""


@dataclass(frozen=True)
class Fragment:
    """A piece of a prompt and the weight of its words."""

    text: str
    weight: float


@dataclass(frozen=True)
class Chunk:
    """Up to 75 tokens, each with its weight."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def is_plain(self) -> bool:
        """Whether all weights are 1."""
        return all(weight == 1.0 for weight in self.weights)


def parse(prompt: str) -> list[list[Fragment]]:
    """Return the fragments of a prompt, in one list for each part between ``BREAK`` s.

    Raises:
        ConfigError: when it has more than :data:`MAX_CHARS` characters.
    """
    if len(prompt) > MAX_CHARS:
        raise ConfigError(
            f"the prompt or caption `{shown(prompt, 40)}` has {len(prompt)} characters; at most {MAX_CHARS} "
            "are read"
        )
    pieces: list[tuple[str | None, float]] = []  # a None is a BREAK
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _TOKEN.finditer(prompt):
        text = match.group()
        if match["literal"]:
            pieces.append((text[1:], 1.0))
        elif match["weight"] and open_round:
            multiply(open_round.pop(), float(match["number"]))
        elif text == "(" and len(open_round) < _MAX_OPEN:
            open_round.append(len(pieces))
        elif text == "[" and len(open_square) < _MAX_OPEN:
            open_square.append(len(pieces))
        elif text == ")" and open_round:
            multiply(open_round.pop(), _ROUND)
        elif text == "]" and open_square:
            multiply(open_square.pop(), 1 / _ROUND)
        else:
            parts = _BREAK.split(text)
            for number, part in enumerate(parts):
                part = part.lstrip() if number else part
                part = part.rstrip() if number < len(parts) - 1 else part
                pieces += [(None, 1.0)] if number else []
                pieces += [(part, 1.0)] if part else []
    for start in open_round:
        multiply(start, _ROUND)
    for start in open_square:
        multiply(start, 1 / _ROUND)
    return _sections(pieces)


def escape(text: str) -> str:
    """Return the prompt that means ``text`` literally: brackets and backslashes have no meaning in it."""
    return re.sub(r"([()\[\]\\])|\b(?=(?:BREAK|AND)\b)", lambda match: f"\\{match[1] or ''}", text)


def layout(prompt: str, tokenize: Callable[[str], Sequence[int]], comma: int | None) -> list[Chunk]:
    """Return the chunks that a prompt is encoded in: at least one, which may be empty.

    Args:
        prompt: in the grammar of this module.
        tokenize: text to token ids, without the tokens for begin and end.
        comma: the id of the comma, where chunks are preferably cut; None if the tokenizer has no such token.
    """
    chunks: list[Chunk] = []
    for section in parse(prompt):
        tokens = [(token, part.weight) for part in section for token in tokenize(part.text)]
        start = 0
        while len(tokens) - start > CHUNK_TOKENS:
            cut = start + _cut([token for token, _ in tokens[start : start + CHUNK_TOKENS + 1]], comma)
            chunks.append(_chunk(tokens[start:cut]))
            start = cut
        if tokens[start:] or section or not chunks:
            chunks.append(_chunk(tokens[start:]))
    return chunks


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply the states of each token by its weight, then scale each chunk so that its mean is as before.

    Args:
        states: (chunks, tokens, width) text states.
        weights: (chunks, tokens), 1 for begin, end and padding.

    A mean that is tiny compared with the states cannot be restored: the quotient of two rounding errors would
    scale the whole chunk by an arbitrary factor. Such chunks keep the mean that they get.

    Returns:
        (chunks, tokens, width); chunks whose weights are all 1 come back bit for bit.
    """
    plain = (weights == 1).all(dim=1)  # asked on the weights' own device, so that nothing waits for the card
    if bool(plain.all()):
        return states
    weights, plain = onto(weights, states.device), onto(plain, states.device)
    wide = states.float()
    scaled = wide * weights.float()[..., None]
    before, after = wide.mean(dim=(1, 2), keepdim=True), scaled.mean(dim=(1, 2), keepdim=True)
    size = wide.square().mean(dim=(1, 2), keepdim=True).sqrt()
    certain = torch.minimum(before.abs(), after.abs()) > _LEAST_MEAN * size
    # states * weight * mean(states) / mean(states * weight), the means over tokens and width of each chunk
    ratio = torch.where(
        certain, before / after.where(certain, torch.ones_like(after)), torch.ones_like(after)
    )
    return states.where(plain[:, None, None], (scaled * ratio).to(states.dtype))


def _sections(pieces: Sequence[tuple[str | None, float]]) -> list[list[Fragment]]:
    sections: list[list[Fragment]] = [[]]
    for weight, group in itertools.groupby(pieces, key=lambda piece: (piece[0] is None, piece[1])):
        texts = [text for text, _ in group]
        if weight[0]:
            sections += [[] for _ in texts]
        else:
            sections[-1].append(Fragment("".join(text for text in texts if text is not None), weight[1]))
    return sections


def _cut(ids: Sequence[int], comma: int | None) -> int:
    """Return how many of 76 tokens stay in this chunk: 75, or up to the last comma if it is near."""
    if ids[CHUNK_TOKENS] == comma:
        return CHUNK_TOKENS
    for place in range(CHUNK_TOKENS - 1, CHUNK_TOKENS - _BACKTRACK - 1, -1):
        if ids[place] == comma:
            return place + 1
    return CHUNK_TOKENS


def _chunk(tokens: Sequence[tuple[int, float]]) -> Chunk:
    return Chunk(tuple(token for token, _ in tokens), tuple(weight for _, weight in tokens))
