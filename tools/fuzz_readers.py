"""Fuzzing of the adapter readers: damaged and made-up files must give an adapter or one clear refusal.

Every case is a pure function of its number, so a finding is repeated with ``--first N --count 1``. Files are
mutations of valid ones of every format and spelling, of their bytes and of their parsed headers, and
headers made up from a grammar. Run from the repository:

    python -m tools.fuzz_readers --count 100000
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sdlora.formats.adapter_files import OpenAdapter, read_adapter
from sdlora.inspecting.inspection import edit_adapter, inspect_adapter
from sdlora.inspecting.view import render
from tools.fuzzing import (
    ENTRIES,
    MODULE,
    MUTATIONS,
    NASTY_TEXTS,
    NASTY_VALUES,
    TEXT,
    damaged_bytes,
    outcome_of,
    run_cases,
)


def corpus() -> dict[str, bytes]:
    """Return valid files of every format, spelling and kind, and of things that are not adapters."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(*names: str, down: str, up: str, alpha: bool = True) -> dict[str, torch.Tensor]:
        tensors = {}
        for name in names:
            tensors[name + down] = torch.randn(2, 3, generator=generator)
            tensors[name + up] = torch.randn(4, 2, generator=generator)
            if alpha:
                tensors[f"{name}.alpha"] = torch.tensor(1.5)
        return tensors

    def several(name: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {f"{name}.{part}": torch.randn(shape, generator=generator) for part, shape in shapes.items()}

    dotted = MODULE.replace(".", "_")
    webui = ("lora_unet_" + dotted, "lora_te_" + TEXT.replace(".", "_"))
    kohya = low_rank(*webui, down=".lora_down.weight", up=".lora_up.weight")
    processor = "unet." + MODULE.replace(".to_k", ".processor.to_k")
    settings = {"unet.r": 2, "unet.lora_alpha": 3, "unet.alpha_pattern": {MODULE: 5}, "text_encoder.r": 2}
    files: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "webui": (kohya, {"ss_output_name": "x", "sdlora.alphas": '{"unet":3,"text_encoder":1.5}'}),
        "sdxl": (
            low_rank(
                "lora_unet_input_blocks_4_1_proj_in",
                "lora_te2_" + TEXT.replace(".", "_"),
                down=".lora_down.weight",
                up=".lora_up.weight",
            ),
            {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": '{"a":{"b":1}}'},
        ),
        "diffusers": (
            low_rank(
                f"unet.{MODULE}",
                f"text_encoder.{TEXT}",
                down=".lora_A.weight",
                up=".lora_B.weight",
                alpha=False,
            ),
            {"lora_adapter_metadata": json.dumps(settings), "format": "pt"},
        ),
        "processor": (low_rank(processor, down="_lora.down.weight", up="_lora.up.weight", alpha=False), {}),
        "comfyui": (
            low_rank(
                "diffusion_model.middle_block.1.proj_in",
                f"text_encoders.clip_l.transformer.{TEXT}",
                down=".lora_down.weight",
                up=".lora_up.weight",
            ),
            {},
        ),
        "lycoris": (low_rank("lycoris_" + dotted, down=".lora_down.weight", up=".lora_up.weight"), {}),
        "peft": (
            low_rank(f"base_model.model.{MODULE}", down=".lora_A.weight", up=".lora_B.weight", alpha=False),
            {"format": "pt"},
        ),
        "loha": (
            several(
                webui[0], hada_w1_a=(4, 2), hada_w1_b=(2, 3), hada_w2_a=(4, 2), hada_w2_b=(2, 3), alpha=()
            ),
            {},
        ),
        "lokr": (several(webui[0], lokr_w1=(2, 2), lokr_w2_a=(2, 1), lokr_w2_b=(1, 3), alpha=()), {}),
        "dora": (kohya | several(webui[0], dora_scale=(4, 1)), {}),
        "full": (
            several(webui[0], diff=(4, 3), diff_b=(4,))
            | several("lora_unet_mid_block_resnets_0_norm1", w_norm=(4,), b_norm=(4,)),
            {},
        ),
        "glora": (
            several(webui[0], **{"a1.weight": (3, 2), "a2.weight": (2, 3), "b1.weight": (4, 2)})
            | several(webui[0], **{"b2.weight": (2, 3), "alpha": ()}),
            {},
        ),
        "ia3": (several(webui[0], weight=(4,), on_input=()), {}),
        "oft": (several(webui[0], oft_blocks=(2, 2, 2), rescale=(4, 1), alpha=()), {}),
        "boft": (several(webui[0], oft_blocks=(1, 2, 2, 2), alpha=()), {}),
        "bundle": (
            kohya
            | {
                "bundle_emb.ink.string_to_param.*": torch.ones(1, 8),
                "lora_te_text_model_embeddings_position_ids": torch.arange(4),
            },
            {},
        ),
        "fp8": (
            {key: t.to(torch.float8_e4m3fn) if t.ndim else t for key, t in kohya.items()}
            | {f"{webui[0]}.lora_down.scale_weight": torch.tensor(0.5)},
            {},
        ),
        "lora_bias": (
            low_rank(f"unet.{MODULE}", down=".lora_A.weight", up=".lora_B.weight", alpha=False)
            | {f"unet.{MODULE}.lora_B.bias": torch.ones(4)},
            {},
        ),
        "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(2)}, {}),
        "embedding": ({"emb_params": torch.ones(2, 768)}, {}),
    }
    return {name: save(tensors, entries) for name, (tensors, entries) in files.items()}


PEFT_CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "alpha_pattern": {MODULE: 5},
    "use_rslora": False,
}


def run_case(number: int, files: dict[str, bytes], folder: Path) -> str:
    """Run one case and return its outcome: ``adapter``, the kind of refusal, or ``CRASH`` with what it was.

    Args:
        number: of the case.
        files: from :func:`corpus`.
        folder: for the file; it is used again and again.
    """
    rng = random.Random(number)
    name = rng.choice(sorted(files))
    mutation = rng.choice(MUTATIONS)
    data = mutation(rng, files[name])
    path = folder / ("adapter_model.safetensors" if name == "peft" else "case.safetensors")
    path.write_bytes(data)
    if name == "peft":
        write_config(rng, folder / "adapter_config.json")
        path = rng.choice((folder, path))
    action = rng.randrange(10)
    try:
        if action == 0:
            render(inspect_adapter(path))
        elif action == 1:
            edit_adapter(path, [f"{rng.choice(ENTRIES)}={rng.choice(NASTY_TEXTS)}"], [])
        elif action == 2:
            _ = OpenAdapter(path).outline
        else:
            read_adapter(path)
    except Exception as error:
        return outcome_of(error, folder)
    return "adapter"


def write_config(rng: random.Random, path: Path) -> None:
    """Write PEFT settings, most often with something wrong in them."""
    config: dict[str, Any] = dict(PEFT_CONFIG)
    if rng.random() < 0.6:
        key = rng.choice(
            ("peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "target_modules")
        )
        config[key] = rng.choice((*NASTY_VALUES, "LOHA", {"a.b": 1}, {"(a+)+$": 1}, {MODULE: "x"}, {"": 0}))
    data = json.dumps(config).encode()
    path.write_bytes(damaged_bytes(rng, data) if rng.random() < 0.2 else data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return 1 if anything crashed."""
    return run_cases(__doc__ or "", run_case, corpus(), 100_000, arguments)


if __name__ == "__main__":
    sys.exit(main())
