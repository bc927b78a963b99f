"""Exporting: what is written, what is proven, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from formats.adapters import (
    ATTENTION,
    EVERYTHING,
    LINEAR,
    SD1,
    SD2,
    SDXL,
    assert_same,
    file_of,
    models_of,
    random_adapter,
    tiny_text_encoder,
    tiny_unet,
)
from PIL import Image
from safetensors.torch import load_file

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.commands.cli import main
from sdlora.config.schema import Config, Precision
from sdlora.config.toml import save_config
from sdlora.errors import AdapterFileError, ConfigError, OutputError
from sdlora.exporting.export import (
    export_adapter,
    find_lora_folder,
    open_source,
    write_finished,
)
from sdlora.families.facts import FamilyInfo
from sdlora.families.sd1 import StableDiffusion1
from sdlora.families.table import FAMILIES
from sdlora.formats import webui
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.formats.format_code import ReadBack
from sdlora.formats.proof import compare
from sdlora.formats.table import written_formats
from sdlora.number_formats import PRECISIONS, dtype_of

INFO = StableDiffusion1.info


@pytest.fixture(scope="module")
def weights() -> AdapterWeights:
    return random_adapter(
        {"unet": tiny_unet(layers_per_block=1), "text_encoder": tiny_text_encoder()}, LINEAR, scales=(0.5,)
    )


@pytest.fixture
def source(weights: AdapterWeights, tmp_path: Path) -> Path:
    path = tmp_path / "source" / "ink.safetensors"
    write_adapter(file_of(weights), "webui", path, torch.float32, INFO)
    return path


def image_file(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def run_folder(folder: Path, weights: AdapterWeights, steps: tuple[int, ...], finished: int | None) -> Path:
    save_config(
        Config().with_values({"output.name": "my style", "output.dtype": "fp16"}), folder / "config.toml"
    )
    for step in steps:
        adapter = AdapterFile(weights, AdapterInfo("sd1", "my style", ("inkstyle",), {"ss_steps": str(step)}))
        target = folder / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors"
        write_adapter(adapter, "webui", target, torch.float32, INFO)
    if finished is not None:
        entries = {
            "ss_steps": str(finished),
            "sdlora.preferred_strength": "0.8",
            "modelspec.description": "ink",
        }
        adapter = AdapterFile(weights, AdapterInfo("sd1", "my style", ("inkstyle",), entries))
        write_adapter(adapter, "webui", folder / "my style.safetensors", torch.float16, INFO)
    return folder


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("format", written_formats())
def test_every_format_and_number_format_is_proven(
    format: str, dtype: Precision, source: Path, weights: AdapterWeights, tmp_path: Path
) -> None:
    report = export_adapter(source, format, tmp_path / "out", dtype=dtype)
    proof = report.proof
    assert proof is not None
    assert proof.num_modules == len(weights)
    assert proof.num_keys == len(weights) * (3 if format == "webui" else 2)
    assert proof.relative_difference <= proof.tolerance
    assert (proof.largest_difference == 0) == (dtype == "fp32")
    assert proof.tolerance < {"fp32": 2e-6, "fp16": 1e-3, "bf16": 8e-3}[dtype]
    assert proof.read_by == ("sdlora", "peft" if format == "peft" else "diffusers")
    assert report.proof_line().startswith(
        f"{len(weights)} modules, {proof.num_keys} keys, largest delta difference"
    )
    assert all(file.is_file() for file in report.files) and len(report.files) >= 1
    json.dumps(report.to_dict())
    adapter = report.files[0] if format != "peft" else tmp_path / "out" / "ink-peft"
    compare(weights, read_adapter(adapter).weights, dtype_of(dtype), "here")
    assert (
        sorted(p.name for p in (tmp_path / "out").iterdir())
        == {
            "webui": ["ink.json", "ink.safetensors"],
            "diffusers": ["ink-diffusers.safetensors"],
            "peft": ["ink-peft"],
        }[format]
    )


def test_the_bound_is_tight_enough_to_see_one_wrong_unit(weights: AdapterWeights) -> None:
    key = next(key for key, _ in weights.items())
    for dtype, step in ((torch.float16, 2**-9), (torch.bfloat16, 2**-6), (torch.float32, 2**-16)):
        right = weights.to(dtype)
        compare(weights, right, dtype, "here")
        pair = right.pairs[key]
        wrong = AdapterWeights({**right.pairs, key: LowRankPair(pair.down, pair.up * (1 + step), pair.alpha)})
        with pytest.raises(AdapterFileError, match="differs by"):
            compare(weights, wrong, dtype, "here")


def test_a_lost_alpha_or_module_is_seen(weights: AdapterWeights) -> None:
    key, pair = next(iter(weights.items()))
    unscaled = {**weights.pairs, key: LowRankPair(pair.down, pair.up, float(pair.rank))}
    with pytest.raises(AdapterFileError, match=rf"the update of `{key.component}\.{key.path}` differs"):
        compare(weights, AdapterWeights(unscaled), torch.float16, "here")
    fewer = {k: p for k, p in weights.items() if k != key}
    with pytest.raises(AdapterFileError, match="1 modules are not the same"):
        compare(weights, AdapterWeights(fewer), torch.float16, "here")


def test_a_failed_proof_leaves_nothing_and_keeps_the_old_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "ink.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"old")
    real = webui.write

    def damaged(adapter: AdapterFile, path: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
        key, pair = next(iter(adapter.weights.items()))
        pairs = {**adapter.weights.pairs, key: LowRankPair(pair.down, pair.up * 1.5, pair.alpha)}
        return real(AdapterFile(AdapterWeights(pairs), adapter.info), path, dtype, info)

    monkeypatch.setattr(webui, "CODE", dataclasses.replace(webui.CODE, write=damaged))
    with pytest.raises(AdapterFileError, match=r"out/ink\.safetensors: the update of"):
        export_adapter(source, "webui", tmp_path / "out", overwrite=True)
    assert [p.name for p in target.parent.iterdir()] == ["ink.safetensors"] and target.read_bytes() == b"old"


def test_nothing_is_overwritten_unless_asked(source: Path, tmp_path: Path) -> None:
    export_adapter(source, "webui", tmp_path / "out", preview=image_file(tmp_path / "p.png"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["ink.json", "ink.png", "ink.safetensors"]
    for kept in before:
        for name in set(before) - {kept}:
            (tmp_path / "out" / name).unlink(missing_ok=True)
        with pytest.raises(OutputError, match=rf"{kept}: exists; nothing was overwritten"):
            export_adapter(source, "webui", tmp_path / "out", dtype="bf16", preview=tmp_path / "p.png")
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {kept: before[kept]}
        for name, data in before.items():
            (tmp_path / "out" / name).write_bytes(data)
    export_adapter(source, "webui", tmp_path / "out", dtype="bf16", overwrite=True)
    state = load_file(tmp_path / "out" / "ink.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16, torch.float32}


def test_a_finished_run_is_exported_from_its_fp32_masters(weights: AdapterWeights, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", weights, (100, 200), finished=200)
    image_file(run / "samples" / "step-000200-1.png")
    report = export_adapter(run, "webui", tmp_path / "out", dtype="fp32")
    assert report.source.endswith("step-000200/adapter.safetensors")
    assert_same(read_adapter(tmp_path / "out" / "my style.safetensors").weights, weights)
    card = json.loads((tmp_path / "out" / "my style.json").read_text())
    assert card["activation text"] == "inkstyle" and card["sd version"] == "SD1"
    assert card["preferred weight"] == 0.8 and card["description"] == "ink"
    assert (tmp_path / "out" / "my style.png").read_bytes() == (
        run / "samples" / "step-000200-1.png"
    ).read_bytes()
    default = export_adapter(run, "diffusers", tmp_path / "out")
    assert default.dtype == "fp16"


def test_a_checkpoint_of_another_training_is_not_taken_for_the_finished_file(
    weights: AdapterWeights, tmp_path: Path
) -> None:
    run = run_folder(tmp_path / "run", weights, (), finished=200)
    other = random_adapter({"unet": tiny_unet()}, ATTENTION, seed=5)
    target = run / "checkpoints" / "step-000200" / "adapter.safetensors"
    write_adapter(file_of(other), "webui", target, torch.float32, INFO)
    assert open_source(run).path == run / "my style.safetensors"


def test_an_unfinished_run_gives_its_newest_checkpoint(weights: AdapterWeights, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", weights, (100, 200, 1000), finished=None)
    assert export_adapter(run, "webui", tmp_path / "out").source.endswith("step-001000/adapter.safetensors")
    empty = run_folder(tmp_path / "empty", weights, (), finished=None)
    with pytest.raises(AdapterFileError, match=r"holds neither my style\.safetensors nor a checkpoint"):
        export_adapter(empty, "webui", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_it_goes_straight_into_a_webui(source: Path, tmp_path: Path) -> None:
    lora = tmp_path / "webui" / "models" / "Lora"
    lora.mkdir(parents=True)
    report = export_adapter(source, "webui", tmp_path / "out", webui_folder=tmp_path / "webui")
    assert sorted(p.name for p in lora.iterdir()) == ["ink.json", "ink.safetensors"]
    assert (lora / "ink.safetensors").read_bytes() == (tmp_path / "out" / "ink.safetensors").read_bytes()
    assert lora / "ink.safetensors" in report.files
    with pytest.raises(OutputError, match="exists"):
        export_adapter(source, "webui", tmp_path / "out2", webui_folder=lora)
    assert not (tmp_path / "out2").exists()
    alone = export_adapter(source, "webui", webui_folder=lora, name="second")
    assert alone.files == (lora / "second.safetensors", lora / "second.json")
    assert read_adapter(lora / "second.safetensors").info.name == "second"


def test_comfyuis_folder_of_adapters_is_found(tmp_path: Path) -> None:
    loras = tmp_path / "ComfyUI" / "models" / "loras"
    loras.mkdir(parents=True)
    assert find_lora_folder(tmp_path / "ComfyUI") == find_lora_folder(loras) == loras


def test_other_folders_are_no_webui(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is not a WebUI folder; give the folder that holds webui\.py"):
        find_lora_folder(tmp_path)
    with pytest.raises(OutputError, match="is not a folder"):
        find_lora_folder(tmp_path / "missing")
    (tmp_path / "models").mkdir()
    (tmp_path / "webui.py").touch()
    assert find_lora_folder(tmp_path) == tmp_path / "models" / "Lora"


def test_bad_requests_are_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="give one of webui, diffusers, peft"):
        export_adapter(source, "ckpt", out)
    with pytest.raises(ConfigError, match="give one of fp32, bf16, fp16"):
        export_adapter(source, "webui", out, dtype="int8")  # type: ignore[arg-type]
    for name in ("../x", "a/b", "CON", "nul.x", "dot.", "space ", ".hidden", "", "a" * 201, "a\x1b"):
        with pytest.raises(ConfigError, match="give the name of a file without its ending"):
            export_adapter(source, "webui", out, name=name)
    with pytest.raises(ConfigError, match="WebUI reads only its own format"):
        export_adapter(source, "peft", out, webui_folder=tmp_path)
    with pytest.raises(ConfigError, match="needs a place"):
        export_adapter(source, "webui")
    with pytest.raises(OutputError, match="is a file, but export needs a folder"):
        export_adapter(source, "webui", image_file(tmp_path / "p.png"))
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(OutputError, match="not a usable preview"):
        export_adapter(source, "webui", out, preview=tmp_path / "broken.png")
    with pytest.raises(AdapterFileError, match="no such file"):
        export_adapter(tmp_path / "none.safetensors", "webui", out)
    assert not out.exists() or list(out.iterdir()) == []


def test_an_adapter_of_unknown_or_unsupported_family_is_refused(tmp_path: Path) -> None:
    pair = LowRankPair(torch.ones(1, 2048), torch.ones(4, 1), 1.0)
    key = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    write_adapter(AdapterFile(AdapterWeights({key: pair})), "peft", tmp_path / "wide", torch.float32, SD1)
    if "sdxl" not in FAMILIES:
        with pytest.raises(AdapterFileError, match="is for the model family `sdxl`"):
            export_adapter(tmp_path / "wide", "webui", tmp_path / "out")
    from safetensors.torch import save_file

    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 3), f"{name}.lora_up.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "te.safetensors")
    with pytest.raises(AdapterFileError, match="does not tell which base model it is for"):
        export_adapter(tmp_path / "te.safetensors", "webui", tmp_path / "out")


def test_a_header_cannot_choose_where_files_go(weights: AdapterWeights, tmp_path: Path) -> None:
    path = tmp_path / "source" / "adapter.safetensors"
    nasty = AdapterFile(weights, AdapterInfo("sd1", "../../evil", (), {}))
    write_adapter(nasty, "webui", path, torch.float32, INFO)
    report = export_adapter(path, "webui", tmp_path / "out")
    assert report.files[0] == tmp_path / "out" / "adapter.safetensors"


def test_the_trainer_writes_and_replaces_a_proven_file(weights: AdapterWeights, tmp_path: Path) -> None:
    target = tmp_path / "my.style.safetensors"
    for _ in range(2):
        report = write_finished(
            file_of(weights), target, "fp16", INFO, image_file(tmp_path / "s.png", (1500, 900))
        )
    assert [file.name for file in report.files] == ["my.style.safetensors", "my.style.png", "my.style.json"]
    with Image.open(tmp_path / "my.style.png") as image:
        assert image.size == (1024, 614)
    assert report.proof is not None and report.proof.read_by == ("sdlora", "diffusers")
    assert report.model_hash == read_adapter(target).info.metadata["sshs_model_hash"]


def test_limits_of_other_programs_are_reported(tmp_path: Path) -> None:
    uneven = random_adapter({"unet": tiny_unet()}, EVERYTHING, ranks=(3,), scales=(1.0, 1.1))
    report = write_finished(file_of(uneven), tmp_path / "a.safetensors", "fp32", INFO)
    assert report.proof is not None and report.proof.read_by == ("sdlora",)
    assert [support.client for support in report.clients if not support.full] == ["diffusers"]


def test_without_verifying_nothing_is_read_back(source: Path, tmp_path: Path) -> None:
    report = export_adapter(source, "webui", tmp_path / "out", verify=False)
    assert report.proof is None and "not read back" in report.proof_line()
    answer = json.loads(json.dumps(report.to_dict()))
    assert "read_by" not in answer and len(answer["clients"]) == 6
    assert (tmp_path / "out" / "ink.safetensors").is_file()


def test_a_reader_that_sees_other_numbers_stops_the_export(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(path: Path, outline: AdapterWeights, info: FamilyInfo) -> AdapterWeights:
        seen = read_adapter(path).weights
        return AdapterWeights({k: LowRankPair(p.down, p.up, p.alpha / 2) for k, p in seen.items()})

    def without_first(path: Path, outline: AdapterWeights, info: FamilyInfo) -> AdapterWeights:
        return AdapterWeights(dict(list(read_adapter(path).weights.items())[1:]))

    for reader, message in ((halved, "differs by"), (without_first, "modules are not the same")):
        code = dataclasses.replace(webui.CODE, read_back=ReadBack("diffusers", reader))
        monkeypatch.setattr(webui, "CODE", code)
        with pytest.raises(AdapterFileError, match=rf"read by diffusers\).*{message}"):
            export_adapter(source, "webui", tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.long
def test_a_private_export_tells_nothing_of_the_images(weights: AdapterWeights, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    entries = {
        "ss_tag_frequency": '{"secret set": {"secret tag": 3}}',
        "ss_dataset_dirs": '{"secret set": {"n_repeats": 1, "img_count": 3}}',
        "ss_sd_model_name": "secret-base.safetensors",
        "sdlora.config": '{"sample": {"prompts": ["secret prompt"]}}',
        "other_trainer": "secret settings",
        "ss_steps": "300",
        "modelspec.license": "CC-BY-4.0",
    }
    path = tmp_path / "source" / "ink.safetensors"
    adapter = AdapterFile(weights, AdapterInfo("sd1", "ink", ("inkstyle",), entries))
    write_adapter(adapter, "webui", path, torch.float16, INFO)
    notes = PngInfo()
    notes.add_text("parameters", "secret prompt, <lora:ink:1>")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "preview.png", pnginfo=notes)
    for format in written_formats():
        out = tmp_path / format
        export_adapter(path, format, out, private=True, preview=tmp_path / "preview.png")
        files = [file for file in out.rglob("*") if file.is_file()]
        assert len(files) >= (3 if format == "webui" else 1)
        assert [file for file in files if b"secret" in file.read_bytes()] == []
    header = read_adapter(tmp_path / "webui" / "ink.safetensors").info.metadata
    assert header["ss_steps"] == "300" and header["modelspec.license"] == "CC-BY-4.0"
    assert header["ss_base_model_version"] == "sd_v1" and header["ss_network_dim"] == "4"
    assert header["modelspec.trigger_phrase"] == "inkstyle" and "sshs_model_hash" in header
    public = export_adapter(path, "webui", tmp_path / "public", preview=tmp_path / "preview.png")
    assert sum(b"secret" in file.read_bytes() for file in public.files) == 3


def test_a_preview_that_is_there_under_another_name_stays_the_only_one(source: Path, tmp_path: Path) -> None:
    mine = image_file(tmp_path / "out" / "ink.preview.jpg")
    report = export_adapter(source, "webui", tmp_path / "out", preview=image_file(tmp_path / "p.png"))
    assert mine.is_file() and not (tmp_path / "out" / "ink.png").exists()
    assert [file.name for file in report.files] == ["ink.safetensors", "ink.json"]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("format", written_formats())
@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.name)
def test_every_family_goes_to_every_format_unchanged(
    family: FamilyInfo, format: str, dtype: Precision, tmp_path: Path
) -> None:
    whole = random_adapter(
        models_of(family), EVERYTHING, ranks=(4, 2, 8), scales=(0.5, 1.0, 0.25), dtype=dtype_of(dtype)
    )
    attention = {key for key, _ in whole.items() if key.path.endswith(("_proj", "fc1"))}
    weights = AdapterWeights({k: p for n, (k, p) in enumerate(whole.items()) if k in attention or n % 5 == 0})
    source = tmp_path / "ink.safetensors"
    adapter = AdapterFile(weights, AdapterInfo(family.name, "ink", ("inkstyle",)))
    write_adapter(adapter, "webui", source, dtype_of(dtype), family)
    report = export_adapter(source, format, tmp_path / "out")
    assert report.dtype == dtype and report.proof is not None
    assert report.proof.largest_difference == 0.0 and report.proof.num_modules == len(weights)
    assert report.proof.read_by == ("sdlora", "peft" if format == "peft" else "diffusers")
    assert_same(read_adapter(report.adapter).weights, weights)
    assert read_adapter(report.adapter).info.family == family.name


def test_the_command_takes_private_and_no_verify(
    weights: AdapterWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "source" / "ink.safetensors"
    adapter = AdapterFile(weights, AdapterInfo("sd1", "ink", (), {"ss_sd_model_name": "secret-base"}))
    write_adapter(adapter, "webui", path, torch.float32, INFO)
    words = ["export", str(path), "--output", str(tmp_path / "out"), "--private", "--no-verify", "--json"]
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["proof"] == "not read back (--no-verify)" and "largest_difference" not in answer
    assert "ss_sd_model_name" not in read_adapter(tmp_path / "out" / "ink.safetensors").info.metadata
