"""Fuzzing of what reads base models: damaged checkpoints must be described or give one clear refusal.

As :mod:`tools.fuzz_readers` for adapters: the same mutations on small files in the layouts of SD1, SD2 and
SDXL checkpoints, given to what ``sdlora inspect``, ``bake`` and ``extract`` read with. From the repository:

    python -m tools.fuzz_checkpoints --count 20000
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from sdlora.inspecting.base_inspection import inspect_base, is_base
from sdlora.surgery.checkpoints import open_checkpoint
from tools.fuzzing import MUTATIONS, outcome_of, run_cases

_UNET = "model.diffusion_model"
_ATTENTION = f"{_UNET}.output_blocks.5.1.transformer_blocks.0.attn2"


def corpus() -> dict[str, bytes]:
    """Return small valid checkpoints: a few layers of each family's layout."""

    def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}

    def unet(width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{_UNET}.input_blocks.0.0.weight": (4, 4, 3, 3),
            f"{_UNET}.input_blocks.4.1.proj_in.weight": (4, 4),
            f"{_ATTENTION}.to_k.weight": (4, width),
            f"{_UNET}.out.2.weight": (4, 4, 3, 3),
            f"{_UNET}.out.2.bias": (4,),
            "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
        }

    clip = "transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    block = "model.transformer.resblocks.0.attn"
    families = {
        "sd1": unet(768) | {f"cond_stage_model.{clip}": (4, 4)},
        "sd2": unet(1024) | {f"cond_stage_model.{block}.in_proj_weight": (12, 4)},
        "sdxl": unet(2048)
        | {
            f"{_UNET}.label_emb.0.0.weight": (4, 2816),
            f"conditioner.embedders.0.{clip}": (4, 4),
            f"conditioner.embedders.1.{block}.in_proj_weight": (12, 4),
            f"conditioner.embedders.1.{block}.out_proj.weight": (4, 4),
        },
    }
    entries = {"modelspec.prediction_type": "epsilon", "sdlora.baked": "[]", "ss_zero_terminal_snr": "False"}
    return {name: save(tensors(**shapes), entries) for name, shapes in families.items()}


def run_case(number: int, files: dict[str, bytes], folder: Path) -> str:
    """Run one case and return its outcome: what was read, the kind of refusal, or ``CRASH``."""
    rng = random.Random(number)
    data = rng.choice(MUTATIONS)(rng, files[rng.choice(sorted(files))])
    path = folder / "case.safetensors"
    path.write_bytes(data)
    try:
        if rng.random() < 0.4:
            if not is_base(str(path)):
                return "no base model"
            inspect_base(str(path)).render()
            return "described"
        model = open_checkpoint(path)
        for module in model.modules:
            for site in model.sites(module):
                site.read()
        return f"a checkpoint for {model.family.name}"
    except Exception as error:
        return outcome_of(error, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return 1 if anything crashed."""
    return run_cases(__doc__ or "", run_case, corpus(), 20_000, arguments)


if __name__ == "__main__":
    sys.exit(main())
