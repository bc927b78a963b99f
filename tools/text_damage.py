"""Mutations of texts: what damage, mistakes and malice do to a file that a person or a program wrote."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

_TOKENS = (
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b'"', b"'", b"\\", b"\\ud800", b"\\u0000"),
    *(b"[", b"]", b"{", b"}", b"(", b")", b"<", b">", b",", b":", b"=", b"|", b".", b"#", b";", b"/", b"../"),
    *(b"\xe2\x80\xae", b"\xed\xa0\x80", b"\xf0\x9f\x92\xa9", b"\xcc\x81" * 40, b"null", b"NaN", b"-Infinity"),
    *(b" BREAK ", b"<lora:", b"Negative prompt:", b"Steps: ", b"file_name", b"CON", b"C:\\", b"\\\\share\\x"),
)
_NUMBERS = (
    *(b"0", b"-0", b"-1", b"1e999", b"-1e999", b"1e-999", b"0x10", b"nan", b"inf", b"1_0", b"00", b"1."),
    *(b"9" * 20, b"9" * 400, b"9" * 5000, b"2147483648", b"9223372036854775808", b"0.1e400", "٣".encode()),
)
_DEPTHS = (10, 63, 64, 65, 200, 1000, 5000, 100_000)
_LONGEST = 600_000


def flipped(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change some bytes."""
    whole = bytearray(data or b" ")
    for _ in range(rng.randint(1, 8)):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    return bytes(whole)


def cut(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """End early, or lack a part."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] if rng.random() < 0.5 else data[:start] + data[end:]


def spliced(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Go on as another sample does."""
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def repeated(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Have a part many times."""
    start = rng.randrange(len(data) or 1)
    part = data[start : start + rng.choice((1, 2, 5, 20, 200))]
    times = min(rng.choice((2, 10, 100, 5000, 100_000)), _LONGEST // (len(part) or 1))
    return data[:start] + part * times + data[start:]


def deepened(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Have a value inside many brackets."""
    opening, closing = rng.choice(
        (
            (b"[", b"]"),
            (b"{", b"}"),
            (b'{"a":', b"}"),
            (b"(", b")"),
            (b"(a", b":1)"),
            (b"{a|", b"}"),
            (b"a.", b""),
        )
    )
    depth = rng.choice(_DEPTHS)
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:at] + opening * depth + data[at:end] + closing * rng.choice((depth, 0)) + data[end:]


def renumbered(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Have other numbers."""
    places = list(re.finditer(rb"\d[\d.]{0,20}", data[:50_000]))
    if not places:
        return data + rng.choice(_NUMBERS)
    place = rng.choice(places)
    return data[: place.start()] + rng.choice(_NUMBERS) + data[place.end() :]


def sprinkled(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Have signs in it that mean something to some parser."""
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(_TOKENS) + data[at + rng.choice((0, 0, 1, 3)) :]
    return data


def reordered(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Have its lines or fields in another order, or twice."""
    separator = rng.choice((b"\n", b",", b" ", b":"))
    parts = data.split(separator)
    if rng.random() < 0.5:
        rng.shuffle(parts)
    else:
        parts += rng.sample(parts, min(len(parts), rng.randint(1, 5)))
    return separator.join(parts)


MUTATIONS: tuple[Mutation, ...] = (
    flipped,
    cut,
    spliced,
    repeated,
    deepened,
    renumbered,
    sprinkled,
    reordered,
)


def damaged(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """Return one of the samples with one to three mutations, at most a megabyte of it."""
    data = rng.choice(samples)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(MUTATIONS)(rng, data, samples)[: 2 * _LONGEST]
    return data
