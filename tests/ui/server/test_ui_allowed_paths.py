"""Only the folders that the user named can be read or written, whatever a request says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sdlora_ui.app import serve
from sdlora_ui.gallery import list_images
from sdlora_ui.server.allowed_paths import (
    AllowedPaths,
    MissingPath,
    PathRefused,
    model_files,
    program_folders,
    usual_model_folders,
)
from sdlora_ui.settings import checked_config, checked_source
from sdlora_ui.site import Site

from sdlora.errors import ConfigError, OutputError


@pytest.fixture
def paths(tmp_path: Path) -> AllowedPaths:
    home = tmp_path / "home"
    for name in ("runs", "images", "data", "extra", "models/checkpoints"):
        (home / name).mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "diary.png").write_bytes(b"private")
    return AllowedPaths.of(
        home,
        runs=Path("runs"),
        images=Path("images"),
        data=Path("data"),
        allowed=[Path("extra")],
        models=[home / "models" / "checkpoints"],
    )


@pytest.mark.parametrize(
    "text",
    [
        "../secret/diary.png",
        "runs/../../secret/diary.png",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "~nobody/x",
        "",
        " ",
        ".",
        "runs2",
        "//server/share/x.png",
        "\\\\server\\share\\x.png",
        "runs/\0/../../../etc/passwd",
        "data/../../secret",
    ],
)
def test_a_path_outside_is_refused(paths: AllowedPaths, text: str) -> None:
    with pytest.raises(PathRefused, match="outside the folders"):
        paths.readable(text)
    with pytest.raises(PathRefused):
        paths.writable(text)


def test_paths_inside_are_resolved_from_the_home(paths: AllowedPaths) -> None:
    assert paths.readable("runs/a/../b.png") == paths.home / "runs" / "b.png"
    assert paths.writable(paths.home / "extra" / "x") == paths.home / "extra" / "x"


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_to_the_outside_is_refused(paths: AllowedPaths, tmp_path: Path) -> None:
    (paths.data / "link").symlink_to(tmp_path / "secret", target_is_directory=True)
    (paths.data / "image.png").symlink_to(tmp_path / "secret" / "diary.png")
    for name in ("data/link/diary.png", "data/image.png"):
        with pytest.raises(PathRefused):
            paths.readable(name)


def test_model_folders_may_be_read_but_not_written(paths: AllowedPaths) -> None:
    file = paths.models[0] / "base.safetensors"
    assert paths.readable(file) == file
    with pytest.raises(PathRefused):
        paths.writable(file)


def test_the_queues_records_cannot_be_written_by_request(paths: AllowedPaths) -> None:
    with pytest.raises(PathRefused, match="records"):
        paths.writable(paths.state / "jobs" / "x" / "job.json")


def test_programs_to_export_into_are_told_from_those_that_were_not_named(tmp_path: Path) -> None:
    for inside in ("webui/models/Lora", "ComfyUI/models/loras", "plain/images"):
        (tmp_path / inside).mkdir(parents=True)
    paths = AllowedPaths.of(
        tmp_path,
        runs=Path("runs"),
        images=Path("out"),
        data=Path("data"),
        allowed=[tmp_path / "webui", tmp_path / "plain"],
        models=[tmp_path / "ComfyUI" / "models" / "loras", tmp_path / "webui" / "models" / "Lora"],
    )
    assert program_folders(paths) == ([tmp_path / "webui"], [tmp_path / "ComfyUI"])


def test_an_allowed_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(PathRefused, match="no such folder"):
        AllowedPaths.of(tmp_path, runs=Path("r"), images=Path("p"), data=Path("d"), allowed=[Path("gone")])


def test_bases_and_adapters_are_found_in_the_usual_folders(tmp_path: Path) -> None:
    for name in ("ComfyUI/models/checkpoints/a.safetensors", "webui/models/Lora/b.safetensors"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
    folders = usual_model_folders(tmp_path)
    assert [folder.name for folder in folders] == ["checkpoints"]
    paths = AllowedPaths.of(
        tmp_path,
        runs=Path("r"),
        images=Path("p"),
        data=Path("d"),
        allowed=[Path("webui")],
        models=folders,
    )
    assert [file.name for file in model_files(paths, "base")] == ["a.safetensors"]
    assert [file.name for file in model_files(paths, "adapter")] == ["b.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_the_page_lists_nothing_that_a_link_leads_out_to(paths: AllowedPaths, tmp_path: Path) -> None:
    secret, drawn = tmp_path / "secret", paths.images / "own.png"
    (secret / "style.safetensors").write_bytes(b"x")
    (secret / "run").mkdir()
    (secret / "run" / "config.toml").write_text('[sample]\nprompts = ["private"]\n', encoding="utf-8")
    drawn.write_bytes(b"x")
    (paths.images / "out.png").symlink_to(secret / "diary.png")
    (paths.images / "gone.png").symlink_to("nothing.png")
    (paths.images / "loop.png").symlink_to("loop.png")
    (paths.images / "folder.png").mkdir()
    (paths.images / "same.png").symlink_to(drawn)
    listed = list_images(paths, 10)
    assert sorted(image["name"] for image in listed["images"]) == ["own.png", "same.png"]

    (paths.models[0] / "out.safetensors").symlink_to(secret / "style.safetensors")
    (paths.models[0] / "own.safetensors").write_bytes(b"x")
    assert [file.name for file in model_files(paths, "base")] == ["own.safetensors"]

    (paths.runs / "linked").symlink_to(secret / "run")
    (paths.data / "linked").symlink_to(secret)
    (paths.data / "own").mkdir()
    for name, file in (
        ("settings", "config.toml"),
        ("adapter", "lora.safetensors"),
        ("own", "lora.safetensors"),
    ):
        run = paths.runs / name
        run.mkdir()
        (run / "config.toml").write_text("", encoding="utf-8")
        target = secret / "run" / "config.toml" if name == "settings" else secret / "style.safetensors"
        if name != "own":
            (run / file).unlink(missing_ok=True)
            (run / file).symlink_to(target)
        else:
            (run / file).write_bytes(b"x")
        step = run / "checkpoints" / "step-000001"
        step.parent.mkdir()
        step.symlink_to(secret)
    site = Site.open(paths)
    try:
        assert [choice.label for choice in site.runs()] == ["own"]
        assert [choice.label for choice in site.adapters()] == ["own"]
        assert [choice.label for choice in site.data_sets()] == ["own"]
        assert site.checkpoints(paths.runs / "adapter") == []
        assert site.base_of(paths.runs / "settings") == "mini"
    finally:
        site.end()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_cache_folder_is_refused_if_links_lead_it_away(paths: AllowedPaths, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for name in ("usual", "images", "deep", "nowhere"):
        (paths.runs / name / "captions").mkdir(parents=True)
    (paths.runs / "images" / "images").symlink_to(secret)
    (paths.runs / "deep" / "captions" / "0f").symlink_to(secret)
    (paths.runs / "nowhere" / "images").symlink_to("missing")
    (paths.runs / "out").symlink_to(secret)
    (paths.runs / "circle").symlink_to("circle")
    (paths.runs / "same").symlink_to("usual")

    def folder(named: str) -> Path | None:
        values = {"data.folder": "data", "data.cache_folder": named, "output.name": "a"}
        return checked_config(paths, values).data.cache_folder

    assert folder("runs/usual") == folder("runs/same") == paths.runs / "usual"
    assert folder("runs/not there yet") == paths.runs / "not there yet"
    refused = (
        "out",
        "out/deeper",
        "circle",
        "circle/deeper",
        "same/../out",
        "../secret",
        "usual/../../secret",
    )
    for named in refused:
        with pytest.raises(PathRefused):
            folder(f"runs/{named}")
    for named in ("images", "deep", "nowhere"):
        with pytest.raises(OutputError, match="is a link that leads"):
            folder(f"runs/{named}")
    assert sorted(file.name for file in secret.iterdir()) == ["diary.png"] and len(refused) == 7


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_model_folder_is_refused_if_anything_in_it_leads_out(paths: AllowedPaths, tmp_path: Path) -> None:
    folder = paths.runs / "peft" / "unet"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "inside").symlink_to(folder)
    assert paths.model(folder.parent) == folder.parent
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "secret" / "diary.png")
    with pytest.raises(PathRefused, match="leads out"):
        paths.model(folder.parent)
    with pytest.raises(PathRefused, match="leads out"):
        checked_source(paths, "base", "runs/peft")


def test_folders_that_cannot_be_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_bytes(b"mine")
    usual = {"runs": Path("runs"), "images": Path("images"), "data": Path("data")}
    for name in usual:
        with pytest.raises(PathRefused, match=f"--{name} .*: is a file"):
            AllowedPaths.of(tmp_path, **{**usual, name: Path("note.txt")})
        with pytest.raises(OutputError, match="device on Windows"):
            AllowedPaths.of(tmp_path, **{**usual, name: Path("nul")})


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 99_999_999, "--port 99999999: must be from 1 to 65535"),
        ("127.0.0.1", -1, "--port -1: must be from 1 to 65535"),
        ("not an address", 7860, "--listen not an address: is no address of this machine"),
    ],
)
def test_an_address_that_cannot_be_had_is_named(
    paths: AllowedPaths, host: str, port: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        serve(paths, host=host, port=port, password="long enough to pass")


def test_a_missing_folder_is_told_from_a_forbidden_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "data" / "Holiday photos").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    folders = {"runs": Path("runs"), "images": Path("out"), "data": Path("data")}
    mine = AllowedPaths.of(home, **folders, local=True)
    others = AllowedPaths.of(home, **folders)
    for paths in (mine, others):
        with pytest.raises(MissingPath, match=r"no such folder.*did you mean data/Holiday photos\?"):
            paths.folder("data/holliday photos")
        with pytest.raises(PathRefused, match="may not be read"):
            paths.folder(str(tmp_path / "elsewhere"))
    with pytest.raises(PathRefused, match=r"no such folder.*did you mean .*elsewhere\?"):
        mine.folder(str(tmp_path / "elsewere"))
    with pytest.raises(PathRefused, match="may not be read"):  # nothing is told of the rest of the machine
        others.folder(str(tmp_path / "elsewere"))
