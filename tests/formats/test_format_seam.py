"""A file format registered from outside: one record, and everything in the program takes it.

And what is done once: each file's header is read once, each key taken apart once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey, Update
from sdlora.commands.cli import main
from sdlora.exporting.export import export_adapter
from sdlora.families.facts import FamilyInfo
from sdlora.families.table import family_info
from sdlora.formats import adapter_files, keys
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.formats.clients import Facts
from sdlora.formats.format_code import FormatCode
from sdlora.formats.keys import FileKeys, Groups
from sdlora.formats.table import FORMATS, Format, find_format, written_formats
from sdlora.generation.generate import generate
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.surgery.convert import convert_adapter
from sdlora.tensor_file import Header, Load, write_tensors

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"


def write(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    """Write ``arrow:COMPONENT:PATH>PART``, with alpha / rank in the last part."""
    tensors: dict[str, Tensor] = {}
    for key, pair in adapter.weights.items():
        name = f"arrow:{key.component}:{key.path}"
        tensors[f"{name}>first"], tensors[f"{name}>second"] = pair.down.to(dtype), pair.up.to(dtype)
        tensors[f"{name}>scale"] = torch.tensor(pair.scale)
    write_tensors(target, tensors, {"ss_base_model_version": info.header.version})
    return [target]


def claims(file_keys: FileKeys) -> int:
    return sum(key.startswith("arrow:") for key in file_keys.names)


def group(header: Header, file_keys: FileKeys) -> Groups:
    groups: dict[ModuleKey, dict[str, str]] = {}
    for key in file_keys.names:
        name, _, part = key.partition(">")
        _, component, path = name.split(":")
        groups.setdefault(ModuleKey(component, path), {})[part] = key
    return groups


def read(header: Header, groups: Groups, load: Load) -> Iterator[tuple[ModuleKey, Update]]:
    for module, parts in sorted(groups.items()):
        down, up, scale = (load(parts[name]) for name in ("first", "second", "scale"))
        yield module, LowRankPair(down, up, float(scale) * down.shape[0])


def reasons(client: str, facts: Facts) -> list[str]:
    return [] if client == "Forge" else ["reads no arrows"]


ARROW = Format(
    "Arrow", lambda: FormatCode(write, claims, group, read, reasons), "{name}.arrow.safetensors", "archers"
)


@pytest.fixture
def arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "arrow", ARROW)


@pytest.fixture
def weights() -> AdapterWeights:
    generator = torch.Generator().manual_seed(1)

    def pair(*shape: int) -> LowRankPair:
        ones = [1] * (len(shape) - 2)
        return LowRankPair(
            torch.randn((4, *shape[1:]), generator=generator),
            torch.randn((shape[0], 4, *ones), generator=generator),
            2.0,
        )

    return AdapterWeights({ModuleKey("unet", TO_K): pair(8, 768), ModuleKey("unet", CONV): pair(8, 4, 3, 3)})


@pytest.fixture
def source(weights: AdapterWeights, tmp_path: Path) -> Path:
    file = tmp_path / "ink.safetensors"
    write_adapter(
        AdapterFile(weights, AdapterInfo("sd1", "ink")), "webui", file, torch.float32, family_info("sd1")
    )
    return file


@pytest.mark.usefixtures("arrow")
def test_a_format_from_outside_is_offered_written_told_and_read_back(
    weights: AdapterWeights, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "arrow" in written_formats() and find_format("arrow") is ARROW
    assert main(["export", "--help"]) == 0
    assert "webui,diffusers,peft,arrow" in capsys.readouterr().out.replace(" ", "").replace("\n", "")

    assert main(["export", str(source), "--format", "arrow", "--output", str(tmp_path / "out")]) == 0
    target = tmp_path / "out" / "ink.arrow.safetensors"
    assert target.is_file() and "2 modules" in capsys.readouterr().out
    assert OpenAdapter(target).format == "arrow"
    back = read_adapter(target).weights
    assert back.pairs.keys() == weights.pairs.keys() and len(back) == 2
    for key, pair in weights.items():
        assert torch.equal(back.pairs[key].down, pair.down) and torch.equal(back.pairs[key].up, pair.up)
        assert back.pairs[key].alpha == pair.alpha

    summary = inspect_adapter(target)
    assert summary.format == "arrow" and summary.family == "sd1"
    assert [support.client for support in summary.clients if support.full] == ["Forge"]

    report = convert_adapter(target, tmp_path / "again.safetensors", format="webui")
    assert report.details["format"] == "webui" and OpenAdapter(report.files[0]).format == "webui"
    converted = convert_adapter(source, tmp_path / "to.safetensors", format="arrow")
    assert converted.proof is not None and OpenAdapter(converted.files[0]).format == "arrow"


@pytest.mark.usefixtures("arrow")
def test_the_page_offers_every_format_that_is_written() -> None:
    pytest.importorskip("gradio")
    from sdlora_ui.tabs.tools import format_choices

    choices = format_choices()
    assert (
        len(choices) == 4
        and ("archers", "arrow") in choices
        and ("WebUI, Forge, ComfyUI", "webui") in choices
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Counter[str], Counter[str]]]:
    """Count how often each file's header is read, and how often each key is taken apart."""
    headers: Counter[str] = Counter()
    parsed: Counter[str] = Counter()
    real_header, real_key = adapter_files.read_header, keys.parse_key

    def read_header(path: Path) -> Header:
        headers[path.name] += 1
        return real_header(path)

    def parse_key(key: str) -> keys.ParsedKey | None:
        parsed[key] += 1
        return real_key(key)

    monkeypatch.setattr(adapter_files, "read_header", read_header)
    monkeypatch.setattr(keys, "parse_key", parse_key)
    return lambda: (headers, parsed)


Counted = Callable[[], tuple[Counter[str], Counter[str]]]


@pytest.mark.parametrize("verify", [True, False])
def test_export_reads_each_header_once_and_takes_each_key_apart_once(
    source: Path, tmp_path: Path, counted: Counted, verify: bool
) -> None:
    export_adapter(source, "webui", tmp_path / "out", verify=verify)
    headers, parsed = counted()
    assert headers["ink.safetensors"] == 1 and sum(headers.values()) == 2  # the source, and what was written
    assert len(parsed) == 6 and set(parsed.values()) == {2}  # the same six keys in both files


def test_inspect_reads_the_header_once(source: Path, counted: Counted) -> None:
    inspect_adapter(source)
    headers, parsed = counted()
    assert headers == {"ink.safetensors": 1} and set(parsed.values()) == {1} and len(parsed) == 6


def test_generate_reads_the_header_of_an_adapter_once(
    tiny_base: Path, tmp_path: Path, trained: Path, counted: Counted
) -> None:
    result = generate(
        str(tiny_base),
        [(trained, 1.0)],
        ["a bee"],
        tmp_path / "images",
        height=32,
        width=32,
        steps=1,
        device="cpu",
    )
    headers, parsed = counted()
    assert headers == {trained.name: 1} and set(parsed.values()) == {1} and len(parsed) > 6
    from PIL import Image

    with Image.open(result.files[0]) as image:
        assert OpenAdapter(trained).data_hash()[:12] in str(image.info["parameters"])


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> Path:
    """A fresh adapter of the tiny base, as a file."""
    from sdlora.adapters.attach import create_adapter
    from sdlora.config.schema import AdapterConfig
    from sdlora.families.loading import load_model

    model = load_model(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
    fresh = create_adapter(model, AdapterConfig(rank=2, alpha=2.0), 0)
    file = tmp_path / "fresh.safetensors"
    write_adapter(AdapterFile(fresh, AdapterInfo("sd1", "fresh")), "webui", file, torch.float32, model.info)
    return file
