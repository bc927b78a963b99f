"""The memory of a job: of the machine, and of a GPU where NVIDIA's program tells it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
from patience import wait_for
from sdlora_ui.job_memory import MemoryWatch


def test_a_live_process_holds_memory_and_none_holds_none() -> None:
    held = MemoryWatch().of(psutil.Process())
    assert held is not None and held["process"] > 2**20
    assert MemoryWatch().of(None) is None


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for NVIDIA's program")
def test_what_nvidias_program_says_of_the_process_is_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\nprintf '{os.getpid()}, 300\\n1, 9000\\n{os.getpid()}, 200\\n7, [N/A]\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    watch = MemoryWatch()

    def on_gpu() -> int | None:
        held = watch.of(psutil.Process())
        assert held is not None
        return held.get("gpu")

    assert wait_for(on_gpu, "the program's answer") == 500 * 2**20
