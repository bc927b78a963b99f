"""The server's own process never loads torch: workers and jobs do, when something needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SERVER = """
import sys
from pathlib import Path
from sdlora_ui.app import make_app
from sdlora_ui.dataset_view import DataSets
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.site import Site
from sdlora_ui.tabs.dataset import demo_folder

site = Site.open(AllowedPaths.of(Path.cwd(), runs=Path("runs"), images=Path("out"), data=Path("data")))
make_app(site)
demo_folder(site)
DataSets().look(site.paths.data / "ink-icons", trigger="inkicon", resolution=64)
site.bases(), site.adapters(), site.runs()
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


def test_the_page_the_demo_and_a_data_set_need_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
