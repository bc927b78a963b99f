"""Images per second of a training step: sdlora against kohya's sd-scripts, on a base in one file.

    python benchmarks/kohya_speed.py --kohya CHECKOUT --base BASE.safetensors --device cuda

Both cache latents, train the U-Net's attention at one rank in bf16 and save once at the end. Each runs as a
whole process at two lengths, whose difference is the time of the steps. What was learned is not looked at:
``train_speed.py`` does that, and the layers here are not wholly the same (sd-scripts adds feed-forward ones).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainers import BenchmarkError, Images, Measured, Settings, measured, prepare_images, run

ROOT = Path(__file__).parent.parent


def kohya(checkout: Path, settings: Settings, images: Images, folder: Path, *, steps: int) -> Measured:
    """Train with sd-scripts in a new process and a new folder.

    Raises:
        BenchmarkError: if the process fails or leaves no LoRA.
    """
    data = folder / "images" / "1_images"  # its way of saying: each once an epoch
    shutil.copytree(images.folders["sdlora"], data)
    options = {
        "pretrained_model_name_or_path": settings.base,
        "train_data_dir": data.parent,
        "caption_extension": ".txt",
        "output_dir": folder / "run",
        "output_name": "speed",
        "save_model_as": "safetensors",
        "resolution": f"{settings.resolution},{settings.resolution}",
        "train_batch_size": settings.batch_size,
        "max_train_steps": steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "constant",
        "optimizer_type": "AdamW",
        "network_module": "networks.lora",
        "network_dim": settings.rank,
        "network_alpha": settings.rank,
        "mixed_precision": "bf16",
        "min_snr_gamma": settings.min_snr_gamma,
        "max_grad_norm": 1.0,
        "max_data_loader_n_workers": settings.peer_workers,
        "seed": 0,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    switches = ["--network_train_unet_only", "--cache_latents", "--sdpa"]
    command = [sys.executable, str(checkout / "train_network.py"), *flags, *switches]
    adapter = folder / "run" / "speed.safetensors"
    wall, cpu, peak = measured("kohya", command, folder, adapter, settings.threads, settings.device)
    return Measured(steps, wall, cpu, peak, adapter)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print."""
    options = _parser().parse_args(arguments)
    settings = Settings(
        base=options.base.resolve(),
        peer_script=options.kohya,
        batch_size=options.batch,
        rank=16,
        precision="bf16",
        learning_rate=1e-4,
        resolution=options.resolution,
        min_snr_gamma=5.0,
        threads=options.threads,
        peer_workers=0,
        device=options.device,
    )
    lengths = (options.warm_up, options.warm_up + options.steps)
    speeds = {}
    try:
        with tempfile.TemporaryDirectory(prefix="kohya-speed-") as place:
            images = prepare_images(options.images, Path(place) / "images", options.batch)
            runs: dict[str, list[Measured]] = {"sdlora": [], "kohya": []}
            for steps in lengths:
                ours, theirs = (Path(place) / f"{name}-{steps}" for name in runs)
                runs["sdlora"].append(run("sdlora", settings, images, ours, steps=steps, seed=0))
                theirs.mkdir()
                runs["kohya"].append(kohya(options.kohya.resolve(), settings, images, theirs, steps=steps))
    except BenchmarkError as error:
        print(f"kohya_speed: {error}", file=sys.stderr)
        return 2
    for name, (short, long) in runs.items():
        speeds[name] = options.steps * options.batch / (long.wall_s - short.wall_s)
    lines = ["| trainer | images/s of a step | whole run, s |", "|---|---|---|"]
    lines += [f"| {name} | {speeds[name]:.2f} | {long.wall_s:.1f} |" for name, (_, long) in runs.items()]
    print("\n".join(lines))
    if options.json:
        result = {"images_per_second": speeds, "table": "\n".join(lines)}
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kohya", type=Path, required=True, help="checkout of sd-scripts, its packages here")
    parser.add_argument("--base", type=Path, required=True, help="an SD1.5 checkpoint in one file")
    parser.add_argument("--images", type=Path, default=ROOT / "datasets" / "ink-icons")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="that are timed")
    parser.add_argument("--warm-up", type=int, default=4, help="length of the shorter run")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
