"""The cache under stress: a process killed in the middle, two processes at once, thinning out meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.data.batching import entries
from sdlora.data.batching.buckets import make_buckets, place
from sdlora.data.batching.cache import EncodedDataset
from sdlora.data.batching.entries import read_entry
from sdlora.data.batching.views import AugmentationViews
from sdlora.data.reading.cache_folder import CacheEntry, choose_entries, list_entries, remove_entries
from sdlora.data.reading.folder import Dataset, scan
from sdlora.errors import OutputError
from sdlora.families.loading import load_model
from sdlora.families.sd1 import StableDiffusion1

Make = Callable[..., Path]
DAY = 86_400.0
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="starts processes as copies of this one")


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> StableDiffusion1:
    return load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))


def encoded(dataset: Dataset, model: StableDiffusion1, folder: Path) -> EncodedDataset:
    buckets = make_buckets(32, model.facts.size_multiple)
    placements = [place(item.height, item.width, buckets) for item in dataset.items]
    return EncodedDataset(
        dataset.items, AugmentationViews(tuple(placements), dataset.items, flip=True), model, folder
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute as the processes here do, whose numbers are compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    """Twelve images, and what a cache of them holds when nothing goes wrong."""
    from drawings import folder_of

    root = tmp_path_factory.mktemp("shared")
    dataset = scan(folder_of(root / "images", 12))
    with one_thread():
        encoded(dataset, model, root / "cache").encode_all()
    whole = contents(root / "cache")
    assert len(whole) == 12 * 2 + 13
    return dataset, whole


def kill_at(number: int, place: str) -> None:
    """Let this process be killed at its ``number``-th entry: within the file, or before it gets its name."""
    written = 0

    def save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        nonlocal written
        written += 1
        save_file(tensors, file, metadata=metadata)
        if written == number:
            if place == "within the file":
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    entries.save_file = save  # type: ignore[attr-defined]


@needs_fork
@pytest.mark.parametrize(
    ("number", "place"), [(1, "within the file"), (15, "before its name"), (30, "within the file")]
)
def test_a_killed_process_leaves_only_whole_entries_and_the_next_one_finishes(
    model: StableDiffusion1,
    reference: tuple[Dataset, dict[str, bytes]],
    tmp_path: Path,
    number: int,
    place: str,
) -> None:
    dataset, whole = reference

    def doomed() -> None:
        kill_at(number, place)
        encoded(dataset, model, tmp_path).encode_all()

    process = in_process(doomed)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    entries_left = list_entries(tmp_path)
    assert sorted(entry.kind == "leftovers" for entry in entries_left) == [False] * (number - 1) + [True]
    for entry in entries_left:
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


@pytest.mark.parametrize("when", ["before an entry is written", "after each entry"])
def test_a_run_goes_on_when_the_cache_is_emptied_under_it(
    model: StableDiffusion1,
    reference: tuple[Dataset, dict[str, bytes]],
    tmp_path: Path,
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset, whole = reference
    emptied = 0
    seen: set[Path] = set()

    def empty() -> None:
        nonlocal emptied
        emptied += 1
        remove_entries(list_entries(tmp_path))
        for folder in tmp_path.glob("*/*"):
            folder.rmdir()

    def save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        if file.parent not in seen:  # the folder was made for this entry; now it goes with all the others
            seen.add(file.parent)
            empty()
        save_file(tensors, file, metadata=metadata)

    if when == "before an entry is written":
        monkeypatch.setattr(entries, "save_file", save)
    with one_thread():
        data = encoded(dataset, model, tmp_path)
        data.encode_all(lambda done, total: empty() if when == "after each entry" else None)
        assert emptied >= 20
        encoded(dataset, model, tmp_path).encode_all()
    assert contents(tmp_path) == whole


def test_a_folder_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.parent.rmdir()
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(entries, "save_file", save)
    with pytest.raises(OutputError, match=r"cache of encodings: set data\.cache_folder"):
        entries.write_entry(tmp_path / "images" / "ab" / "abc.safetensors", {"mean": torch.zeros(3)})


def test_an_entry_removed_after_encoding_is_encoded_again_on_use(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    data = encoded(scan(image_folder(2)), model, tmp_path / "cache")
    data.encode_all()
    remove_entries(list_entries(tmp_path / "cache"))
    again = encoded(scan(tmp_path / "images"), model, tmp_path / "cache")
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
    assert [chosen_entry.path.name for chosen_entry in chosen] == names


def test_use_moves_an_entry_to_the_end_of_the_line(
    model: StableDiffusion1, image_folder: Make, tmp_path: Path
) -> None:
    dataset, cache = scan(image_folder(3)), tmp_path / "cache"
    encoded(dataset, model, cache).encode_all()
    for kept_entry in list_entries(cache):
        os.utime(kept_entry.path, (1, 1))
    encoded(Dataset(dataset.folder, dataset.items[:1]), model, cache).encode_all()
    old = [kept_entry for kept_entry in list_entries(cache) if kept_entry.used < DAY]
    assert len(old) == (3 * 2 + 4) - (2 + 2)
    assert remove_entries(choose_entries(list_entries(cache), older_than_days=1)) == sum(
        kept_entry.bytes for kept_entry in old
    )
    assert len(list_entries(cache)) == 4
