"""Texts of unknown encoding -> UTF-8, with what was assumed about them."""

from __future__ import annotations

import codecs

from ..reading.problems import Problem, Unusable

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def to_utf8(data: bytes, name: str) -> tuple[bytes, str]:
    """Return a text as UTF-8, and what was changed (empty when it is as it was).

    A byte order mark tells UTF-16 and UTF-32; so do zero bytes in every second place. What else is not
    UTF-8 is taken for Windows-1252, the common encoding of western European systems.

    Raises:
        Unusable: when it is not text at all.
    """
    try:
        if "\0" not in data.decode("utf-8-sig"):
            return data, ""
    except UnicodeDecodeError:
        pass
    for encoding, title in _candidates(data):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text.lstrip("\ufeff").encode("utf-8"), f"converted to UTF-8 from {title}"
    raise Unusable(Problem("bad caption", name, "is not text in any known encoding", "write it again"))


def _candidates(data: bytes) -> list[tuple[str, str]]:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return [(encoding, encoding.upper())]
    if b"\0" in data:
        little = data[1::2].count(0) >= data[::2].count(0)
        return [("utf-16-le", "UTF-16 without mark")] if little else [("utf-16-be", "UTF-16 without mark")]
    return [("cp1252", "Windows-1252 (assumed: look at it)"), ("latin-1", "Latin-1 (assumed: look at it)")]
