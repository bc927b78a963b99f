"""Editing headers: tensors stay byte for byte, hashes stay right, broken values are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.commands.cli import main
from sdlora.errors import AdapterFileError, ConfigError
from sdlora.formats import editing
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.formats.table import FORMATS
from sdlora.inspecting.inspection import edit_adapter
from sdlora.tensor_file import data_sha256, read_header

from .adapters import LINEAR, SD1, file_of, models_of, random_adapter

CROSS = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")


def large_file(path: Path) -> Path:
    """Write a file of more than 1 MiB, where the legacy hash looks."""
    generator = torch.Generator().manual_seed(0)
    pairs = {
        ModuleKey("unet", f"down_blocks.{i}.attentions.0.proj_in"): LowRankPair(
            torch.randn(4, 30_000, generator=generator), torch.randn(20_000, 4, generator=generator), 2.0
        )
        for i in range(3)
    }
    adapter = AdapterFile(
        AdapterWeights(pairs), AdapterInfo("sd1", "ink", ("inkstyle",), {"ss_steps": "10", "own": "1"})
    )
    write_adapter(adapter, "webui", path, torch.float16, SD1)
    return path


def data_of(path: Path) -> bytes:
    return path.read_bytes()[read_header(path).data_offset :]


def kohya_hashes(path: Path) -> tuple[str, str]:
    """Return both hashes by way of safetensors' own writer, as kohya's scripts compute them."""
    with safe_open(path, "pt") as file:
        only_ss = {key: value for key, value in file.metadata().items() if key.startswith("ss_")}
    again = save(load_file(path), only_ss)
    return data_sha256(path, read_header(path).data_offset), hashlib.sha256(
        again[0x100000 : 0x100000 + 0x10000]
    ).hexdigest()[:8]


def test_entries_change_while_tensors_and_hashes_stay_right(tmp_path: Path) -> None:
    path = large_file(tmp_path / "a.safetensors")
    before, data = read_header(path), data_of(path)
    path.chmod(0o640)
    changes = edit_adapter(
        path,
        ["ss_training_comment=a longer comment = with signs, and ünicode", "modelspec.license=CC0-1.0"],
        ["own", "ss_steps"],
    )
    assert changes["own"] == {"before": "1", "after": None}
    assert changes["modelspec.license"] == {"before": None, "after": "CC0-1.0"}
    after = read_header(path)
    assert data_of(path) == data and after.tensors == before.tensors
    assert path.stat().st_mode & 0o777 == 0o640
    model_hash, legacy = kohya_hashes(path)
    assert after.metadata["sshs_model_hash"] == model_hash == before.metadata["sshs_model_hash"]
    assert after.metadata["sshs_legacy_hash"] == legacy != before.metadata["sshs_legacy_hash"]
    assert after.metadata["modelspec.hash_sha256"] == "0x" + model_hash
    expected = dict(before.metadata) | {
        "ss_training_comment": "a longer comment = with signs, and ünicode",
        "modelspec.license": "CC0-1.0",
        "sshs_legacy_hash": legacy,
    }
    del expected["own"], expected["ss_steps"]
    assert after.metadata == expected
    assert list(tmp_path.iterdir()) == [path]


def test_a_foreign_layout_keeps_its_order_and_gets_hashes_only_where_it_had_them(tmp_path: Path) -> None:
    from .adapters import raw_file

    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {  # up before down, as no writer of today lays it out
        f"{key}.lora_up.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        f"{key}.lora_down.weight": {"dtype": "F32", "shape": [1, 3], "data_offsets": [8, 20]},
    }
    for entries in ({"x": "1"}, {"x": "1", "sshs_model_hash": "stale"}):
        path = raw_file(tmp_path / "a.safetensors", {"__metadata__": entries, **tensors}, bytes(range(20)))
        edit_adapter(path, ["x=2"], [])
        header = read_header(path)
        assert data_of(path) == bytes(range(20)) and header.tensors[f"{key}.lora_up.weight"].start == 0
        digest = hashlib.sha256(bytes(range(20))).hexdigest()
        assert header.metadata == {"x": "2"} | ({"sshs_model_hash": digest} if len(entries) == 2 else {})


def test_trigger_words_and_phrase_follow_each_other(tmp_path: Path) -> None:
    path = large_file(tmp_path / "a.safetensors")
    edit_adapter(path, ["modelspec.trigger_phrase=brush, wet ink"], [])
    assert read_adapter(path).info.trigger_words == ("brush", "wet ink")
    edit_adapter(path, ['sdlora.trigger_words=["pen, fine"]'], [])
    assert read_adapter(path).info.trigger_words == ("pen, fine",)
    assert read_header(path).metadata["modelspec.trigger_phrase"] == "pen, fine"


def test_a_thumbnail_may_be_given_as_an_image(tmp_path: Path) -> None:
    path = large_file(tmp_path / "a.safetensors")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "p.png")
    edit_adapter(path, [f"modelspec.thumbnail={tmp_path / 'p.png'}"], [])
    assert read_header(path).metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")


def test_every_file_of_a_peft_folder_is_edited(tmp_path: Path) -> None:
    weights = random_adapter(models_of(SD1), LINEAR)
    write_adapter(file_of(weights), "peft", tmp_path / "a", torch.float32, SD1)
    edit_adapter(tmp_path / "a", ["modelspec.author=me"], [])
    headers = [read_header(file) for file in sorted((tmp_path / "a").rglob("*.safetensors"))]
    assert [header.metadata["modelspec.author"] for header in headers] == ["me", "me"]
    assert FORMATS["peft"].is_folder and len(read_adapter(tmp_path / "a").weights) == len(weights)


REFUSED = {
    "sshs_model_hash=0": "follows from the tensors",
    "sshs_other=0": "follows from the tensors",
    "ss_network_dim=4": "follows from the tensors",
    "sdlora.alphas={}": "follows from the tensors",
    "lora_adapter_metadata={}": "follows from the tensors",
    "format=pt": "how the tensors are stored",
    "sdlora.config={}": "settings of the training",
    "__metadata__=1": "is not a name for an entry",
    "with space=1": "is not a name for an entry",
    "=1": "is not a name for an entry",
    "plain": "give KEY=VALUE",
    "x=\x1b[2J": "control characters",
    "x=\udc80": "control characters",
    "x={broken": "not JSON",
    "ss_tag_frequency=[]": "JSON object of objects",
    'ss_tag_frequency={"a": {"b": "c"}}': "whole numbers",
    "ss_bucket_info=None": "JSON object of objects",
    "ss_datasets={}": "JSON list",
    "ss_v2=yes": "True, False",
    "ss_v2=True": "the layers are those of sd1; give False",
    "ss_base_model_version=sd3": "must be one of",
    "ss_base_model_version=sdxl_base_v1-0": "the layers are those of sd1",
    "modelspec.architecture=stable-diffusion-xl-v1-base/lora": "the layers are those of sd1",
    "ss_training_started_at=yesterday": "must be a number",
    "ss_output_name=../../evil": "short name",
    "ss_output_name=None": "WebUI cannot use",
    "sdlora.trigger_words=ink": "JSON list of words",
    "sdlora.preferred_strength=20": "between 0 and 10",
    "sdlora.preferred_strength=nan": "finite",
    "modelspec.date=soon": "must be a date",
    "modelspec.resolution=512": "WIDTHxHEIGHT",
    "modelspec.prediction_type=noise": "epsilon, v",
    "modelspec.thumbnail=missing.png": "no such image",
    "modelspec.thumbnail=data:text/html,x": "data URL of an image",
    "modelspec.title= ": "must not be empty",
}


@pytest.fixture(scope="module")
def sd1_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit") / "a.safetensors"
    weights = AdapterWeights({CROSS: LowRankPair(torch.ones(1, 768), torch.ones(4, 1), 1.0)})
    write_adapter(AdapterFile(weights, AdapterInfo(name="ink")), "webui", path, torch.float32, SD1)
    return path


@pytest.mark.parametrize("assignment", REFUSED)
def test_what_may_not_be_set_is_refused_with_the_reason(assignment: str, sd1_file: Path) -> None:
    before = sd1_file.read_bytes()
    with pytest.raises(ConfigError, match=REFUSED[assignment]) as caught:
        edit_adapter(sd1_file, [assignment], [])
    assert "\x1b" not in str(caught.value)
    assert sd1_file.read_bytes() == before


def test_entries_that_tell_the_family_are_set_together_where_the_layers_do_not(tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    weights = AdapterWeights({CROSS: LowRankPair(torch.ones(1, 12), torch.ones(4, 1), 1.0)})
    write_adapter(AdapterFile(weights), "webui", path, torch.float32, SD1)
    for entry in (
        "ss_v2=True",
        "ss_base_model_version=sd_v2",
        "modelspec.architecture=stable-diffusion-v2-512/lora",
    ):
        with pytest.raises(ConfigError, match=r"contradict itself.*set them together"):
            edit_adapter(path, [entry], [])
    edit_adapter(
        path,
        ["ss_v2=True", "ss_base_model_version=sd_v2", "modelspec.architecture=stable-diffusion-v2-512/lora"],
        [],
    )
    assert read_header(path).metadata["ss_v2"] == "True"


def test_all_problems_are_told_together(sd1_file: Path) -> None:
    with pytest.raises(ConfigError, match="3 problems") as caught:
        edit_adapter(sd1_file, ["format=x"], ["missing", "ss_v2"])
    for part in ("how the tensors are stored", "is not in", "tells programs the family"):
        assert part in str(caught.value)


def test_values_and_headers_beyond_what_readers_take_are_refused(
    sd1_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sd1_file.read_bytes()
    with pytest.raises(ConfigError, match="shorten it"):
        edit_adapter(sd1_file, ["x=" + "y" * 5_000_000], [])
    monkeypatch.setattr(editing, "MAX_HEADER_BYTES", 5_000)
    with pytest.raises(ConfigError, match="set shorter values"):
        edit_adapter(sd1_file, ["x=" + "y" * 5_000], [])
    assert sd1_file.read_bytes() == before and list(sd1_file.parent.iterdir()) == [sd1_file]


def test_only_adapters_are_edited(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="full model"):
        edit_adapter(tmp_path / "a.safetensors", ["x=1"], [])


def test_the_command_edits_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = large_file(tmp_path / "a.safetensors")
    assert (
        main(["inspect", str(path), "--set", "modelspec.license=CC0-1.0", "--remove", "own", "--json"]) == 0
    )
    out = capsys.readouterr().out
    answer = json.loads(out.splitlines()[-1])
    assert (
        answer["edited"]["modelspec.license"]["after"] == "CC0-1.0"
        and answer["settings"]["licence"] == "CC0-1.0"
    )
    assert main(["inspect", str(path), "--set", "format=x"]) == 2
    assert "cannot be changed" in capsys.readouterr().err
