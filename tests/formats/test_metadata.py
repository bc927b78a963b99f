"""The header: what WebUI and kohya's tools look for, hashes computed another way, no private paths."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.config.schema import Config
from sdlora.errors import OutputError
from sdlora.families.facts import FamilyInfo
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.formats.metadata import MAX_THUMBNAIL_BYTES, TrainingFacts, build_header, thumbnail
from sdlora.tensor_file import read_header

from .adapters import SD1, SD2, SDXL


def adapter_of(info: AdapterInfo | None = None, width: int = 4, rank: int = 2) -> AdapterFile:
    generator = torch.Generator().manual_seed(0)
    pair = LowRankPair(
        torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator), 1.0
    )
    return AdapterFile(
        AdapterWeights({ModuleKey("unet", "mid_block.attentions.0.proj_in"): pair}), info or AdapterInfo()
    )


def config() -> Config:
    return Config().with_values(
        {
            "data.folder": "/home/jane/secret client/ink set",
            "data.resolution": 64,
            "data.cache_folder": "/home/jane/.cache/sdlora",
            "model.base": "/home/jane/models/base.safetensors",
            "output.folder": "/home/jane/runs/ink",
            "output.license": "CC-BY-4.0",
            "output.description": "thick ink",
            "training.batch_size": 2,
            "training.gradient_accumulation": 3,
            "training.precision": "bf16",
            "training.seed": 7,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 5,
            "model.clip_skip": 2,
        }
    )


@pytest.fixture
def preview(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (700, 900, 3), dtype=torch.uint8).numpy()  # hardest to compress
    Image.fromarray(noise).save(tmp_path / "preview.png")
    return tmp_path / "preview.png"


def facts(preview: Path | None = None) -> TrainingFacts:
    return TrainingFacts(
        family=SD1,
        name="ink",
        base_title="mini base",
        base_digest="ab" * 32,
        config=config(),
        prediction_type="epsilon",
        steps=300,
        epochs=12.5,
        num_images=40,
        buckets={(64, 64): 30, (48, 80): 10},
        tag_frequency={"/home/jane/secret client/ink set": {"inkstyle": 40, "a cat": 2}},
        started_at=1764000000.0,
        finished_at=1764000300.25,
        final_loss=0.125,
        trigger_words=("inkstyle",),
        preview=preview,
        sdlora_version="0.1.0",
    )


def test_the_entries_that_webui_and_kohya_read(preview: Path) -> None:
    header = build_header(facts(preview))
    assert all(isinstance(value, str) for value in header.values())
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_output_name": "ink",
        "ss_sd_model_name": "mini base",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_sd_model_hash": "None",
        "ss_vae_name": "None",
        "ss_resolution": "(64, 64)",
        "ss_clip_skip": "2",
        "ss_num_train_images": "40",
        "ss_num_reg_images": "0",
        "ss_steps": "300",
        "ss_epoch": "13",
        "ss_learning_rate": "0.001",
        "ss_text_encoder_lr": "None",
        "ss_lr_scheduler": "cosine",
        "ss_total_batch_size": "6",
        "ss_mixed_precision": "bf16",
        "ss_seed": "7",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "None",
        "ss_cache_latents": "True",
        "ss_training_started_at": "1764000000.0",
        "ss_training_finished_at": "1764000300.25",
        "ss_training_comment": "thick ink",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "ink",
        "modelspec.resolution": "64x64",
        "modelspec.date": "2025-11-24T16:05:00+00:00",
        "modelspec.trigger_phrase": "inkstyle",
        "modelspec.license": "CC-BY-4.0",
        "modelspec.prediction_type": "epsilon",
        "modelspec.encoder_layer": "2",
        "sdlora.final_loss": "0.125",
    }
    assert {key: header.get(key) for key in expected} == expected
    assert json.loads(header["ss_tag_frequency"]) == {"ink set": {"inkstyle": 40, "a cat": 2}}
    assert json.loads(header["ss_dataset_dirs"]) == {"ink set": {"n_repeats": 1, "img_count": 40}}
    buckets = json.loads(header["ss_bucket_info"])["buckets"]
    assert {"resolution": [80, 48], "count": 10} in buckets.values() and len(buckets) == 2


def test_what_the_settings_say_of_captions_crops_and_the_schedule_is_told(preview: Path) -> None:
    plain = build_header(facts(preview))
    assert (plain["ss_zero_terminal_snr"], plain["ss_vae_name"]) == ("False", "None")
    assert (plain["ss_shuffle_caption"], plain["ss_random_crop"]) == ("False", "False")
    changed = config().with_values(
        {
            "model.vae": "/home/jane/models/soft.vae.safetensors",
            "data.shuffle_tags": True,
            "data.keep_tags": 2,
            "data.tag_dropout": 0.25,
            "data.crop": "random",
            "data.colour_jitter": 0.1,
            "data.upscale": False,
            "data.prior_preservation": 0.5,
        }
    )
    header = build_header(dataclasses.replace(facts(), config=changed, zero_terminal_snr=True))
    expected = {
        "ss_zero_terminal_snr": "True",
        "ss_vae_name": "soft.vae.safetensors",
        "ss_shuffle_caption": "True",
        "ss_keep_tokens": "2",
        "ss_caption_tag_dropout_rate": "0.25",
        "ss_random_crop": "True",
        "ss_color_aug": "True",
        "ss_bucket_no_upscale": "True",
        "ss_prior_loss_weight": "0.5",
    }
    assert {key: header.get(key) for key in expected} == expected


def test_no_private_path_gets_into_the_header(preview: Path) -> None:
    header = build_header(facts(preview))
    assert [key for key, value in header.items() if "jane" in value or "secret" in value] == []
    settings = json.loads(header["sdlora.config"])
    assert settings["data"]["folder"] == "ink set" and settings["model"]["base"] == "base.safetensors"
    assert settings["training"]["seed"] == 7 and len(settings) == len(Config.model_fields)


def test_hub_names_stay_whole() -> None:
    known = TrainingFacts(config=Config().with_values({"model.base": "some-org/some-model"}))
    assert json.loads(build_header(known)["sdlora.config"])["model"]["base"] == "some-org/some-model"


def test_nothing_known_gives_a_header_that_webui_can_show() -> None:
    header = build_header(TrainingFacts())
    # WebUI walks through these and turns those into numbers without looking
    for key in ("ss_dataset_dirs", "ss_bucket_info", "ss_tag_frequency", "ss_training_started_at"):
        assert header.get(key) != "None"


def test_v_prediction_is_marked_as_kohya_marks_it() -> None:
    versions = {}
    for family in (SD1, SD2, SDXL):
        header = build_header(TrainingFacts(family=family, prediction_type="v_prediction"))
        versions[family.name] = header["ss_base_model_version"]
        assert header["modelspec.prediction_type"] == "v"
    assert versions == {"sd1": "sd_v1_v", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}


@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.name)
def test_a_file_without_known_training_still_tells_its_family_and_size(
    family: FamilyInfo, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(), "webui", path, torch.float16, family)
    header = read_header(path).metadata
    assert header["ss_base_model_version"] == family.header.version
    assert header["ss_v2"] == str(family.header.is_v2)
    assert header["modelspec.architecture"] == family.header.architecture
    assert (header["ss_network_module"], header["ss_network_dim"]) == ("networks.lora", "2")
    assert header["ss_network_alpha"] == "1"
    assert "lora_adapter_metadata" not in header
    assert read_adapter(path).info.family == family.name


def test_hashes_agree_with_kohyas_computation(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = build_header(facts()) | {"sshs_model_hash": "stale", "ümlaut": "é\n\x01\x7f"}
    write_adapter(
        adapter_of(AdapterInfo(metadata=metadata), width=50_000, rank=4), "webui", path, torch.float32, SD1
    )
    raw = path.read_bytes()
    assert len(raw) > 0x110000, "the legacy hash looks at 64 KiB from 1 MiB on"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    length = int.from_bytes(raw[:8], "little")
    assert header["sshs_model_hash"] == hashlib.sha256(raw[8 + length :]).hexdigest()
    only_ss = {key: value for key, value in header.items() if key.startswith("ss_")}
    kohya = save(load_file(path), only_ss)  # by safetensors' own writer
    assert header["sshs_legacy_hash"] == hashlib.sha256(kohya[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert header["modelspec.hash_sha256"] == "0x" + header["sshs_model_hash"]
    assert header["ümlaut"] == "é\n\x01\x7f"


def test_the_legacy_hash_of_a_small_file_is_that_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(), "webui", path, torch.float32, SD1)
    assert read_header(path).metadata["sshs_legacy_hash"] == "e3b0c442"


def test_the_model_hash_does_not_depend_on_the_header(tmp_path: Path) -> None:
    hashes = set()
    for number, info in enumerate((AdapterInfo(), AdapterInfo(name="x", metadata={"ss_seed": "1"}))):
        path = tmp_path / f"{number}.safetensors"
        write_adapter(adapter_of(info), "webui", path, torch.float32, SD1)
        hashes.add(read_header(path).metadata["sshs_model_hash"])
    assert len(hashes) == 1


def test_our_files_have_the_layout_of_safetensors_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(), "webui", path, torch.float16, SD1)  # fp16 factors beside fp32 alphas
    with safe_open(path, "pt") as file:
        other = save(load_file(path), file.metadata())
    ours = path.read_bytes()
    length = int.from_bytes(ours[:8], "little")
    assert ours[:8] == other[:8] and ours[8 + length :] == other[8 + length :]
    assert json.loads(ours[8 : 8 + length]) == json.loads(other[8 : 8 + length])


def test_the_thumbnail_is_a_small_jpeg(preview: Path) -> None:
    url = thumbnail(preview)
    assert len(url) <= MAX_THUMBNAIL_BYTES
    start, _, data = url.partition(",")
    assert start == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "JPEG" and max(image.size) <= 512
        assert abs(image.width / image.height - 900 / 700) < 0.02


def test_a_preview_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(OutputError, match=r"x\.png: is not a usable preview image"):
        thumbnail(tmp_path / "x.png")


def test_mixed_sizes_and_convolutions_are_told_as_kohya_does(tmp_path: Path) -> None:
    pairs = {
        ModuleKey("unet", "mid_block.attentions.0.proj_in"): LowRankPair(
            torch.ones(2, 4), torch.ones(4, 2), 2.0
        ),
        ModuleKey("unet", "mid_block.attentions.0.proj_out"): LowRankPair(
            torch.ones(3, 4), torch.ones(4, 3), 2.0
        ),
        ModuleKey("unet", "mid_block.resnets.0.conv1"): LowRankPair(
            torch.ones(1, 4, 3, 3), torch.ones(4, 1, 1, 1), 2.0
        ),
    }
    path = tmp_path / "a.safetensors"
    write_adapter(AdapterFile(AdapterWeights(pairs)), "webui", path, torch.float32, SD1)
    header = read_header(path).metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "2")
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "2"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"sdlora.trigger_words": '["a, b", "c"]', "modelspec.trigger_phrase": "x"}, ("a, b", "c")),
        ({"sdlora.trigger_words": "broken", "modelspec.trigger_phrase": "x, y"}, ("x", "y")),
        ({"modelspec.trigger_phrase": "None"}, ()),
        ({}, ()),
    ],
)
def test_trigger_words_are_found_where_trainers_put_them(
    entries: dict[str, str], words: tuple[str, ...]
) -> None:
    from sdlora.formats.metadata import trigger_words

    assert trigger_words(entries) == words


def test_the_family_follows_the_layers_before_the_header(tmp_path: Path) -> None:
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (128, "sd2")):
        pair = LowRankPair(torch.ones(1, width), torch.ones(4, 1), 1.0)
        key = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
        path = tmp_path / f"{width}.safetensors"
        write_adapter(AdapterFile(AdapterWeights({key: pair})), "webui", path, torch.float32, SD2)
        assert read_adapter(path).info.family == family


def test_the_data_set_is_told_flat_and_as_a_list(preview: Path) -> None:
    known = dataclasses.replace(
        facts(),
        folder_images={"/a/ink": 30, "/b/ink": 10},
        reg_folder_images={"/c/reg": 5},
        folder_repeats={"/b/ink": 3, "/c/reg": 2},
        tag_frequency={"/a/ink": {"cat": 3}, "/b/ink": {"dog": 1}},
    )
    header = build_header(known)
    assert json.loads(header["ss_dataset_dirs"]) == {
        "ink": {"n_repeats": 1, "img_count": 30},
        "ink (2)": {"n_repeats": 3, "img_count": 10},
    }
    assert json.loads(header["ss_reg_dataset_dirs"]) == {"reg": {"n_repeats": 2, "img_count": 5}}
    assert (header["ss_num_train_images"], header["ss_num_reg_images"]) == ("60", "10")
    assert (header["ss_min_bucket_reso"], header["ss_max_bucket_reso"]) == ("48", "80")
    (dataset,) = json.loads(header["ss_datasets"])
    assert dataset["resolution"] == [64, 64] and dataset["num_train_images"] == 60
    assert dataset["tag_frequency"] == json.loads(header["ss_tag_frequency"])
    assert dataset["bucket_info"] == json.loads(header["ss_bucket_info"])
    assert [(s["image_dir"], s["img_count"], s["num_repeats"], s["is_reg"]) for s in dataset["subsets"]] == [
        ("ink", 30, 1, False),
        ("ink (2)", 10, 3, False),
        ("reg", 5, 2, True),
    ]


def test_a_private_run_tells_numbers_but_no_names(preview: Path) -> None:
    public = facts(preview)
    assert public.config is not None
    private = dataclasses.replace(public, config=public.config.with_values({"output.private": True}))
    header = build_header(private)
    whole = build_header(public)
    assert all(whole[key] == value for key, value in header.items())
    gone = set(whole) - set(header)
    assert {
        "ss_tag_frequency",
        "ss_dataset_dirs",
        "ss_datasets",
        "ss_bucket_info",
        "sdlora.config",
    } <= gone
    assert {"ss_sd_model_name", "ss_training_comment", "ss_session_id"} <= gone
    for key in ("ss_base_model_version", "ss_v2", "ss_steps", "modelspec.architecture", "modelspec.license"):
        assert key in header
    assert [key for key, value in header.items() if "ink set" in value or "a cat" in value] == []


def test_v_prediction_is_the_768_px_kind_of_sd2(tmp_path: Path) -> None:
    header = build_header(TrainingFacts(family=SD2, prediction_type="v_prediction"))
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(AdapterInfo(metadata=header)), "webui", path, torch.float16, SD2)
    assert read_header(path).metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    write_adapter(adapter_of(), "webui", path, torch.float16, SD2)
    assert read_header(path).metadata["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
