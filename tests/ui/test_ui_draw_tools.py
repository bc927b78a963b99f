"""Several images of one press, usual negative prompts, adapters with their cards, adapters dropped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sdlora_ui.adapter_cards import AdapterCards
from sdlora_ui.server.adapter_files import keep_adapter
from sdlora_ui.server.allowed_paths import AllowedPaths, PathRefused
from sdlora_ui.tabs.draw_tools import several
from sdlora_ui.tabs.negatives import NEGATIVES, with_negative

from sdlora.errors import ConfigError


@pytest.fixture
def paths(tmp_path: Path) -> AllowedPaths:
    folders = {"runs": Path("runs"), "images": Path("out"), "data": Path("data")}
    return AllowedPaths.of(tmp_path, **folders, local=True)


def adapter(
    file: Path, metadata: dict[str, str] | None = None, name: str = "lora_unet_x.lora_up.weight"
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2, 2)}, file, metadata)
    return file


def test_several_images_have_one_seed_each_and_go_on_after_the_last_number() -> None:
    arguments, shape = several(6, 2**32 - 2)
    assert arguments == {"axes": ["seed=4294967294,4294967295,0,1,2,3"]}
    html = shape([{"row": 0, "column": column, "file": f"/x/{column}.png"} for column in range(6)], 6)
    assert html.count("<img") == 6 and html.count("<tr>") == 3  # with the head
    for wrong in ((0, 1), (65, 1), (None, 1), (2, None)):
        with pytest.raises(ConfigError, match="from 1 to 64"):
            several(*wrong)


def test_a_usual_negative_prompt_adds_what_is_missing_and_keeps_what_is_written() -> None:
    written, choice = with_negative(NEGATIVES["photo"], "my own words, Blurry")
    assert written.startswith("my own words, Blurry, painting") and written.lower().count("blurry") == 1
    assert choice == "" and set(NEGATIVES["photo"].split(", ")) <= {*written.split(", "), "blurry"}


def test_a_card_says_trigger_strength_and_preview_and_follows_the_file(
    paths: AllowedPaths, tmp_path: Path
) -> None:
    entries = {"sdlora.trigger_words": json.dumps(["zz", "ink"]), "sdlora.preferred_strength": "0.8"}
    file, cards = adapter(tmp_path / "runs" / "a.safetensors", entries), AdapterCards(paths)
    Image.new("RGB", (9, 9)).save(tmp_path / "runs" / "a.png")
    seen = cards.of(file)
    assert (seen["trigger"], seen["strength"], seen["preview"]) == (
        "zz, ink",
        0.8,
        str(tmp_path / "runs" / "a.png"),
    )
    adapter(file, {"modelspec.trigger_phrase": "another one"})
    assert cards.of(file)["trigger"] == "another one"


def test_a_webui_card_beside_the_file_counts_where_its_header_says_nothing(
    paths: AllowedPaths, tmp_path: Path
) -> None:
    file = adapter(tmp_path / "runs" / "b.safetensors")
    (tmp_path / "runs" / "b.json").write_text('{"activation text": "yy", "preferred weight": 0.7}')
    seen = AdapterCards(paths).of(file)
    assert (seen["trigger"], seen["strength"]) == ("yy", 0.7)
    (tmp_path / "runs" / "c.safetensors").write_bytes(b"no")
    (tmp_path / "runs" / "c.json").write_text("broken")
    assert AdapterCards(paths).of(tmp_path / "runs" / "c.safetensors")["trigger"] == ""


def test_a_dropped_adapter_is_kept_and_nothing_is_overwritten(paths: AllowedPaths, tmp_path: Path) -> None:
    target = tmp_path / "runs" / "exported"
    first = keep_adapter(paths, adapter(tmp_path / "up" / "my style.safetensors"), target)
    second = keep_adapter(paths, adapter(tmp_path / "up" / "my style.safetensors", {"x": "y"}), target)
    assert [first.name, second.name] == ["my style.safetensors", "my style-2.safetensors"]
    assert (
        first.read_bytes() != second.read_bytes() == (tmp_path / "up" / "my style.safetensors").read_bytes()
    )


def test_what_is_no_adapter_is_not_kept_and_no_visitor_drops_one(paths: AllowedPaths, tmp_path: Path) -> None:
    checkpoint = adapter(tmp_path / "up" / "base.safetensors", name="model.diffusion_model.out.weight")
    with pytest.raises(ConfigError, match="holds no LoRA"):
        keep_adapter(paths, checkpoint, tmp_path / "runs")
    (tmp_path / "up" / "torn.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="damaged"):
        keep_adapter(paths, tmp_path / "up" / "torn.safetensors", tmp_path / "runs")
    good = adapter(tmp_path / "up" / "good.safetensors")
    with pytest.raises(PathRefused, match="others can reach"):
        keep_adapter(replace(paths, local=False), good, tmp_path / "runs")
    with pytest.raises(PathRefused):
        keep_adapter(paths, good, Path("/etc"))
    assert not list((tmp_path / "runs").glob("**/*")) if (tmp_path / "runs").exists() else True
