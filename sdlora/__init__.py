"""sdlora: train a Stable Diffusion LoRA from a folder of images, see it at any strength, export it.

The public names load on first use, so ``import sdlora`` is instant and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.schema import Config, ModelConfig
    from .config.toml import load_config, save_config
    from .data.check.doctor import examine
    from .demonstration.demo import demo
    from .errors import SdloraError
    from .events import Control
    from .exporting.export import export_adapter
    from .generation.generate import generate
    from .generation.image_generator import ImageGenerator
    from .generation.render import GenerateRequest
    from .inspecting.inspection import inspect_adapter
    from .surgery.bake import bake_checkpoint
    from .surgery.convert import convert_adapter
    from .surgery.diff import diff_adapters
    from .surgery.extract import extract_adapter
    from .surgery.merge import merge_adapters
    from .surgery.resize import resize_adapter
    from .training.train import TrainResult, train

    __version__: str

_HOMES = {
    "Config": "config.schema",
    "ModelConfig": "config.schema",
    "load_config": "config.toml",
    "save_config": "config.toml",
    "examine": "data.check.doctor",
    "demo": "demonstration.demo",
    "SdloraError": "errors",
    "Control": "events",
    "export_adapter": "exporting.export",
    "GenerateRequest": "generation.render",
    "ImageGenerator": "generation.image_generator",
    "generate": "generation.generate",
    "inspect_adapter": "inspecting.inspection",
    "bake_checkpoint": "surgery.bake",
    "convert_adapter": "surgery.convert",
    "extract_adapter": "surgery.extract",
    "diff_adapters": "surgery.diff",
    "merge_adapters": "surgery.merge",
    "resize_adapter": "surgery.resize",
    "TrainResult": "training.train",
    "train": "training.train",
}
"""Public name -> the module it lives in; no package may have the name of one of them."""

__all__ = [
    "Config",
    "Control",
    "GenerateRequest",
    "ImageGenerator",
    "ModelConfig",
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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .machine import version

        return version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
