"""The notebook: its cells run from top to bottom on the CPU, and it was stored without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_cells_are_plain_python_without_outputs() -> None:
    for cell, source in zip((c for c in NOTEBOOK["cells"] if c["cell_type"] == "code"), CELLS, strict=True):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile(source, "cell", "exec")
    assert NOTEBOOK["nbformat"] == 4 and len(CELLS) >= 5
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.long
def test_the_cells_run_from_top_to_bottom(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = tmp_path / "cells.py"
    few = "\n\n".join(CELLS).replace("STEPS = 40", "STEPS = 2")
    script.write_text(few, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "notebook-run" / "exported" / "ink.safetensors").is_file()
    assert "read back by" in ended.stdout
    assert len(list((tmp_path / "notebook-run" / "images").glob("*.png"))) == 6
