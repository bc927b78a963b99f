"""Fuzzing of what reads base models: damaged checkpoints must be described or give one clear refusal.

As :mod:`tools.fuzz_readers` for adapters: the same mutations on small files in the layouts of SD1, SD2 and
SDXL checkpoints, given to what ``sdlora inspect``, ``bake`` and ``extract`` read with. From the repository:

    python -m tools.fuzz_checkpoints --count 20000
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from sdlora.base_inspection import inspect_base, is_base
from sdlora.errors import SdloraError
from sdlora.surgery.checkpoints import open_checkpoint
from tools.fuzz_readers import MUTATIONS, kind_of_refusal

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
    except SdloraError as error:
        text = str(error)
        if any(ord(c) < 32 and c != "\n" for c in text) or len(text) > 3000:
            return "CRASH: a message with control characters or without end"
        return "refused: " + kind_of_refusal(text, folder)
    except Exception as error:  # the finding this is for
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(line.filename).name}:{line.lineno}"
        return f"CRASH: {type(error).__name__} in {where}: {str(error)[:80]!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print how often each outcome came, and return 1 if anything crashed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args(arguments)
    outcomes: Counter[str] = Counter()
    examples: dict[str, int] = {}
    started, files = time.perf_counter(), corpus()
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.first, options.first + options.count):
            outcome = run_case(number, files, Path(name))
            outcomes[outcome] += 1
            examples.setdefault(outcome, number)
    for outcome, times in outcomes.most_common():
        print(f"{times:8}  {outcome}  (first: case {examples[outcome]})")
    crashes = sum(times for outcome, times in outcomes.items() if outcome.startswith("CRASH"))
    seconds = time.perf_counter() - started
    print(f"{options.count} cases in {seconds:.0f} s: {crashes} crashes, {len(outcomes)} kinds of outcome")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
