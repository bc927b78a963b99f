"""The proof that a restructuring changed nothing: it must see a change, and nothing that is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from tools.same_bits.__main__ import main
from tools.same_bits.artefacts import artefacts
from tools.same_bits.cases import CASES, with_needs

ONE: dict[str, Any] = {
    "answers": [{"code": 0, "answer": {"num_pictures": 8, "loss": 0.25}}],
    "files": {"run/lora.safetensors": {"tensors": {"unet.up": "F16 2x4 aaaa", "unet.down": "F16 4x2 bbbb"}}},
}


def compare(folder: Path, before: dict[str, Any], after: dict[str, Any], *more: str) -> int:
    files = []
    for name, cases in (("before", before), ("after", after)):
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps({"about": {"commit": name}, "cases": cases}), encoding="utf-8")
    return main(["compare", *map(str, files), *more])


def changed(old: str, new: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(ONE).replace(old, new))
    assert result != ONE
    return result


def test_equal_records_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ONE | {"loss": float("nan")}
    assert compare(tmp_path, {"lora": ONE, "odd": odd}, {"lora": ONE, "odd": odd}) == 0
    assert "2 same, 0 differs, 0 missing, 0 new" in capsys.readouterr().out


@pytest.mark.parametrize(("old", "new"), [("aaaa", "aaab"), ("0.25", "0.25000001"), ("unet.up", "unet.over")])
def test_a_changed_value_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    assert compare(tmp_path, {"lora": ONE, "dora": ONE}, {"lora": ONE, "dora": changed(old, new)}) == 1
    out = capsys.readouterr().out
    assert "not the same: dora\n" in out and "1 same, 1 differs" in out
    assert old in out and new in out


def test_a_missing_case_fails_and_a_new_one_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, {"lora": ONE, "dora": ONE}, {"lora": ONE}) == 1
    assert "not the same: dora\n" in capsys.readouterr().out
    assert compare(tmp_path, {"lora": ONE, "dora": ONE}, {"lora": ONE}, "--only", "lora") == 0
    assert compare(tmp_path, {"lora": ONE}, {"lora": ONE, "dora": ONE}) == 0
    assert re.search(r"dora +new", capsys.readouterr().out)


def test_a_missing_or_a_further_file_fails(tmp_path: Path) -> None:
    fewer = ONE | {"files": {}}
    assert compare(tmp_path, {"lora": ONE}, {"lora": fewer}) == 1
    assert compare(tmp_path, {"lora": fewer}, {"lora": ONE}) == 1


def test_names_that_were_changed_on_purpose_can_be_told(tmp_path: Path) -> None:
    after = changed("num_pictures", "num_images")
    assert compare(tmp_path, {"lora": ONE}, {"lora": after}) == 1
    assert compare(tmp_path, {"lora": ONE}, {"lora": after}, "--renamed", "num_pictures=num_images") == 0
    assert compare(tmp_path, {"lora": ONE}, {"lora": after}, "--renamed", "pictures=images") == 1
    assert compare(tmp_path, {"lora": ONE}, {"lora": changed("0.25", "1")}, "--without", "loss") == 0


def write_run(folder: Path, at: str, value: float, shade: int) -> dict[str, Any]:
    """Write what a run writes, at a time and place of its own; return what is kept of it."""
    folder.mkdir()
    header = {
        "modelspec.date": at,
        "sshs_legacy_hash": at,
        "sdlora.config": json.dumps({"folder": str(folder), "rank": 2}),
    }
    save_file({"up": torch.full((2, 3), value)}, folder / "lora.safetensors", header)
    event = {"event": "Sampled", "time": float(at), "images_per_second": float(at), "grid": f"{folder}/a.png"}
    (folder / "events.jsonl").write_text(f"{json.dumps(event)}\n", encoding="utf-8")
    state = {"step": 2, "started_at": float(at), "digests": {"adapter": at}, "from_file": at * 64}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    words = PngInfo()
    words.add_text("parameters", "a bee")
    Image.new("L", (4, 4), shade).save(folder / "a.png", pnginfo=words)
    return artefacts(folder, {str(folder): "<work>"})


def test_times_and_places_do_not_count_and_values_do(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one", "1", 0.5, 7)
    assert set(first) == {"lora.safetensors", "events.jsonl", "state.json", "a.png"}
    assert first["lora.safetensors"]["header"] == {"sdlora.config": {"folder": "<work>", "rank": 2}}
    assert first["events.jsonl"] == [{"event": "Sampled", "grid": "<work>/a.png"}]
    assert first["state.json"] == {"step": 2}
    assert first["a.png"]["text"] == {"parameters": "a bee"}
    assert write_run(tmp_path / "other", "2", 0.5, 7) == first
    other = write_run(tmp_path / "third", "2", 0.50001, 8)
    assert other["lora.safetensors"]["tensors"] != first["lora.safetensors"]["tensors"]
    assert other["a.png"]["pixels"] != first["a.png"]["pixels"]


def test_a_case_comes_after_what_it_reads() -> None:
    assert len(CASES) > 80
    order = with_needs(list(CASES))
    assert sorted(order) == sorted(CASES)
    assert with_needs(["resumed-pissa"]) == ["pissa-all", "resumed-pissa"]
    for name, case in CASES.items():
        assert all(order.index(other) < order.index(name) for other in case.needs), name


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no case named lorra"):
        main(["record", "--output", str(tmp_path / "out.json"), "--only", "lorra"])
