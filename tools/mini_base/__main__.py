"""Command line of the mini base's build."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import classifier, parallel
from .build import RUNNERS, STAGES, Build
from .denoiser import DenoiserSettings
from .vae import VaeSettings


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    new = argparse.ArgumentParser(
        prog="python -m tools.mini_base",
        description="Builds the embedded mini base from openly licensed icon sets: "
        "fetch, render, train, evaluate, write. Goes on where an earlier run stopped.",
    )
    new.add_argument("--output", type=Path, required=True, help="folder of the finished base")
    new.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    new.add_argument("--start-from", type=Path, help="pipeline folder to go on training from")
    new.add_argument("--datasets", type=Path, help="where to write the ink data sets")
    new.add_argument("--cache", type=Path, help="folder of fetched packages (OUTPUT.work/npm)")
    new.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    new.add_argument("--workers", type=int, default=1, help="processes that train, one thread each")
    new.add_argument("--samples", type=int, default=DenoiserSettings.samples)
    new.add_argument("--minutes", type=float, help="wall-clock budget of the denoiser's training")
    new.add_argument("--batch", type=int, default=DenoiserSettings.batch)
    new.add_argument("--lr", type=float, default=DenoiserSettings.lr)
    new.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        default=DenoiserSettings.prediction,
        help="what the U-Net predicts",
    )
    new.add_argument("--compile", action="store_true", help="compile the U-Net (long runs only)")
    new.add_argument("--vae-samples", type=int, default=VaeSettings.samples)
    new.add_argument("--vae-lr", type=float, default=VaeSettings.lr)
    new.add_argument("--vae-icons", type=int, help="icons of each set for the VAE (trial runs)")
    new.add_argument("--classifier-steps", type=int, default=classifier.STEPS)
    new.add_argument("--machine", help="how the model card names the machine")
    new.add_argument("--decoder-only", action="store_true", help="keep the VAE's encoder")
    new.add_argument("--seed", type=int, default=0)
    new.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    new.add_argument("--meet", default="", help=argparse.SUPPRESS)
    return new


def build_from(options: argparse.Namespace) -> Build:
    """Translates the command line's options."""
    return Build(
        output=options.output,
        cache=options.cache or options.output.with_name(options.output.name + ".work") / "npm",
        start_from=options.start_from,
        datasets=options.datasets,
        device=torch.device(options.device),
        classifier_steps=options.classifier_steps,
        machine=options.machine,
        denoiser=DenoiserSettings(
            samples=options.samples,
            minutes=options.minutes,
            batch=options.batch,
            lr=options.lr,
            prediction=options.prediction,
            seed=options.seed,
            compile=options.compile,
        ),
        vae=VaeSettings(
            samples=options.vae_samples,
            lr=options.vae_lr,
            decoder_only=options.decoder_only,
            icons=options.vae_icons,
            seed=options.seed,
        ),
    )


def run_workers(stage: str, arguments: list[str], count: int) -> None:
    """Runs a stage that trains in ``count`` processes, one thread each.

    Raises:
        RuntimeError: If a worker fails; the others are stopped.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Large arrays stay with the process instead of going back to the
        # system and coming again, page by page, in every step.
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "MALLOC_TRIM_THRESHOLD_": "16000000000",
        "MALLOC_TOP_PAD_": "268435456",
    }
    with tempfile.TemporaryDirectory() as scratch:
        meet = str(Path(scratch) / "meet")
        command = [sys.executable, "-m", "tools.mini_base", *arguments, "--stages", stage]
        workers = [
            subprocess.Popen([*command, "--worker", str(n), "--meet", meet], env=environment)
            for n in range(count)
        ]
        try:
            codes = [worker.wait() for worker in workers]
        except BaseException:
            for worker in workers:
                worker.terminate()
            raise
        if any(codes):
            raise RuntimeError(f"Workers of the stage {stage} ended with {codes}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the chosen stages."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    build = build_from(options)
    build.work.mkdir(parents=True, exist_ok=True)
    if options.meet:
        parallel.join(options.meet, options.worker, options.workers, build.device)
        torch.set_num_threads(1)
        RUNNERS[options.stages[0]](build)
        parallel.leave()
        return
    for stage in STAGES:
        if stage not in options.stages:
            continue
        print(f"== {stage}", flush=True)
        if stage in ("vae", "denoiser") and options.workers > 1:
            run_workers(stage, arguments, options.workers)
        else:
            RUNNERS[stage](build)


if __name__ == "__main__":
    main()
