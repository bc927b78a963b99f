"""Time and memory of adapter surgery on files of SDXL's true shapes with random weights.

``python benchmarks/surgery.py --folder DIR`` makes a 6.9 GB checkpoint in LDM layout and an adapter of rank
128 for all linear layers (722 in the U-Net, 72 + 192 in the text encoders), runs the commands as users do,
and prints wall time, processor time and peak memory of each. The yardstick of ``bake`` is reading and writing
the checkpoint twice. Needs 30 GB of disk; everything it made is deleted at the end unless ``--keep``. For
machines that are quiet for a while only, ``--only`` with ``--keep`` measures in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.families.ldm import by_key, text_key_map, unet_key_map, vae_key_map
from sdlora.families.table import family_info
from sdlora.formats.adapter_files import write_adapter

ASSETS = Path(__file__).parent.parent / "sdlora" / "assets" / "sdxl"
FILES = ("base", "lora", "small", "merged", "baked", "undone", "extracted")
_BLOCK_ELEMENTS = 2**24


def component_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Return {component: {tensor: shape}} of SDXL, from its configs, without making any weight."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(name: str) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((ASSETS / name / "config.json").read_text(encoding="utf-8"))
        return tree

    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(config("unet")),
            "vae": AutoencoderKL.from_config(config("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))),
        }
    return {
        name: {key: tuple(tensor.shape) for key, tensor in part.state_dict().items()}
        for name, part in parts.items()
    }


def checkpoint_layout(shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of a single-file checkpoint."""
    key_maps = {"unet": unet_key_map(shapes["unet"]), "vae": vae_key_map(shapes["vae"])}
    for encoder in family_info("sdxl").text_encoders:
        key_maps[encoder.component] = text_key_map(shapes[encoder.component], encoder)
    layout: dict[str, tuple[int, ...]] = {}
    for component, key_map in key_maps.items():
        for key, names in by_key(key_map).items():
            rows, *rest = shapes[component][names[0]]
            layout[key] = (rows * len(names), *rest)
    return layout


def write_checkpoint(path: Path, layout: dict[str, tuple[int, ...]]) -> None:
    """Write random float16 weights under these keys, piece by piece."""
    tree: dict[str, Any] = {"__metadata__": {"modelspec.title": "random SDXL"}}
    position = 0
    for key, shape in layout.items():
        end = position + 2 * torch.Size(shape).numel()
        tree[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(tree).encode()
    block = (torch.randn(_BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0)) * 0.03).half()
    data = memoryview(block.view(torch.uint8).numpy()).cast("B")
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        while position > 0:
            position -= stream.write(data[: min(position, len(data))])


def adapter(shapes: dict[str, dict[str, tuple[int, ...]]], rank: int) -> AdapterWeights:
    """Return random float16 factors for every linear layer of U-Net and text encoders."""
    return AdapterWeights(dict(_pairs(shapes, rank)))


def _pairs(
    shapes: dict[str, dict[str, tuple[int, ...]]], rank: int
) -> Iterator[tuple[ModuleKey, LowRankPair]]:
    generator = torch.Generator().manual_seed(1)
    for component, presets in family_info("sdxl").targets.items():
        for key, shape in shapes[component].items():
            path = key.removesuffix(".weight")
            if key.endswith(".weight") and len(shape) == 2 and f".{path}".endswith(presets["linear"]):
                out, width = shape
                if component != "unet" and not path.startswith("text_model."):
                    path = f"text_model.{path}"
                # a falling spectrum, as training gives
                sizes = torch.exp(-torch.arange(rank) / (rank / 6))
                down = (torch.randn(rank, width, generator=generator) * 0.05 * sizes[:, None]).half()
                up = (torch.randn(out, rank, generator=generator) * 0.02).half()
                yield ModuleKey(component, path), LowRankPair(down, up, rank / 2)


def measured(words: list[str], threads: int) -> dict[str, Any]:
    """Run ``sdlora`` with these words; return its JSON with wall seconds, CPU seconds and peak MiB."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "sdlora", *words, "--json"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"sdlora {' '.join(words)}: exit code {process.returncode}\n{printed}")
    return {
        "command": " ".join(words[:1]),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": usage.ru_maxrss // 1024,
        **{k: v for k, v in json.loads(printed.splitlines()[-1]).items() if k not in ("modules", "seconds")},
    }


def copy_twice(source: Path, target: Path) -> float:
    """Return the seconds that reading and writing a file twice takes, through to the disk."""
    started = time.perf_counter()
    for _ in range(2):
        with source.open("rb") as reading, target.open("wb") as writing:
            shutil.copyfileobj(reading, writing, 16 * 2**20)
            writing.flush()
            os.fsync(writing.fileno())
        target.unlink()
    return time.perf_counter() - started


def commands(folder: Path, rank: int) -> dict[str, list[str]]:
    """Return what is measured, in an order in which each has the files it needs."""
    base, lora, small, merged, baked, undone, extracted = (
        str(folder / f"{name}.safetensors") for name in FILES
    )
    return {
        "inspect": ["inspect", lora],
        "header": ["inspect", lora, "--header"],
        "base": ["inspect", base],
        "resize": ["resize", lora, "--rank", str(rank // 4), "--output", small],
        "merge": ["merge", f"{lora}:0.8", f"{small}:-0.5", "--output", merged],
        "diff": ["diff", lora, small],
        "bake": ["bake", base, "--adapter", f"{lora}:0.8", "--output", baked],
        "inverse": ["bake", baked, "--adapter", f"{lora}:0.8", "--inverse", "--output", undone],
        "extract": ["extract", base, baked, "--rank", "32", "--targets", "linear", "--output", extracted],
    }


def make_files(base: Path, lora: Path, rank: int) -> None:
    """Write the checkpoint and the adapter where they are missing."""
    shapes = component_shapes()
    if not base.exists():
        write_checkpoint(base, checkpoint_layout(shapes))
    if not lora.exists():
        info = AdapterInfo(family="sdxl", name="lora")
        weights = AdapterFile(adapter(shapes, rank), info)
        write_adapter(weights, "webui", lora, torch.float16, family_info("sdxl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="place for the files, up to 30 GB")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", metavar="A,B,...", help=f"some of {', '.join(commands(Path(), 4))}, copy")
    parser.add_argument("--keep", action="store_true", help="leave the files there; a later call takes them")
    parser.add_argument("--make", action="store_true", help="only write the two files to start from")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.safetensors" for name in FILES}
    base, lora = files["base"], files["lora"]
    if options.make:
        return make_files(base, lora, options.rank)
    # by another process: a program counts the memory of the one that started it as its own peak
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    print(
        f"checkpoint {base.stat().st_size / 1e9:.2f} GB; adapter {lora.stat().st_size / 1e9:.2f} GB; "
        f"load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    known = commands(folder, options.rank)
    chosen = options.only.split(",") if options.only else [*known, "copy"]
    for name in chosen:
        if name == "copy":
            seconds = copy_twice(base, folder / "copy.safetensors")
            print(f"copy: reading and writing the checkpoint twice takes {seconds:.1f} s", flush=True)
            continue
        if "--output" in known[name]:
            Path(known[name][known[name].index("--output") + 1]).unlink(missing_ok=True)
        figures = measured(known[name], options.threads)
        keys = ("seconds", "cpu_seconds", "peak_mib", "num_modules")
        print(f"{name}: " + ", ".join(f"{key} {figures[key]}" for key in keys if key in figures), flush=True)
    if not options.keep:
        for file in files.values():
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
