"""What sdlora takes from PEFT, imported without bitsandbytes, which PEFT would import with it.

PEFT wants it, where it is installed, for layers that it keeps in few bits; with it comes torch's compiler, a
second of processor time at every start. Bases are quantised by :mod:`sdlora.families.quantised` here, and who
uses its kernels or optimizers imports it then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_BITS = "bitsandbytes"


@contextmanager
def _as_if_not_installed(package: str) -> Iterator[None]:
    """Have ``import`` not find a package that nobody has imported yet."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # the import system's own sign for that
    try:
        yield
    finally:
        del sys.modules[package]


with _as_if_not_installed(_BITS):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    # PEFT keeps the answers, and asks again for every layer that it makes
    is_bnb_available()
    is_bnb_4bit_available()

__all__ = ["BaseTunerLayer", "LoraConfig", "LoraLayer", "inject_adapter_in_model"]
