"""Completion of command lines: what shells are told, and what is offered for a line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdlora.commands.cli import main
from sdlora.commands.completion import SHELLS, setting_words
from sdlora.config.schema import fields

pytest.importorskip("argcomplete", reason='argcomplete is not installed: pip install "sdlora[completion]"')


def offered(line: str, tmp_path: Path) -> list[str]:
    """Return what a shell is answered for a line: argcomplete writes it to descriptor 8."""
    answer = tmp_path / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    command = f'exec 8>"{answer}" 9>/dev/null; exec "{sys.executable}" -m sdlora'
    subprocess.run(["sh", "-c", command], env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
    return answer.read_text(encoding="utf-8").split("\n")


@pytest.mark.skipif(os.name != "posix", reason="needs file descriptors of a POSIX shell")
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("sdlora tra", ["train"]),
        ("sdlora train x --pres", ["--preset"]),
        ("sdlora train x --preset sdxl", ["sdxl-style", "sdxl-subject"]),
        ("sdlora train x adapter.targets=", [f"adapter.targets={w}" for w in ("attention", "linear", "all")]),
        ("sdlora presets sma", ["small-file"]),
        ("sdlora export run --format w", ["webui"]),
    ],
)
def test_what_is_offered(line: str, wanted: list[str], tmp_path: Path) -> None:
    assert offered(line, tmp_path) == wanted


def test_every_setting_is_offered_once() -> None:
    assert setting_words("") == [f"{key}=" for key, _ in fields()]
    assert setting_words("adapter.text_encoder=t") == ["adapter.text_encoder=true"]


@pytest.mark.parametrize("shell", list(SHELLS))
def test_each_shell_gets_code_of_its_own(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "sdlora" in code and "COMP_LINE" in code
    program = {"powershell": "pwsh"}.get(shell, shell)
    if shell != "powershell" and shutil.which(program):
        check = [program, "--no-execute"] if shell == "fish" else [program, "-n"]
        subprocess.run(check, input=code, text=True, check=True, timeout=60)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_itself_completes(tmp_path: Path) -> None:
    program = tmp_path / "sdlora"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sdlora "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = (
        'eval "$(sdlora completion bash)"; COMP_WORDS=(sdlora doc); COMP_CWORD=1; COMP_LINE="sdlora doc"; '
        'COMP_POINT=10; COMP_TYPE=9; _python_argcomplete sdlora doc sdlora; echo "${COMPREPLY[@]}"'
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    answer = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.strip() == "doctor"


def test_without_argcomplete_the_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert 'pip install "sdlora[completion]"' in capsys.readouterr().err
