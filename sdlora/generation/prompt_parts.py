"""Prompts that change while an image is drawn, or are several: ``[a:b:0.5]``, ``[a|b]``, ``a AND b:0.8``.

As in A1111's WebUI (modules/prompt_parser.py; behaviour only). Its counting is kept, too: the denoiser's
calls are numbered from 0, and what ends at call n is still used in that call, so ``[a:b:3]`` draws 4 calls
with ``a``. A number with a point is a share of all calls. Samplers of second order call twice a step.

* ``[a:b:0.5]``: first a, then b; ``[b:0.5]``: first nothing; ``[a::0.5]``: later nothing.
* ``[a|b|c]``: another one in each call (the first one stays for two).
* ``a AND b:0.8``: both at once, the differences to the negative prompt added with these weights (Liu et al.
  2022, composable diffusion). ``\\AND`` is the word. It divides everything, brackets included.

The weights of words, ``(a:1.2)`` and ``[a]``, are :mod:`sdlora.families.emphasis`'s. None of this acts in
captions that are trained on. Brackets that belong to no pair are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import ConfigError, shown

MOST_CHANGES = 200
"""Brackets in one prompt whose content changes."""
MOST_CHARS = 20_000
"""Of a prompt whose content changes; each text that it becomes is encoded by itself."""
MOST_PARTS = 16
"""Prompts joined by ``AND``: each is another pass through the denoiser."""
_MOST_OPEN = 30
_AND = re.compile(r"(?<!\\)\bAND\b")
_NUMBER = re.compile(r"\s*([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})(?:[eE][+-]?\d{1,2})?)\s*")
_WEIGHT = re.compile(r"\s*([+-]?(?:\d{1,9}\.?|\d{0,9}\.\d{1,9}))\s*")
_TOKEN = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One prompt of those joined by ``AND``.

    Attributes:
        weight: of its difference to the negative prompt.
        texts: (last call it is used in, text), in order; at least one.
    """

    weight: float
    texts: tuple[tuple[int, str], ...]

    def at(self, call: int) -> str:
        """Return the text of a call of the denoiser, the first one being 0."""
        return next((text for last, text in self.texts if call <= last), self.texts[-1][1])


def parts_of(prompt: str, calls: int) -> list[Part]:
    """Return the prompts that a prompt consists of, at least one.

    Args:
        prompt: without ``<lora:...>`` tags.
        calls: how often the denoiser is called for an image.

    Raises:
        ConfigError: when it is longer, or changes more often, than is drawn.
    """
    pieces = _AND.split(prompt)
    if len(pieces) == 1:
        return [Part(1.0, schedule(prompt, calls))]
    if len(pieces) > MOST_PARTS:
        raise ConfigError(
            f"prompt `{shown(prompt, 40)}`: AND joins {len(pieces)} prompts; at most {MOST_PARTS} are drawn"
        )
    parts = []
    for piece in pieces:
        text, colon, number = piece.rpartition(":")
        matched = _WEIGHT.fullmatch(number) if colon else None
        text, weight = (text, float(matched[1])) if matched else (piece, 1.0)
        parts.append(Part(weight, schedule(text.rstrip(), calls)))
    return parts


def schedule(prompt: str, calls: int) -> tuple[tuple[int, str], ...]:
    """Return (last call, text) of the texts that a prompt becomes while an image is drawn, in order.

    Raises:
        ConfigError: see :func:`parts_of`.
    """
    if "[" not in prompt:
        return ((calls, prompt),)
    tree = _parsed(prompt)
    changes = [node for node in _nodes(tree) if isinstance(node, _Choice)]
    if not changes:
        return ((calls, prompt),)
    if len(changes) > MOST_CHANGES or len(prompt) > MOST_CHARS:
        raise ConfigError(
            f"prompt `{shown(prompt, 40)}`: {len(changes)} changing brackets in {len(prompt)} characters; at "
            f"most {MOST_CHANGES} in {MOST_CHARS} are drawn"
        )
    ends = {calls}
    for change in changes:
        until = None if change.number is None else _until(change.number, calls)
        ends |= set(range(1, calls + 1)) if until is None else {until} if until >= 1 else set()
    texts = [(end, "".join(_text(tree, end, calls))) for end in sorted(ends)]
    # neighbours that are the same text are one
    return tuple(
        pair
        for pair, after in zip(texts, [*texts[1:], None], strict=True)
        if after is None or pair[1] != after[1]
    )


@dataclass
class _Group:
    """An open or closed bracket: its pieces, divided at colons and bars."""

    opened: str
    pieces: list[list[_Node]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Choice:
    """A bracket whose content changes: ``number`` is when, or None for another content in every call."""

    options: list[list[_Node]]
    number: str | None


_Node = str | _Choice | list["_Node"]


def _parsed(prompt: str) -> list[_Node]:
    """Return texts and choices; a bracket without a partner is text, and so is all that it begins."""
    stack = [_Group("")]
    for match in _TOKEN.finditer(prompt):
        token, inner = match.group(), stack[-1]
        if token in ("(", "[") and len(stack) <= _MOST_OPEN:
            stack.append(_Group(token))
        elif token in (":", "|") and inner.opened == "[":
            inner.marks.append(token)
            inner.pieces.append([])
        elif (token == ")" and inner.opened == "(") or (token == "]" and inner.opened == "["):
            stack.pop()
            stack[-1].pieces[-1].append(_closed(inner, token))
        else:
            if token in (")", "]"):  # closes nothing, so all that is open stays so
                _give_up(stack)
            stack[-1].pieces[-1].append(token)
    _give_up(stack)
    return stack[0].pieces[0]


def _give_up(stack: list[_Group]) -> None:
    """Make text of the brackets that are open."""
    while len(stack) > 1:
        group = stack.pop()
        stack[-1].pieces[-1] += [group.opened, *_written(group)]


def _closed(group: _Group, closing: str) -> _Node:
    """Return what a pair of brackets means."""
    if group.opened == "[" and group.marks and set(group.marks) == {"|"}:
        return _Choice(group.pieces, None)
    last = group.pieces[-1]
    if group.marks in ([":"], [":", ":"]) and all(isinstance(node, str) for node in last):
        matched = _NUMBER.fullmatch("".join(node for node in last if isinstance(node, str)))
        if matched:
            before = group.pieces[0] if len(group.marks) == 2 else []
            return _Choice([before, group.pieces[-2]], matched[1])
    return [group.opened, *_written(group), closing]


def _written(group: _Group) -> list[_Node]:
    """Return the content of a bracket that is left as it is."""
    nodes: list[_Node] = list(group.pieces[0])
    for mark, piece in zip(group.marks, group.pieces[1:], strict=True):
        nodes += [mark, *piece]
    return nodes


def _until(number: str, calls: int) -> int:
    """Return the last call of what comes first; 0 or less if it never comes."""
    value = float(number) * (calls if "." in number else 1)
    return int(max(-1.0, min(value, float(calls))))


def _nodes(nodes: list[_Node]) -> Iterator[_Node]:
    for node in nodes:
        yield node
        if isinstance(node, _Choice):
            for option in node.options:
                yield from _nodes(option)
        elif isinstance(node, list):
            yield from _nodes(node)


def _text(nodes: list[_Node], end: int, calls: int) -> Iterator[str]:
    """Yield the pieces of the text that ends at a call."""
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            yield from _text(node, end, calls)
        elif node.number is None:
            yield from _text(node.options[(end - 1) % len(node.options)], end, calls)
        else:
            yield from _text(node.options[end > _until(node.number, calls)], end, calls)
