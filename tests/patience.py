"""How long a test waits for something before it fails: for a state, never for a time.

A bound only ends a test that fails, so it is generous; ``SDLORA_TEST_PATIENCE=4`` makes it four times as long
on a machine that is slower still.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")
SCALE = float(os.environ.get("SDLORA_TEST_PATIENCE", "1"))
PATIENCE = 240.0 * SCALE  # seconds
_EVERY = 0.05  # seconds between two looks


def wait_for(ready: Callable[[], Value], what: str = "") -> Value:
    """Return the first true value that ``ready`` gives.

    Raises:
        AssertionError: when there is none within :data:`PATIENCE`.
    """
    end = time.monotonic() + PATIENCE
    while not (value := ready()):
        if time.monotonic() > end:
            raise AssertionError(f"{what or 'what was waited for'}: not within {PATIENCE:.0f} s")
        time.sleep(_EVERY)
    return value
