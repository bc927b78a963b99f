"""What `train` and `export` say can be done next, is done as it is line_shown."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora.commands.cli import main
from sdlora.commands.next_steps import after_training

pytestmark = pytest.mark.skipif(os.name != "posix", reason="lines are split as a POSIX shell does")


@pytest.mark.long
def test_the_lines_after_training_and_export_work_as_they_are(
    tiny_base: Path,
    image_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [
        "training.steps=1",
        "judge.every=0",
        'sample.prompts=["a cat\'s $HOME, \\"seen\\""]',
        "sample.steps=1",
    ]
    line = ["train", str(image_folder(3)), "--base", str(tiny_base), "--trigger", "zky", "--output", "run 1"]
    assert main([*line, "model.clip_skip=2", *settings]) == 0
    draw, export = (
        shlex.split(line_shown)
        for line_shown in capsys.readouterr().out.splitlines()
        if line_shown.startswith("  sdlora ")
    )
    assert draw[draw.index("--prompt") + 1] == 'a cat\'s $HOME, "seen"'
    assert draw[draw.index("--clip-skip") + 1] == "2"
    assert main([*draw[1:], "--steps", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["files"]) == 4
    assert main(export[1:]) == 0
    line_shown = capsys.readouterr().out.splitlines()[-1]
    copied = "copy exported/lora.safetensors to the WebUI's models/Lora"
    assert line_shown == f"next: {copied}, and write <lora:lora:1> zky into the prompt"
    Path("webui/models/Lora").mkdir(parents=True)
    assert main(["export", "run 1", "--webui", "webui"]) == 0
    assert "refresh the WebUI's list of LoRAs" in capsys.readouterr().out.splitlines()[-1]
    assert main(["export", "run 1", "--format", "diffusers", "--output", "d"]) == 0
    (call,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("next: "))
    named = Path(call.partition("('")[2].rpartition("')")[0])
    assert named.is_file() and named.parent == Path("d")


def test_a_run_whose_settings_are_gone_can_still_be_exported(tmp_path: Path) -> None:
    lines = after_training(tmp_path, tmp_path / "x.safetensors")
    assert len(lines) == 2 and lines[1].startswith(f"  sdlora export {tmp_path}")
