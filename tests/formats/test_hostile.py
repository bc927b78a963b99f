"""Files that are damaged, hostile or something else: one clear line each, nothing large allocated."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdlora.adapters.canonical import AdapterWeights, LowRankPair, ModuleKey
from sdlora.errors import AdapterFileError
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.tensor_file import MAX_HEADER_BYTES, read_header

from .adapters import SD1, file_of, raw_file

KEY = "lora_unet_mid_block_attentions_0_proj_in"


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def good_file(folder: Path) -> Path:
    pair = LowRankPair(torch.randn(2, 4), torch.randn(4, 2), 1.0)
    weights = AdapterWeights({ModuleKey("unet", "mid_block.attentions.0.proj_in"): pair})
    return write_adapter(file_of(weights), "webui", folder / "good.safetensors", torch.float32, SD1)[0]


def refusal(path: Path) -> str:
    """Return the one line that reading gives, having checked that it is one and names the file."""
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError) as caught:
            read_adapter(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert peak < 2 * 2**20, "reading a bad file must not allocate much"
    assert "\n" not in text and str(path) in text and ";" in text
    return text


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.safetensors")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert "is empty" in refusal(tmp_path / "a.safetensors")


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    assert "is a folder without adapter_config.json" in refusal(tmp_path)
    good_file(tmp_path)
    assert "good.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.safetensors"])
def test_pickles_are_refused_with_how_to_convert(name: str, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / name)
    text = refusal(tmp_path / name)
    assert "zip archive" in text and "torch.load('IN', 'cpu', weights_only=True)" in text
    (tmp_path / name).write_bytes(pickle.dumps({"x": 1}))
    assert "Python pickle" in refusal(tmp_path / name)


def test_text_named_as_a_checkpoint_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"not really a checkpoint, but named so")
    assert "is a .ckpt file and not safetensors" in refusal(tmp_path / "a.ckpt")


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    starts = {
        b"GGUF0000": "GGUF",
        b"<!DOCTYPE html>": "web page",
        b"version https://git-lfs.x": "Git LFS pointer",
    }
    for start, word in starts.items():
        path.write_bytes(start + b" " * 100)
        assert word in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    assert "zip archive" in refusal(path)
    path.write_bytes(b"abc")
    assert "is not a safetensors file (3 bytes)" in refusal(path)


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    whole = good_file(tmp_path).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in [*range(1, 40), *range(40, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "safetensors" in refusal(path)


def test_nonsense_header_lengths(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (0, 1, 2**31, 2**62, 2**64 - 1):
        raw_file(path, {}, length=length)
        refusal(path)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    entry = json.dumps({"lora_unet_x.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "unlucky.safetensors"
    file.write_bytes(struct.pack("<Q", length) + entry.ljust(length) + struct.pack("<f", 1.0))
    assert file.read_bytes()[0] == 0x80
    assert list(read_header(file).tensors) == ["lora_unet_x.alpha"]


def test_an_enormous_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    raw_file(path, {}, length=MAX_HEADER_BYTES + 1)
    with path.open("r+b") as stream:
        stream.truncate(MAX_HEADER_BYTES + 1000)  # sparse: nothing is written
    assert "more than the" in refusal(path)


HEADERS = {
    "not JSON": b"{nonsense}",
    "a list": b'["x"]',
    "deep": b'{"a":' + b"[" * 20000 + b"]" * 20000 + b"}",
    "the same key twice": b'{"a":{},"a":{}}',
    "entries that are not text": {"__metadata__": {"a": 1}},
    "no fields": {"a": {}},
    "an unknown format": {"a": entry(0, 4, [1], "F7")},
    "a negative side": {"a": entry(0, 4, [-1])},
    "a side that is not a number": {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
    "true as a side": {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    "sides past the file": {"a": entry(0, 4, [2**40, 2**40])},
    "an overflow to four bytes": {"a": entry(0, 4, [2**62 + 1, 1])},
    "offsets backwards": {"a": entry(4, 0, [1])},
    "offsets past the end": {"a": entry(0, 8, [2])},
    "offsets far past the end": {"a": entry(2**60, 2**60 + 4, [1])},
    "overlap": {"a": entry(0, 4, [1]), "b": entry(2, 6, [1])},
    "a gap": {"a": entry(1, 5, [1])},
    "a rest": {"a": entry(0, 0, [0])},
    "too many sides": {"a": entry(0, 4, [1] * 5000)},
    "an empty tensor beyond any memory": {"a": entry(0, 0, [0, 2**62, 2**62]), "b": entry(0, 4, [1])},
    "half a character in a key": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "half a character in an entry": {"__metadata__": {"a": "\ud800"}, "b": entry(0, 4, [1])},
    "a number of many digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,4]}}',
    "not a number": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("what", HEADERS)
def test_malformed_headers(what: str, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.safetensors", HEADERS[what], b"\0\0\0\0")
    refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    assert "is a pipe or a device" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("what", ["objects", "lists", "numbers", "strings"])
def test_a_header_of_millions_of_values_is_refused_before_it_is_parsed(what: str, tmp_path: Path) -> None:
    count = 1_000_000
    texts = {
        "objects": b"{" + b",".join(b'"%d":{}' % i for i in range(count // 2)) + b"}",
        "lists": b'{"a":[' + b",".join([b"[]"] * (2 * count)) + b"]}",
        "numbers": b'{"a":[' + b",".join([b"12345"] * count) + b"]}",
        "strings": b'{"a":[' + b",".join([b'""'] * count) + b"]}",
    }
    path = raw_file(tmp_path / "a.safetensors", texts[what])
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="more values than any adapter has"):
        read_adapter(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20, "parsed, these would take hundreds of MiB"


def test_a_large_but_honest_header_is_read(tmp_path: Path) -> None:
    tags = json.dumps({"set": {f"tag {i}": i for i in range(100_000)}})
    assert len(tags) > 2**20
    path = tmp_path / "a.safetensors"
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 4), f"{KEY}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, path, {"ss_tag_frequency": tags, "ssmd_cover_images": '["' + "A" * 2**22 + '"]'})
    assert len(read_adapter(path).info.metadata["ss_tag_frequency"]) == len(tags)


def test_entries_too_long_to_parse_are_refused_where_they_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 4), f"{KEY}.lora_up.weight": torch.ones(4, 2)}
    for key, what in (
        ("sdlora.alphas", "not a list of alphas"),
        ("lora_adapter_metadata", "not a JSON object"),
    ):
        for text in ("[" * 100_000, '{"a":"' + "x" * (5 * 2**20) + '"}'):
            save_file(tensors, path, {key: text})
            with pytest.raises(AdapterFileError, match=what):
                read_adapter(path)


def test_control_characters_in_keys_stay_out_of_messages(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.safetensors", {"\x1b[2J\nrm" + "x" * 5000: entry(0, 4, [1])}, b"\0\0\0\0")
    text = refusal(path)
    assert "\x1b" not in text and len(text) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    down = torch.ones(2, 4)
    down[1, 2] = value
    save_file({f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": torch.ones(4, 2)}, path)
    assert f"`{KEY}.lora_down.weight` holds NaN or infinite values" in refusal(path)


NOT_ADAPTERS: dict[str, dict[str, tuple[int, ...]]] = {
    "a full model (checkpoint)": {"model.diffusion_model.input_blocks.0.0.weight": (4, 4)},
    "a full U-Net": {"conv_in.weight": (4, 4), "down_blocks.0.resnets.0.conv1.weight": (4, 4)},
    "a full text encoder": {"text_model.embeddings.token_embedding.weight": (4, 4)},
    "a full VAE": {"decoder.conv_in.weight": (4, 4)},
    "a textual-inversion embedding": {"emb_params": (2, 768)},
    "textual-inversion": {"<ink>": (1, 768)},
    "holds no LoRA (`weights`)": {"weights": (3, 3)},
    "holds no tensors": {},
    "`hada_w1_b` factor is missing": {f"{KEY}.hada_w1_a": (4, 2), f"{KEY}.alpha": ()},
    "`lokr_w2_a` factor is missing": {f"{KEY}.lokr_w1": (4, 2), f"{KEY}.lokr_w2_b": (4, 2)},
    "mixes kinds (`down` with `hada_w1_a`)": {
        f"{KEY}.lora_down.weight": (2, 4),
        f"{KEY}.hada_w1_a": (4, 2),
    },
    "dora_scale (3, 1)": {
        f"{KEY}.lora_down.weight": (2, 4),
        f"{KEY}.lora_up.weight": (4, 2),
        f"{KEY}.dora_scale": (3, 1),
    },
    "hada_t1 (2, 2, 3, 3)": {
        **{f"{KEY}.hada_w{side}": (2, 2) for side in ("1_a", "1_b", "2_a", "2_b")},
        f"{KEY}.hada_t1": (2, 2, 3, 3),
    },
    "lokr_t2 (3, 2, 3, 3)": {
        **{f"{KEY}.lokr_w{side}": (2, 2) for side in ("1", "2_a", "2_b")},
        f"{KEY}.lokr_t2": (3, 2, 3, 3),
    },
    "`down` factor is missing;": {f"{KEY}.lora_mid.weight": (2, 2, 3, 3)},
    "a transformer model": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 4)},
    "`up` factor is missing": {f"{KEY}.lora_down.weight": (2, 4)},
    "`down` factor is missing": {f"{KEY}.alpha": ()},
    "1 keys are unknown": {"lora_unet_mid_block_something_new.lora_down.weight": (2, 4)},
    "keys are unknown": {f"{KEY}.lora_strange.weight": (2, 4)},
    "factors do not fit": {f"{KEY}.lora_down.weight": (2, 4), f"{KEY}.lora_up.weight": (4, 3)},
    "rank 0": {f"{KEY}.lora_down.weight": (0, 4), f"{KEY}.lora_up.weight": (4, 0)},
    "alpha has 2 values": {
        f"{KEY}.lora_down.weight": (2, 4),
        f"{KEY}.lora_up.weight": (4, 2),
        f"{KEY}.alpha": (2,),
    },
    "`down` factor is a single number": {f"{KEY}.lora_down.weight": (), f"{KEY}.lora_up.weight": (4, 2)},
    "`up` factor is a single number": {f"{KEY}.lora_down.weight": (2, 4), f"{KEY}.lora_up.weight": ()},
    "`hada_w1_b` factor is a single number": {f"{KEY}.hada_w1_a": (4, 2), f"{KEY}.hada_w1_b": ()},
    "is there twice": {
        f"{KEY}.lora_down.weight": (2, 4),
        "lora_unet_middle_block_1_proj_in.lora_down.weight": (2, 4),
    },
}


@pytest.mark.parametrize("what", NOT_ADAPTERS)
def test_other_contents_are_named(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(shape) for key, shape in NOT_ADAPTERS[what].items()}, path)
    assert what in refusal(path)


def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "lora_down.weight": torch.ones(2, 4),
        "lora_up.weight": torch.ones(4, 2),
        "alpha": torch.tensor([1.0, 2.0]),
    }
    save_file({f"{KEY}.{name}": tensor for name, tensor in tensors.items()}, path)
    assert "alpha has 2 values instead of one" in refusal(path)


def test_recorded_alphas_that_are_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 4), f"{KEY}.lora_up.weight": torch.ones(4, 2)}
    for text in ("x", "[]", '{"unet": 0}', '{"unet": "a"}', '{"unet": 1e999}', '{"unet": true}'):
        save_file(tensors, path, {"sdlora.alphas": text})
        assert "not a list of alphas" in refusal(path)


def test_broken_peft_folders(tmp_path: Path) -> None:
    key = "base_model.model.mid_block.attentions.0.proj_in"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        AdapterFileError, match=r"adapter_config\.json: is missing, and PEFT keeps alpha there"
    ):
        read_adapter(tmp_path / "adapter_model.safetensors")
    configs = {
        "not valid JSON": "{",
        "not a JSON object": "[]",
        "not one of LORA": '{"peft_type": "VERA"}',
        "is not a LOHA": '{"peft_type": "LOHA"}',
        "lora_alpha is": '{"lora_alpha": null}',
        "regular expression": '{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}',
        "is not a table": '{"lora_alpha": 1, "alpha_pattern": [1]}',
    }
    for what, text in configs.items():
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterFileError, match=what):
            read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04x")
    with pytest.raises(AdapterFileError, match="only as a pickle"):
        read_adapter(tmp_path)


def test_a_peft_factor_that_is_a_single_number(tmp_path: Path) -> None:
    key = "base_model.model.mid_block.attentions.0.proj_in"
    tensors = {f"{key}.lora_A.weight": torch.tensor(1.0), f"{key}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="is a single number"):
        read_adapter(tmp_path)


def test_the_format_is_told_from_the_keys_not_the_name(tmp_path: Path) -> None:
    renamed = good_file(tmp_path).rename(tmp_path / "model.bin")
    assert OpenAdapter(renamed).format == "webui"


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_give_an_adapter_or_one_error(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(good_file(tmp_path).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    try:
        read_adapter(path)
    except AdapterFileError as error:
        assert "\n" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
tensor_entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "X"]) | json_values},
    optional={
        "shape": st.lists(st.integers(-1, 2**65), max_size=4) | json_values,
        "data_offsets": json_values,
    },
)


@given(tree=st.dictionaries(st.text(max_size=8), tensor_entries | json_values, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_gives_a_header_or_one_error(tree: dict[str, object], tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.safetensors", json.dumps(tree).encode(), b"\0" * 16)
    try:
        read_header(path)
    except AdapterFileError as error:
        assert "\n" not in str(error)
