"""Real components, made small: a random SD1-layout base on disk and a folder of drawn images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from processes import MARKS, Watch, end_marked, new_mark, with_mark

# Without this, threads that wait spin on cores that other processes want (CI, a busy desktop).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Two workers with two threads each on two cores mostly wait for each other.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
# A busy machine makes examples slowly, too.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


# The files that take longest, begun first so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_ui_browser.py",
    "test_train.py",
    "test_memory.py",
    "test_training.py",
    "test_families.py",
    "test_train_kinds.py",
    "test_train_data.py",
    "test_loading.py",
)
_watch = pytest.StashKey[Watch]()


def pytest_configure(config: pytest.Config) -> None:
    """From here on whatever is started ends with this process."""
    config.stash[_watch] = Watch()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what is left."""
    config.stash[_watch].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def _nothing_goes_on_after_a_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failed test left running does not disturb the next file's."""
    yield
    request.config.stash[_watch].sweep()


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_in_the_repository() -> Iterator[None]:
    """Tests write below their own folders, also when what they test falls back to the current one."""
    root = Path(__file__).resolve().parents[1]
    before = set(root.iterdir())
    yield
    ours = (".safetensors", ".png", ".json", ".toml")  # somebody else may work here meanwhile
    strays = sorted(path.name for path in set(root.iterdir()) - before if path.suffix in ours)
    assert not strays, f"left in {root}: {strays}"


@pytest.fixture
def processes_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the test starts ends with it, detached or not."""
    mark = new_mark()
    monkeypatch.setenv(MARKS, with_mark(mark)[MARKS])
    yield
    end_marked(mark)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SDLORA_CACHE_FOLDER"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["SDLORA_CONFIG_FOLDER"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch computes on two threads, however few cores there are: a batch is split in two parts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in SD1 layout with random weights: 32 px, f=4, a 16-wide text encoder."""
    from tools.tiny_base import write_tiny_base

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    write_tiny_base(folder)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a folder of ``count`` captioned images of mixed shapes."""
    from PIL import Image, ImageDraw

    def make(count: int = 6, name: str = "images", caption: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shapes = [(40, 40), (64, 32), (32, 64)]
        for number in range(count):
            width, height = shapes[number % 3]
            image = Image.new("RGB", (width, height), (30 * number % 256, 90, 200 - 20 * number % 200))
            draw = ImageDraw.Draw(image)
            draw.ellipse((4 + number, 4, width - 8, height - 4 - number), fill=(250, 40 * number % 256, 10))
            image.save(folder / f"thing{number:02d}.png")
            if caption:
                (folder / f"thing{number:02d}.txt").write_text(f"an icon of a cat {number}", encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def narrow_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in SDXL layout with random weights: all levels, few channels."""
    from families.narrow import make_base

    folder = tmp_path_factory.mktemp("bases") / "narrow-sdxl"
    folder.mkdir()
    make_base(folder, "sdxl")
    return folder


@pytest.fixture(scope="module")
def true_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a single file of its true size: random weights, fp16, 2 to 7 GB, made once.

    Those in $SDLORA_TRUE_BASES, if that is set, are taken from there and kept.
    """
    import torch

    from tools.true_sizes import write_checkpoint

    kept = os.environ.get("SDLORA_TRUE_BASES")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("true")

    def make(family: str) -> Path:
        file = folder / f"{family}.safetensors"
        if not file.exists():
            write_checkpoint(file, family, torch.float16)
        return file

    return make
