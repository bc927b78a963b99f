"""The command line: spellings, exit codes, JSON, and one clear line for every bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlora.commands.cli import COMMANDS, main

Make = Callable[..., Path]
SHORT = [
    "training.steps=2",
    "adapter.rank=2",
    "training.batch_size=2",
    "data.validation=0",
    "sample.prompts=['a cat']",
    "sample.steps=2",
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command_needs_no_torch(command: str) -> None:
    script = (
        "import sys; sys.argv[1:] = [a for a in sys.argv[1:] if a]\n"
        "from sdlora.commands.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)\n"
        "allowed = {'train', 'generate', 'judge'} & set(sys.argv)\n"
        "light = allowed or not {'pydantic', 'rich'} & set(sys.modules)\n"
        "assert light and not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: sdlora" in done.stdout
    if command == "train":
        assert "optimizer.learning_rate [left open]" in done.stdout


def test_check_needs_no_torch(image_folder: Make) -> None:
    script = (
        "import sys\nfrom sdlora.commands.cli import main\ncode = main(['check', sys.argv[1], '--json'])\n"
        "assert not {'torch', 'scipy', 'pydantic', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(image_folder())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["num_images"] == 6


def test_check_exits_1_when_training_would_be_harmed(run: Any, image_folder: Make) -> None:
    folder = image_folder()
    (folder / "cut.png").write_bytes((folder / "thing00.png").read_bytes()[:60])
    code, output, _ = run("check", folder, "--json")
    assert code == 1
    assert "cut.png" in output


@pytest.mark.long
@pytest.mark.parametrize("prompts", ["[]", '["a cat"]'])
def test_train_names_its_previews_only_where_it_drew_some(
    run: Any, tiny_base: Path, image_folder: Make, tmp_path: Path, prompts: str
) -> None:
    out = tmp_path / "run"
    settings = [*SHORT, f"sample.prompts={prompts}"]
    code, output, errors = run("train", image_folder(), "--base", tiny_base, "--output", out, *settings)
    assert code == 0, errors
    grid = out / "samples" / "grid.png"
    assert (str(grid) in output) == grid.is_file() == (prompts != "[]")


def test_train_generate_export_inspect_end_to_end(
    run: Any, tiny_base: Path, image_folder: Make, tmp_path: Path
) -> None:
    folder, out = image_folder(), tmp_path / "run"
    base = ["--base", tiny_base]
    code, output, errors = run("train", folder, *base, "--name", "style", "--output", out, "--json", *SHORT)
    assert code == 0, errors
    trained = json.loads(output.splitlines()[-1])
    adapter = Path(trained["adapter_file"])
    assert (adapter, trained["step"], trained["stopped"]) == (out / "style.safetensors", 2, False)

    drawn = tmp_path / "drawn"
    arguments = ["--adapter", f"{adapter}:0.8", "--prompt", "a cat", "--seed", 1, "--steps", 2]
    code, output, errors = run(
        "generate", *base, *arguments, "--strengths", "0,0.5,1", "--output", drawn, "--json"
    )
    assert code == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert len(result["files"]) == 3
    with Image.open(result["grid"]) as grid, Image.open(result["files"][0]) as image:
        assert grid.width > 3 * 32
        assert (image.size, "parameters" in image.info) == ((32, 32), True)

    for format in ("webui", "diffusers", "peft"):
        code, output, errors = run("export", out, "--format", format, "--output", tmp_path / format, "--json")
        assert code == 0, errors
        assert "largest delta difference" in output
        assert json.loads(output.splitlines()[-1])["num_modules"] > 0
    code, output, errors = run("inspect", tmp_path / "webui" / "style.safetensors", "--json")
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1])["family"] == "sd1"


@pytest.mark.long
def test_resume_needs_only_the_run_folder(
    run: Any, tiny_base: Path, image_folder: Make, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run("train", image_folder(), "--base", tiny_base, "--output", out, *SHORT)[0] == 0
    first = load_file(out / "lora.safetensors")
    code, output, errors = run("train", "--resume", "--output", out, "--json")
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1])["step"] == 2
    again = load_file(out / "lora.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def bad_folders(folder: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (folder to train on, words the error must hold)."""
    image = (folder / "thing00.png").read_bytes()

    def variant(name: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        (place / "good.png").write_bytes(image)
        (place / "good.txt").write_text("good", encoding="utf-8")
        return place

    cases = {"missing": (tmp_path / "nowhere", "no such folder")}
    (tmp_path / "empty").mkdir()
    cases["empty"] = (tmp_path / "empty", "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.md").write_text("x", encoding="utf-8")
    cases["no images"] = (tmp_path / "texts", "no images")
    cases["file as folder"] = (folder / "thing00.png", "folder")
    corrupt = variant("corrupt")
    (corrupt / "bad.png").write_bytes(b"not an image")
    cases["corrupt image"] = (corrupt, "bad.png")
    truncated = variant("truncated")
    (truncated / "half.png").write_bytes(image[: len(image) // 2])
    cases["truncated image"] = (truncated, "half.png")
    uncaptioned = variant("uncaptioned")
    (uncaptioned / "0001.png").write_bytes(image)
    cases["no caption and no name"] = (uncaptioned, "0001.png")
    latin = variant("latin")
    (latin / "good.txt").write_bytes("caf\xe9".encode("latin-1"))
    cases["caption not UTF-8"] = (latin, "UTF-8")
    twins = variant("twins")
    (twins / "good.bmp").write_bytes(image)
    cases["two images with one stem"] = (twins, "good.bmp")
    return cases


@pytest.mark.long
def test_bad_folders_get_one_clear_error_and_leave_nothing(
    run: Any, tiny_base: Path, image_folder: Make, tmp_path: Path
) -> None:
    cases = bad_folders(image_folder(), tmp_path)
    assert len(cases) == 9
    for name, (folder, words) in cases.items():
        out = tmp_path / "out"
        code, _, errors = run("train", folder, "--base", tiny_base, "--output", out, *SHORT)
        problem = [line for line in errors.splitlines() if line.startswith("sdlora: ")]
        assert (name, code, len(problem)) == (name, 2, 1), errors
        assert words in errors, (name, errors)
        assert "Traceback" not in errors
        assert not out.exists(), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.stpes=3"], "training.steps"),
        (["adapter.rank=0"], "adapter.rank=0"),
        (["--base", "nowhere.safetensors"], "no such base model"),
        (["--base", "model.ckpt"], "can run code"),
        (["--config", "nowhere.toml"], "no such settings file"),
        (["--resume"], "config.toml"),
        (["data.resolution=32", "--base", "mini", "training.device=cuda:9"], "cuda"),
    ],
)
def test_bad_settings_get_one_clear_error(
    run: Any, image_folder: Make, tmp_path: Path, tiny_base: Path, arguments: list[str], words: str
) -> None:
    base = [] if "--base" in arguments else ["--base", str(tiny_base)]
    code, output, errors = run(
        "train", image_folder(), *base, "--output", tmp_path / "out", "--json", *SHORT, *arguments
    )
    assert code == 2
    assert words in errors
    assert words in json.loads(output.splitlines()[-1])["error"]
    assert "Traceback" not in errors


def test_bad_adapters_get_one_clear_error(run: Any, tiny_base: Path, tmp_path: Path) -> None:
    not_lora = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, not_lora)
    pickled = tmp_path / "old.pt"
    torch.save({"weight": torch.zeros(2)}, pickled)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 20)
    other = tmp_path / "other.safetensors"
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{key}.lora_down.weight": torch.zeros(4, 2048),
            f"{key}.lora_up.weight": torch.zeros(640, 4),
            f"{key}.alpha": torch.tensor(4.0),
        },
        other,
    )
    cases = {
        not_lora: "plain.safetensors",
        pickled: ".pt",
        broken: "broken.safetensors",
        tmp_path / "missing.safetensors": "missing.safetensors",
        other: "other",
        tmp_path: str(tmp_path),
    }
    for file, words in cases.items():
        code, _, errors = run(
            "generate", "--base", tiny_base, "--adapter", file, "--prompt", "x", "--output", tmp_path / "out"
        )
        assert (file.name, code) == (file.name, 2), errors
        assert words in errors
        assert "Traceback" not in errors
        if file != other:
            code, _, errors = run("inspect", file)
            assert (file.name, code) == (file.name, 2), errors


def test_full_disk_at_a_checkpoint_is_told_and_leaves_no_half_file(
    run: Any, tiny_base: Path, image_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up when the checkpoint is moved into place: the adapter itself is there."""
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if "step-" in str(target) and "checkpoints" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "out"
    code, _, errors = run("train", image_folder(), "--base", tiny_base, "--output", out, *SHORT)
    assert code == 0
    assert "no checkpoint was saved" in errors
    assert "disk is full" in errors
    assert [name for name in files_below(out) if name.startswith("checkpoints")] == []
    assert "lora.safetensors" in files_below(out)


@pytest.mark.long
def test_output_that_exists_is_left_as_it_is(
    run: Any, tiny_base: Path, image_folder: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = image_folder()
    assert run("train", folder, "--base", tiny_base, "--output", out, *SHORT)[0] == 0
    before = files_below(out)
    code, _, errors = run("train", folder, "--base", tiny_base, "--output", out, *SHORT)
    assert (code, files_below(out) == before) == (2, True)
    assert "--resume" in errors
    for place in (out / "config.toml", out / "config.toml" / "run"):
        code, _, errors = run("train", folder, "--base", "no such base", "--output", place, *SHORT)
        assert (code, files_below(out) == before, "file" in errors) == (2, True, True), errors
    target = out / "lora.safetensors"
    assert run("export", target, "--output", tmp_path / "exported")[0] == 0
    exported = files_below(tmp_path / "exported")
    assert run("export", target, "--output", tmp_path / "exported")[0] == 2
    assert files_below(tmp_path / "exported") == exported


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "somewhere", "--no-such-option"], "--no-such-option"),
        (["check", "somewhere", "--resolutoin", "64"], "did you mean --resolution?"),
        (["generate"], "required: --output"),
        (["generate", "--prompt", "x", "--output", "y", "--seed", "one"], "--seed: invalid int value: 'one'"),
        (["resize", "x", "--output", "y", "--energy", "0,9"], "write 0.9, with a point"),
        (["export", "x", "--format", "ckpt"], "'webui', 'diffusers', 'peft'"),
        (["trian", "folder"], "no command `trian`; did you mean train?"),
        ([], "COMMAND"),
    ],
)
def test_a_line_that_means_nothing_gets_one_clear_error(run: Any, arguments: list[str], words: str) -> None:
    code, output, errors = run("--json", *arguments)
    assert (code, len(errors.splitlines()), errors[:8]) == (2, 1, "sdlora: ")
    assert words in errors
    assert json.loads(output) == {"error": errors[8:].rstrip(), "kind": "ConfigError"}


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes there")
def test_a_reader_that_leaves_early_is_no_error(image_folder: Make, processes_end: None) -> None:
    command = [sys.executable, "-m", "sdlora", "check", str(image_folder(count=1))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
