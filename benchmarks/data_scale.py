"""How long 20,000 images take: indexing cold and warm, checking, planning, and the memory each needs.

    python -m benchmarks.data_scale [--count 20000] [--side 192] [--folder DIR]

Makes the images (half PNG, half JPEG, with captions) in a temporary folder unless --folder keeps them,
and runs each step in a process of its own, whose peak memory is then known. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

_SAMPLE = 2000  # images that one core's speed is taken from


def make_image(number: int, folder: Path, side: int) -> None:
    """Write one image of discs with its caption; different numbers look different."""
    draw = random.Random(number).random
    width, height = side, round(side * (0.6 + 0.8 * draw()))
    image = Image.new("RGB", (width, height), tuple(int(256 * draw()) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(24):
        x, y, radius = draw() * width, draw() * height, 3 + draw() * side / 5
        pen.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=tuple(int(256 * draw()) for _ in "rgb")
        )
    place = folder / f"{number % 100:02}"
    place.mkdir(exist_ok=True)
    image.save(place / f"{number:06}.{'png' if number % 2 else 'jpg'}")
    (place / f"{number:06}.txt").write_text(f"discs, number {number}", encoding="utf-8")


def one_core(folder: Path) -> dict[str, Any]:
    """Images per second of processor time: by Pillow alone, decoded as training does, measured in full."""
    from sdlora.data.reading.image_files import load_pixels
    from sdlora.data.reading.listing import FoundFile
    from sdlora.data.reading.measure import measure_all

    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")][:_SAMPLE]

    def bare() -> None:
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB")

    def decoded() -> None:
        for file in files:
            load_pixels(file)

    def measured() -> None:  # on all cores; the time of all of them counts
        measure_all([FoundFile(file, file.name) for file in files])

    measure_all([FoundFile(files[0], files[0].name)])  # loads what it needs
    result = {}
    for way in (bare, decoded, measured):
        began = time.process_time()
        way()
        result[f"{way.__name__}_per_cpu_second"] = len(files) / (time.process_time() - began)
    return result


def index(folder: Path) -> dict[str, Any]:
    """Read a folder as training does."""
    from sdlora.data.reading.folder import survey

    began = time.perf_counter()
    survey_result = survey(folder)
    return {"images": len(survey_result.dataset.items), "survey_seconds": time.perf_counter() - began}


def check(folder: Path) -> dict[str, Any]:
    """Examine a folder as `sdlora check` does."""
    from sdlora.data.check.doctor import examine

    began = time.perf_counter()
    report = examine(folder, resolution=512)
    return {"findings": len(report.findings), "check_seconds": time.perf_counter() - began}


def plan(folder: Path) -> dict[str, Any]:
    """Hold images out, put the rest into buckets, and order the first epoch."""
    from sdlora.data.batching.buckets import make_buckets, place
    from sdlora.data.batching.order import Order
    from sdlora.data.reading.folder import survey
    from sdlora.data.reading.holdout import split

    dataset = survey(folder).dataset
    began = time.perf_counter()
    training, held = split(dataset, 0.01, 0)
    buckets = make_buckets(512, 64)
    bucket_of = [place(item.height, item.width, buckets).bucket for item in training.items]
    order = Order(bucket_of, [item.repeats for item in training.items], batch_size=4)
    order.step(0)
    seconds = time.perf_counter() - began
    return {"steps": order.steps_per_epoch, "held_out": len(held.items), "plan_seconds": seconds}


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "one core": one_core,
    "index, cold": index,
    "index, warm": index,
    "check, warm": check,
    "plan, warm": plan,
}


def run_step(name: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Run one step in a process of its own; return what it measured, with wall time and peak memory."""
    environment = os.environ | {"SDLORA_CACHE_FOLDER": str(cache)}
    command = [sys.executable, "-m", "benchmarks.data_scale", "--folder", str(folder), "--step", name]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"wall_seconds": time.perf_counter() - began}


def main() -> None:
    """Make the images, run all steps, print what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=192, help="width of the images in px")
    parser.add_argument("--folder", type=Path, help="make the images here, or use those that are there")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        result = STEPS[options.step](options.folder)
        # ru_maxrss is in KiB on Linux
        used = resource.getrusage(resource.RUSAGE_SELF)
        cost = {
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_mebibytes": used.ru_maxrss / 1024,
        }  # Linux
        print(json.dumps({name: round(value, 2) for name, value in (result | cost).items()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "images"
        if not folder.exists():
            folder.mkdir(parents=True)
            with ProcessPoolExecutor() as pool:
                list(
                    pool.map(
                        make_image,
                        range(options.count),
                        repeat(folder),
                        repeat(options.side),
                        chunksize=200,
                    )
                )
        time.sleep(3)  # what was written a moment ago is not indexed
        results: dict[str, Any] = {"count": options.count, "side": options.side, "cores": os.cpu_count()}
        for name in STEPS:
            results[name] = run_step(name, folder, Path(scratch) / "cache")
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
