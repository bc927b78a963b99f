"""The cache under stress: a process killed in the middle, two processes at once, thinning out meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.data.buckets import make_buckets, place
from sdlora.data.cache import EncodedDataset
from sdlora.data.cache_folder import (
    CacheEntry,
    choose_entries,
    list_entries,
    remove_entries,
)
from sdlora.data.entries import read_entry
from sdlora.data.folder import Dataset, scan
from sdlora.data.looks import Looks
from sdlora.families.loading import load_model
from sdlora.families.sd1 import StableDiffusion1

Make = Callable[..., Path]
DAY = 86_400.0
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="starts processes as copies of this one")


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> StableDiffusion1:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


def encoded(dataset: Dataset, model: StableDiffusion1, folder: Path) -> EncodedDataset:
    buckets = make_buckets(32, model.size_multiple)
    placements = [place(item.height, item.width, buckets) for item in dataset.items]
    return EncodedDataset(dataset.items, Looks(tuple(placements), dataset.items, flip=True), model, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def in_process(work: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    def alone() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        work()

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


@pytest.fixture(scope="module")
def reference(
    model: StableDiffusion1, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Dataset, dict[str, bytes]]:
    """Twelve pictures, and what a cache of them holds when nothing goes wrong."""
    from pictures import folder_of

    root = tmp_path_factory.mktemp("shared")
    dataset = scan(folder_of(root / "pictures", 12))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encoded(dataset, model, root / "cache").encode_all()
    torch.set_num_threads(threads)
    whole = contents(root / "cache")
    assert len(whole) == 12 * 2 + 13
    return dataset, whole


@needs_fork
@pytest.mark.parametrize("kill_after", [1, 6, 15, 30])
def test_a_killed_process_leaves_only_whole_entries_and_the_next_one_finishes(
    model: StableDiffusion1, reference: tuple[Dataset, dict[str, bytes]], tmp_path: Path, kill_after: int
) -> None:
    dataset, whole = reference
    process = in_process(lambda: encoded(dataset, model, tmp_path).encode_all())
    deadline = time.monotonic() + 60
    while len(list_entries(tmp_path)) < kill_after and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for entry in list_entries(tmp_path):
        assert entry.kind == "leftovers" or read_entry(entry.path) is not None
    finisher = in_process(lambda: encoded(dataset, model, tmp_path).encode_all())
    finisher.join()
    assert finisher.exitcode == 0
    kept = {name: data for name, data in contents(tmp_path).items() if not Path(name).name.startswith(".")}
    assert kept == whole


@needs_fork
def test_two_processes_fill_one_cache_together(
    model: StableDiffusion1, reference: tuple[Dataset, dict[str, bytes]], tmp_path: Path
) -> None:
    dataset, whole = reference
    processes = [in_process(lambda: encoded(dataset, model, tmp_path).encode_all()) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(tmp_path) == whole


@needs_fork
def test_a_run_goes_on_when_the_cache_is_emptied_under_it(
    model: StableDiffusion1, reference: tuple[Dataset, dict[str, bytes]], tmp_path: Path
) -> None:
    dataset, whole = reference
    process = in_process(lambda: encoded(dataset, model, tmp_path).encode_all())
    while process.is_alive():
        remove_entries(choose_entries(list_entries(tmp_path)))
        time.sleep(0.002)
    process.join()
    assert process.exitcode == 0
    finisher = in_process(lambda: encoded(dataset, model, tmp_path).encode_all())
    finisher.join()
    assert contents(tmp_path) == whole


def test_an_entry_removed_after_encoding_is_encoded_again_on_use(
    model: StableDiffusion1, picture_folder: Make, tmp_path: Path
) -> None:
    data = encoded(scan(picture_folder(2)), model, tmp_path / "cache")
    data.encode_all()
    remove_entries(list_entries(tmp_path / "cache"))
    again = encoded(scan(tmp_path / "pictures"), model, tmp_path / "cache")
    assert torch.equal(again.image(1).posterior.mean, data.image(1).posterior.mean)


def entry(name: str, days_ago: float, size: int, kind: str = "images") -> CacheEntry:
    return CacheEntry(Path(name), kind, size, 1000 * DAY - days_ago * DAY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({}, ["stale", "a", "b", "c"]),
        ({"older_than_days": 10}, ["stale", "a"]),
        ({"older_than_days": 0}, ["stale", "a", "b", "c"]),
        ({"max_bytes": 60}, ["stale"]),
        ({"max_bytes": 59}, ["stale", "a"]),
        ({"max_bytes": 0}, ["stale", "a", "b", "c"]),
        ({"older_than_days": 10, "max_bytes": 30}, ["stale", "a", "b"]),
    ],
)
def test_the_longest_unused_entries_are_chosen_first(limits: dict[str, float], names: list[str]) -> None:
    entries = [
        entry("a", 30, 10),
        entry("stale", 29, 99, "leftovers"),
        entry("b", 5, 30, "captions"),
        entry("c", 1, 20),
        entry("being written", 0, 99, "leftovers"),
    ]
    chosen = choose_entries(entries, now=1000 * DAY, **limits)  # type: ignore[arg-type]
    assert [one.path.name for one in chosen] == names


def test_use_moves_an_entry_to_the_end_of_the_line(
    model: StableDiffusion1, picture_folder: Make, tmp_path: Path
) -> None:
    dataset, cache = scan(picture_folder(3)), tmp_path / "cache"
    encoded(dataset, model, cache).encode_all()
    for one in list_entries(cache):
        os.utime(one.path, (1, 1))
    encoded(Dataset(dataset.folder, dataset.items[:1]), model, cache).encode_all()
    old = [one for one in list_entries(cache) if one.used < DAY]
    assert len(old) == (3 * 2 + 4) - (2 + 2)
    assert remove_entries(choose_entries(list_entries(cache), older_than_days=1)) == sum(
        one.bytes for one in old
    )
    assert len(list_entries(cache)) == 4
