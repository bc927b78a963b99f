"""The JSON files of a diffusers folder, which a stranger may have written: bounded, and checked.

Models are built without memory, whatever sizes such a file names; but each layer costs time and memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ModelError, shown
from ..files import parse_json

MAX_JSON_BYTES = 2**24
_MAX_NUMBER = 2**31 - 1
MAX_LAYERS = 1024
_HOW_TO_COMPUTE = re.compile(r"_?(attn|experts)_implementation.*|quantization_config|auto_map|use_kernels")
"""What transformers would fetch code from the hub for; how a base is computed is decided here alone."""
_LAYERS = re.compile(r"(^|_)(num_hidden_layers|layers_per_block|transformer_layers|num_layers|depth)")


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a base's JSON file.

    Raises:
        ModelError: if it is not there, not JSON, not an object, or larger than any that is needed.
    """
    try:
        if (num_bytes := file.stat().st_size) > MAX_JSON_BYTES:
            raise ModelError(f"{file}: has {num_bytes} bytes, far too many for settings; download it again")
        value = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: is missing; check that the download is complete") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({shown(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: is not a JSON object; download it again")
    return value


def component_config(folder: Path) -> dict[str, Any]:
    """Return the settings that a component is built from.

    Raises:
        ModelError: see :func:`read_json`; also for numbers that no model has.
    """
    file = folder / "config.json"
    config = {key: value for key, value in read_json(file).items() if not _HOW_TO_COMPUTE.fullmatch(key)}
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        limit = MAX_LAYERS if _LAYERS.search(key) else _MAX_NUMBER
        if isinstance(value, list | dict):
            if len(value) > MAX_LAYERS:
                raise ModelError(f"{file}: `{shown(key)}` has {len(value)} entries; download it again")
            waiting += value.items() if isinstance(value, dict) else [(key, item) for item in value]
        elif isinstance(value, int | float) and abs(value) > limit:
            raise ModelError(f"{file}: `{shown(key)}` is {value}, more than {limit}; download it again")
    return config


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index of shards speaks of; all lie beside it.

    Raises:
        ModelError: see :func:`read_json`; also for an index that names none, or a place elsewhere.
    """
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelError(f"{index}: does not say which files hold the weights; download it again")
    return sorted(set(names))
