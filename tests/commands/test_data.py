"""``sdlora cache`` and ``sdlora check`` on the command line: what they say, change and return."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdlora.commands.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of two images (3 and 40 days unused), a caption and what a killed run left."""
    folder = tmp_path / "cache"
    for name, days, size in (
        ("images/aa/new", 3, 1_000_000),
        ("images/ab/old", 40, 2_000_000),
        ("captions/cc/text", 20, 500_000),
        ("images/ab/.killed", 1, 700_000),
        ("images/ab/.being-written", 0, 700_000),
    ):
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
        os.utime(file, (time.time() - days * 86_400,) * 2)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*.safetensors"))


def test_the_cache_is_listed_and_left_alone(run: Run, cache: Path) -> None:
    before = names(cache)
    code, output, _ = run("cache", "--folder", cache, "--json")
    assert code == 0
    assert output.splitlines()[:4] == [
        str(cache),
        "  images           2        3.0 MB  unused for up to 40 days",
        "  captions         1        0.5 MB  unused for up to 20 days",
        "  leftovers        2        1.4 MB  unused for up to 1 days",
    ]
    assert json.loads(output.splitlines()[-1])["entries"] == 5
    assert names(cache) == before


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ([], [".being-written"]),
        (["--older-than", 30], [".being-written", "new", "text"]),
        (["--max-size", 0.0012], [".being-written", "new"]),
        (["--max-size", 1], [".being-written", "new", "old", "text"]),
    ],
)
def test_pruning_removes_what_was_asked_for_and_lists_it_first(
    run: Run, cache: Path, limits: list[object], left: list[str]
) -> None:
    code, output, _ = run("cache", "--folder", cache, "--prune", "--yes", *limits, "--json")
    assert code == 0
    assert names(cache) == left
    result = json.loads(output.splitlines()[-1])
    assert (result["removed"], result["chosen"]) == (5 - len(left), 5 - len(left))
    assert output.index("to be removed") < output.index(f"removed {5 - len(left)} entries")


def test_without_a_yes_nothing_is_removed(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(cache)
    code, _, errors = run("cache", "--folder", cache, "--prune")
    assert (code, names(cache)) == (2, before)
    assert "add --yes" in errors
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert run("cache", "--folder", cache, "--prune")[0] == 0
    assert names(cache) == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert run("cache", "--folder", cache, "--prune")[0] == 0
    assert names(cache) == [".being-written"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--older-than", "3"], "no effect without --prune"),
        (["--max-size", "3"], "no effect without --prune"),
        (["--yes"], "no effect without --prune"),
        (["--prune", "--older-than", "-1"], "must be 0 or more"),
        (["--prune", "--max-size", "nan"], "must be 0 or more"),
        (["--folder", "nowhere"], "no such folder"),
    ],
)
def test_odd_requests_get_one_clear_error(run: Run, arguments: list[str], words: str) -> None:
    code, _, errors = run("cache", *arguments)
    assert (code, words in errors) == (2, True), errors


def test_an_empty_cache_is_fine(run: Run, tmp_path: Path) -> None:
    result: dict[str, Any] = {}
    code, output, _ = run("cache", "--folder", tmp_path, "--prune", "--json")
    result = json.loads(output.splitlines()[-1])
    assert (code, result["entries"], result["removed"]) == (0, 0, 0)


def test_check_writes_a_page_and_says_where(
    run: Run, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    code, output, _ = run("check", image_folder(), "--resolution", 64, "--html", page, "--json")
    assert code == 0
    assert str(page) in output.splitlines()
    assert json.loads(output.splitlines()[-1])["html"] == str(page)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_check_replaces_a_page_of_its_own_and_no_other_file(
    run: Run, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, page, other = image_folder(), tmp_path / "page.html", tmp_path / "thesis.html"
    for _ in range(2):
        assert run("check", folder, "--resolution", 64, "--html", page)[0] == 0
    other.write_text("<title>my work</title>", encoding="utf-8")
    for file, words in ((other, "is not a page of sdlora check"), (tmp_path, "is a folder")):
        code, _, errors = run("check", folder, "--resolution", 64, "--html", file)
        assert (code, words in errors) == (2, True)
    assert other.read_text(encoding="utf-8") == "<title>my work</title>"


def test_check_looks_at_what_the_settings_train_on(
    run: Run, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = image_folder(), image_folder(3, "more", caption=False)
    (second / "broken.png").write_bytes(b"x")
    settings = tmp_path / "run.toml"
    settings.write_text(
        f"[data]\nfolder = '{first}'\nresolution = 64\nbuckets = false\n"
        f"[training]\nbatch_size = 4\n"
        f"[[data.sources]]\nfolder = '{second}'\nrepeats = 2\ncaption = 'a thing'\n",
        encoding="utf-8",
    )
    code, output, _ = run("check", "--config", settings, "--multiple", 8, "--json")
    result = json.loads(output.splitlines()[-1])
    assert code == 1
    assert (result["num_images"], result["num_unusable"], result["num_batches"]) == (9, 1, 3)
    assert result["buckets"] == [{"bucket": [64, 64], "num_images": 9, "num_visits": 12}]
    assert [f["where"] for f in result["findings"] if f["severity"] == "error"] == [f"{second}/broken.png"]
    captions = {image["name"]: image["caption"] for image in result["images"]}
    assert captions["more/thing00.png"] == "a thing"
    (second / "broken.png").unlink()
    code, output, _ = run("check", "--config", settings, "--multiple", 8, "data.upscale=false", "--json")
    sizes = {tuple(bucket["bucket"]) for bucket in json.loads(output.splitlines()[-1])["buckets"]}
    assert (code, sizes) == (0, {(40, 40), (32, 32)})


@pytest.mark.long
def test_what_a_run_would_take_is_foreseen_for_the_folder_that_is_given(
    run: Run, image_folder: Callable[..., Path], tiny_base: Path
) -> None:
    """Few images are not held out, so nothing is validated; of a usual folder some are."""
    seen = []
    for folder in ([image_folder(4)], []):
        asked = ["check", *folder, "--base", tiny_base, "--memory", "64MB", "--json", "--batch-size", 1]
        code, output, errors = run(*asked)
        assert code == 0, errors
        seen.append(json.loads(output.splitlines()[-1])["memory"]["phases"].keys())
    assert seen[1] - seen[0] == {"validation"} and "step" in seen[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no folder of images given"),
        (["--config", "nowhere.toml"], "no such settings file"),
        (["images", "data.resolutoin=64"], "data.resolution"),
        (["images", "--fix", "--output", "x", "data.flip=true"], "without --config"),
        (["images", "--resolution", "0"], "must be 1 or more"),
    ],
)
def test_a_check_that_makes_no_sense_gets_one_clear_error(
    run: Run, image_folder: Callable[..., Path], arguments: list[str], words: str
) -> None:
    folder = image_folder()
    given = [str(folder) if argument == "images" else argument for argument in arguments]
    code, _, errors = run("check", *given)
    assert (code, words in errors) == (2, True), errors
