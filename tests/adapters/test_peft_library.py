"""PEFT comes without bitsandbytes, which can be imported afterwards as if nothing had been."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

CODE = """
import sys
import sdlora.training.train
from sdlora.adapters.attach import LoraLayer, inject_adapter_in_model
from peft import LoraConfig
from torch import nn

model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
assert isinstance(model[0], LoraLayer)
print("bitsandbytes" in sys.modules, "torch._inductor.lowering" in sys.modules)
import bitsandbytes
from bitsandbytes.optim import AdamW8bit

print(issubclass(AdamW8bit, object), bitsandbytes.__spec__ is not None)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install bitsandbytes",
)
def test_bitsandbytes_is_imported_when_it_is_used_and_not_before() -> None:
    told = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120
    )
    assert told.stdout.split() == ["False", "False", "True", "True"]
