"""sdlora: train a Stable Diffusion LoRA from a folder of pictures, see it at any strength, export it.

The public names load on first use, so ``import sdlora`` is instant and imports no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config, load_config, save_config
    from .data.doctor import examine
    from .demo import demo
    from .errors import SdloraError
    from .events import Control
    from .export import export_adapter
    from .generate import GenerateRequest, ImageGenerator, generate
    from .inspection import inspect_adapter
    from .surgery.bake import bake_checkpoint
    from .surgery.convert import convert_adapter
    from .surgery.diff import diff_adapters
    from .surgery.extract import extract_adapter
    from .surgery.merge import merge_adapters
    from .surgery.resize import resize_adapter
    from .train import TrainResult, train

    __version__: str

_HOMES = {
    "Config": "config",
    "load_config": "config",
    "save_config": "config",
    "examine": "data.doctor",
    "demo": "demo",
    "SdloraError": "errors",
    "Control": "events",
    "export_adapter": "export",
    "GenerateRequest": "generate",
    "ImageGenerator": "generate",
    "generate": "generate",
    "inspect_adapter": "inspection",
    "bake_checkpoint": "surgery.bake",
    "convert_adapter": "surgery.convert",
    "extract_adapter": "surgery.extract",
    "diff_adapters": "surgery.diff",
    "merge_adapters": "surgery.merge",
    "resize_adapter": "surgery.resize",
    "TrainResult": "train",
    "train": "train",
}

__all__ = [
    "Config",
    "Control",
    "GenerateRequest",
    "ImageGenerator",
    "SdloraError",
    "TrainResult",
    "__version__",
    "bake_checkpoint",
    "convert_adapter",
    "demo",
    "diff_adapters",
    "examine",
    "export_adapter",
    "extract_adapter",
    "generate",
    "inspect_adapter",
    "load_config",
    "merge_adapters",
    "resize_adapter",
    "save_config",
    "train",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and rarely asked for

    try:
        return version("sdlora")
    except PackageNotFoundError:  # running from a checkout that was not installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Importing ``sdlora/train.py`` anywhere must not put the module in the place of the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
