"""A kind of adapter registered from outside: two records, and everything in the program takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, ModuleKey, Update
from sdlora.adapters.kinds.kind import AdapterKind, Kernel, TrainedForm, plain_part, require_parts
from sdlora.adapters.kinds.table import KINDS
from sdlora.config.adapter import AdapterConfig
from sdlora.config.contradictions import contradictions
from sdlora.config.defaults import BaseFacts, DataFacts, OpenSettings, fill_training
from sdlora.config.kinds import KIND_RULES, KindRules
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import AdapterFileError
from sdlora.exporting.export import export_adapter
from sdlora.families.table import family_info
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.formats.support import client_support
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.render import GenerateRequest
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.inspecting.view import render
from sdlora.surgery.convert import convert_adapter
from sdlora.training.train import train


@dataclasses.dataclass(frozen=True)
class Outer(Update):
    """``alpha * outer_u (x) outer_v``: a single outer product.

    Attributes:
        outer_u: (out,).
        outer_v: (in,) or (in, kh, kw).
    """

    kind: ClassVar[str] = "outer"

    outer_u: Tensor
    outer_v: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.outer_u), *self.outer_v.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        product = self.outer_u.float()[:, None] * self.outer_v.float().flatten()[None]
        return (self.alpha * product).reshape(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"outer_u": self.outer_u, "outer_v": self.outer_v}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Outer:
        return Outer(tensors["outer_u"], tensors["outer_v"], self.alpha)

    def factors(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        return self.outer_u.float()[:, None], self.outer_v.float().flatten()[None], self.alpha


def build(where: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: Kernel | None) -> Outer:
    require_parts(where, parts, ("outer_u", "outer_v"))
    return Outer(parts["outer_u"], parts["outer_v"], 1.0 if alpha is None else alpha)


def start(
    config: AdapterConfig, weight: Tensor, rank: int, alpha: float, generator: torch.Generator
) -> Outer:
    return Outer(torch.zeros(weight.shape[0]), torch.randn(weight.shape[1:], generator=generator), alpha)


def peft_config(name: str, updates: Mapping[str, Outer], dropout: float) -> LoraConfig:
    return LoraConfig(r=1, lora_alpha=1, target_modules=sorted(updates), init_lora_weights=False)


def take_over(layer: Any, inner: str, update: Outer) -> dict[str, nn.Parameter]:
    down, up = layer.lora_A[inner].weight, layer.lora_B[inner].weight
    with torch.no_grad():
        down.copy_(update.outer_v[None])
        up.copy_(update.outer_u.reshape(up.shape))
    layer.lora_alpha[inner] = layer.scaling[inner] = update.alpha
    return {"outer_u": up, "outer_v": down}


OUTER = AdapterKind(
    title="outer product",
    parts=(plain_part("outer_u"), plain_part("outer_v")),
    build=build,
    start=start,
    trained=TrainedForm(peft_config, take_over, undecayed=frozenset({"outer_v"})),
    clients=("ComfyUI",),
)


class WiderAdapter(AdapterConfig):
    """Settings that know the kind."""

    kind: str = "outer"  # type: ignore[assignment]


class WiderConfig(Config):
    """The tree with them."""

    adapter: WiderAdapter = WiderAdapter()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "outer", OUTER)
    monkeypatch.setitem(KIND_RULES, "outer", KindRules(low_rank=False, alpha=0.5, alpha_reason="so it is"))


@pytest.fixture
def config(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> WiderConfig:
    usual = load_config(
        None,
        [
            *("training.batch_size=2", "data.validation=0", "sample.prompts=[]", "training.device=cpu"),
            *("training.precision=fp32", "training.steps=2", "data.resolution=32"),
            *("optimizer.learning_rate=0.01", "output.dtype=fp32", "output.name=ray"),
        ],
        {
            "data.folder": image_folder(4),
            "model.base": str(tiny_base),
            "output.folder": tmp_path / "run",
            "data.cache_folder": tmp_path / "cache",
        },
    )
    return WiderConfig.model_validate(usual.model_dump(exclude_unset=True))


def updates(seed: int = 0) -> AdapterWeights:
    """Updates of the kind for layers of SD1: linear and convolution."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 768),
        "down_blocks.0.resnets.0.conv1": (8, 4, 3, 3),
    }
    return AdapterWeights(
        {
            ModuleKey("unet", path): Outer(
                torch.randn(shape[0], generator=generator), torch.randn(shape[1:], generator=generator), 0.5
            )
            for path, shape in shapes.items()
        }
    )


def test_it_is_trained_written_drawn_with_inspected_and_converted(
    config: WiderConfig, tiny_base: Path, tmp_path: Path
) -> None:
    finished = train(config)
    assert finished.adapter_file is not None
    learned = read_adapter(finished.adapter_file).weights
    assert learned.kinds() == {"outer": len(learned)} and len(learned) > 4
    assert all(update.alpha == 0.5 for update in learned.updates.values())
    assert all(float(update.delta().abs().max()) > 0 for update in learned.updates.values())

    generator = ImageGenerator.load(str(tiny_base), device="cpu", precision="fp32")
    name = generator.add_adapter(finished.adapter_file)
    usual = {"height": 32, "width": 32, "steps": 1, "guidance": 1.0, "sampler": "Euler", "seed": 1}
    requests = [GenerateRequest("a bee", strengths={name: value}, **usual) for value in (0.0, 40.0)]
    without, with_it = (image.image.tobytes() for image in generator.generate(requests))
    assert without != with_it

    summary = inspect_adapter(finished.adapter_file)
    assert summary.kinds == {"outer": len(learned)} and summary.ranks == {1: len(learned)}
    assert "outer product" in render(summary)
    norms = sum(float(update.delta().double().square().sum()) for update in learned.updates.values())
    assert sum(block.norm**2 for block in summary.blocks) == pytest.approx(norms)

    plain = tmp_path / "plain.safetensors"
    report = convert_adapter(finished.adapter_file, plain, to_lora=True, dtype="fp32")
    assert report.details["kinds"] == {"lora": len(learned)}
    for key, pair in read_adapter(plain).weights.pairs.items():
        assert pair.rank == 1
        torch.testing.assert_close(pair.delta(), learned.updates[key].delta(), rtol=1e-5, atol=1e-8)


def test_it_goes_through_files_bit_for_bit_and_other_formats_say_why_not(tmp_path: Path) -> None:
    adapter, info = AdapterFile(updates(), AdapterInfo("sd1", "ray")), family_info("sd1")
    file = tmp_path / "ray.safetensors"
    write_adapter(adapter, "webui", file, torch.float32, info)
    back = read_adapter(file).weights
    assert back.updates.keys() == adapter.weights.updates.keys() and len(back) == 2
    for key, update in adapter.weights.all_items():
        assert isinstance(back.updates[key], Outer) and back.updates[key].alpha == update.alpha
        for name, tensor in update.tensors().items():
            assert torch.equal(back.updates[key].tensors()[name], tensor)
    exported = export_adapter(file, "webui", tmp_path / "out")
    assert exported.proof is not None and exported.proof.num_modules == 2
    for format in ("diffusers", "peft"):
        with pytest.raises(AdapterFileError, match=r"is outer product, which .* has no place for"):
            write_adapter(adapter, format, tmp_path / format, torch.float32, info)


def test_who_reads_it_follows_from_its_record() -> None:
    keys = ["lora_unet_down_blocks_0_resnets_0_conv1.outer_u"]
    support = {verdict.client: verdict for verdict in client_support("webui", "sd1", updates(), keys)}
    assert support["ComfyUI"].full
    assert (
        support["WebUI"].reasons[0].startswith("does not read outer product (2 layers) and leaves them out")
    )
    assert "refuses the whole file for its outer product layers" in support["diffusers"].reasons[0]


def test_parts_of_two_kinds_in_one_module_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module, file = "lora_unet_down_blocks_0_resnets_0_conv1", tmp_path / "mixed.safetensors"
    names = ("outer_u", "outer_v", "lora_down.weight")
    save_file({f"{module}.{name}": torch.ones(4, 4) for name in names}, file)
    with pytest.raises(AdapterFileError, match="mixes kinds"):
        read_adapter(file)


def test_its_defaults_and_contradictions_follow_from_its_rules(config: WiderConfig) -> None:
    facts = BaseFacts("base", {"adapter.alpha": 9.0}, 32, "cpu")
    open_settings = OpenSettings(config, facts)
    fill_training(open_settings, DataFacts(4, 4))
    assert open_settings.config.adapter.alpha == 0.5
    odd = config.with_values({"adapter.dropout": 0.1, "adapter.init": "pissa"})
    problems = contradictions(odd)
    assert len(problems) == 2 and all("which outer does not have" in problem for problem in problems)
