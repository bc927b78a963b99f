"""What can go wrong for reasons that a user can correct, as one short tree of exceptions.

Every error carries one message that says what is wrong (with the value), where (file, key or module)
and how to fix it. The command line shows it without a traceback and exits with code 2.
"""

from __future__ import annotations

import re

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class SdloraError(Exception):
    """Something the user can correct; the message says what, where and how."""


class ConfigError(SdloraError):
    """Settings that are unknown, out of range or contradict each other; lists all of them."""


class DatasetError(SdloraError):
    """A folder, image or caption that cannot be trained on."""


class ModelError(SdloraError):
    """A base model that cannot be found, recognised or loaded."""


class AdapterFileError(SdloraError):
    """An adapter file that cannot be read, does not fit, or failed its proof after writing."""


class OutputError(SdloraError):
    """A place that cannot be written: it exists already, is not a folder, or the disk is full."""


class TrainingError(SdloraError):
    """A run that must not continue: a non-finite loss, or a checkpoint that cannot be resumed."""


class OtherProcessError(TrainingError):
    """Another process of the same run failed and has said why; this one ends without a message."""


def without_controls(text: str) -> str:
    """Return a text for a terminal or a page: what commands a terminal or turns the writing becomes escapes.

    Line ends and tabs stay.
    """
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shown(text: object, limit: int = 100) -> str:
    """Return a key from a file as it fits into a one-line message: no control characters, not too long."""
    clean = "".join(c if c.isprintable() else "?" for c in str(text)[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
