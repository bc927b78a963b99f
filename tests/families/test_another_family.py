"""A family nobody knows yet: a transformer instead of a U-Net, rectified flow, 16 shifted latent channels.

This file and one line in the table are all there is of it: what it can do shows what a new family takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.adapters.canonical import AdapterFile
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.diffusion.prediction import Prediction
from sdlora.diffusion.process import Corrupted, MakeScheduler, Scheduler
from sdlora.errors import AdapterFileError, ConfigError, ModelError
from sdlora.events import Control, Event, StepDone, Validated
from sdlora.exporting.export import export_adapter
from sdlora.families.base import Conditioning, SizeHint
from sdlora.families.clip import chunk_tokens, encode_penultimate, weigh_states
from sdlora.families.facts import DenoiserInfo, FamilyInfo, HeaderWords, TextEncoderInfo
from sdlora.families.latent_model import TEXT_TARGETS, LatentModel
from sdlora.families.loading import load_model
from sdlora.families.table import FAMILIES
from sdlora.files import ASSETS
from sdlora.formats.adapter_files import OpenAdapter, read_adapter
from sdlora.generation.image_generator import ImageGenerator
from sdlora.generation.render import GenerateRequest
from sdlora.inspecting.base_inspection import inspect_base
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.run_folder import list_checkpoints
from sdlora.training.train import TrainResult, train

# the contract of all families, which runs here on the `model` of this file
from .test_families import (  # noqa: F401
    test_a_fresh_adapter_changes_nothing_and_strength_zero_is_the_base,
    test_adapters_reach_text_encoders_whole,
    test_long_captions_are_chunks_and_stack_with_short_ones,
    test_the_loss_is_finite_at_every_timestep,
)

CPU = torch.device("cpu")
STEPS_OF_TIME = 1000  # what the transformer calls pure noise


class Flow(Prediction):
    """The velocity from the image to the noise (Esser et al. 2024, section 2)."""

    name = "flow"
    speaks_of_pure_noise = True

    def target(self, clean: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return noise - clean

    def error_ratio(self, snr: Tensor) -> Tensor:
        return (1.0 + snr.sqrt()).square()  # clean = noisy - s * output, and s = 1 / (1 + a / s)


FLOW = Flow()


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler along the flow, with what the other schedulers have."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def euler(shift: float, steps: int) -> Scheduler:
    scheduler = FlowEuler(num_train_timesteps=STEPS_OF_TIME, shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


@dataclass(frozen=True)
class RectifiedFlow:
    """noisy = (1 - t) * clean + t * noise; timesteps are 1000 t."""

    shift: float
    prediction: Prediction = FLOW
    ends_in_noise: bool = True
    max_steps: int = STEPS_OF_TIME - 1

    @property
    def schedulers(self) -> Mapping[str, MakeScheduler]:
        return {"Euler": partial(euler, self.shift)}

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, generator=generator).sigmoid() * STEPS_OF_TIME  # logit-normal

    def spread_timesteps(self, count: int) -> Tensor:
        return (torch.arange(count) + 0.5) / count * STEPS_OF_TIME

    def corrupt(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Corrupted:
        s = (timesteps.float() / STEPS_OF_TIME).view(-1, 1, 1, 1).to(clean.device)
        noisy = (1.0 - s) * clean + s * noise  # (B, C, h, w)
        return Corrupted(noisy, self.prediction.target(clean, noise, 1.0 - s, s), timesteps)

    def loss_weights(self, timesteps: Tensor, min_snr_gamma: float) -> Tensor:
        return torch.ones(timesteps.shape)  # the density of the times does the weighing


ATTENTION = (
    *(".to_q", ".to_k", ".to_v", ".to_out.0"),
    *(".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out"),
)
LINEAR = (*ATTENTION, ".net.0.proj", ".net.2")


class FlowTransformer(LatentModel):
    """A loaded base in the layout of Stable Diffusion 3, with one text encoder."""

    info = FamilyInfo(
        name="flow-test",
        title="Flow Test",
        denoiser=DenoiserInfo(
            component="transformer",
            title="transformer",
            diffusers_class="SD3Transformer2DModel",
            targets={
                "attention": ATTENTION,
                "linear": LINEAR,
                "all": (*LINEAR, ".proj_out", ".pos_embed.proj"),
            },
            file_prefix="lora_transformer",
            channels=16,
        ),
        text_encoders=(
            TextEncoderInfo(
                component="text_encoder",
                targets=TEXT_TARGETS,
                file_prefix="lora_te1",
                part="text_encoder",
                tokenizer="tokenizer",
                width=16,
                projected=True,
            ),
        ),
        header=HeaderWords(
            version="flow_test_v1", version_start="flow_test", architecture="flow-test-1/lora"
        ),
        predictions=("flow",),
        adapter_format="diffusers",
        diffusers_loader="SD3LoraLoaderMixin",
    )

    @classmethod
    def make_process(
        cls, scheduler: Mapping[str, Any], prediction: str, *, ends_in_noise: bool
    ) -> RectifiedFlow:
        return RectifiedFlow(float(scheduler["shift"]))

    def _latent_multiple(self) -> int:
        return int(self.denoiser.config.patch_size)

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        encoder, tokenizer = self.text_encoders["text_encoder"], self.tokenizers["text_encoder"]
        ids, weights = chunk_tokens(tokenizer, captions)
        states, pooled = encode_penultimate(encoder, ids.to(encoder.device), tokenizer.eos_token_id)
        assert pooled is not None
        return {"states": weigh_states(states, weights), "pooled": pooled}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Sequence[SizeHint]
    ) -> Tensor:
        facts = self.facts
        with self._working(self.denoiser):
            output = self.denoiser(
                noisy.to(facts.device, facts.dtype),
                encoder_hidden_states=text["states"].to(facts.device, facts.dtype),
                pooled_projections=text["pooled"].to(facts.device, facts.dtype),
                timestep=timesteps.to(facts.device),
                return_dict=False,
            )
        return output[0].float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny base with random weights: 32 px, f=4, a 16-wide text encoder."""
    folder = tmp_path_factory.mktemp("flow") / "base"
    torch.manual_seed(7)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer")
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, part in (("transformer", transformer), ("vae", vae), ("text_encoder", text_encoder)):
        with torch.no_grad():  # no weight is zero, as some start
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line in the table."""
    monkeypatch.setitem(FAMILIES, FlowTransformer.info.name, FlowTransformer)


@pytest.fixture
def model(folder: Path) -> LatentModel:
    return load_model(str(folder), dtype=torch.float32, device=CPU)


@pytest.fixture
def make(folder: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    images = image_folder(count=4)

    def config(run: str, *overrides: str) -> Config:
        values = {
            "data.folder": images,
            "data.cache_folder": tmp_path / "cache",
            "model.base": str(folder),
            "output.folder": tmp_path / run,
        }
        settings = (
            *("adapter.rank=2", "adapter.alpha=3", "adapter.text_encoder=true", "data.resolution=32"),
            *("training.batch_size=2", "training.device=cpu", "training.precision=fp32", "training.steps=2"),
            *("sample.prompts=[]", "data.validation=0", "output.dtype=fp32"),
        )
        return load_config(None, [*settings, *overrides], values)

    return config


def test_it_is_recognised_only_while_it_is_in_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspect_base(str(folder)).recognised.family == "flow-test"
    assert "predicts    flow" in inspect_base(str(folder)).render()
    monkeypatch.delitem(FAMILIES, "flow-test")
    with pytest.raises(ModelError, match="a StableDiffusion3Pipeline folder; give a folder of"):
        inspect_base(str(folder))


def test_latents_are_shifted_as_diffusers_shifts_them(model: LatentModel) -> None:
    latents = torch.randn((2, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    config = model.vae.config
    scaled = model.facts.latents.scaled(latents)
    torch.testing.assert_close(scaled, (latents - config.shift_factor) * config.scaling_factor)
    torch.testing.assert_close(model.facts.latents.unscaled(scaled), latents)
    assert model.facts.latents.shape(32, 64) == (16, 8, 16)
    assert (model.facts.native_resolution, model.facts.size_multiple) == (32, 8)


@pytest.mark.long
def test_it_trains_resumes_exactly_and_its_file_is_read_by_diffusers(make: Callable[..., Config]) -> None:
    whole = train(make("whole"))
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            control.stop()

    assert train(make("parts"), listeners=[stop], control=control).stopped
    resumed = train(make("parts"), resume=True)
    whole_state, resumed_state = (_state(result) for result in (whole, resumed))
    assert len(whole_state) > 4 and whole_state.keys() == resumed_state.keys()
    assert [name for name in whole_state if not torch.equal(whole_state[name], resumed_state[name])] == []

    assert whole.adapter_file is not None and OpenAdapter(whole.adapter_file).format == "diffusers"
    keys = list(load_file(whole.adapter_file))
    assert {key.split(".")[0] for key in keys} == {"transformer", "text_encoder"}
    adapter = read_adapter(whole.adapter_file)
    assert adapter.info.family == "flow-test" and len(adapter.weights) == len(keys) // 2
    report = export_adapter(whole.folder, "diffusers", whole.folder / "exported")
    assert report.proof.read_by == ("sdlora", "diffusers")
    with pytest.raises(AdapterFileError, match="has no name in the WebUI format"):
        export_adapter(whole.folder, "webui", whole.folder / "exported")
    assert inspect_adapter(whole.adapter_file).family == "flow-test"


@pytest.mark.long
def test_the_loss_on_images_it_never_saw_falls(make: Callable[..., Config]) -> None:
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Validated):
            losses.append(event.loss)

    settings = ("training.steps=40", "optimizer.learning_rate=1e-2", "adapter.targets=all", "adapter.rank=8")
    train(make("long", *settings, "data.validation=1", "training.validate_every=40"), listeners=[note])
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0]


def test_it_draws_with_the_one_sampler_that_its_process_has(
    folder: Path, make: Callable[..., Config]
) -> None:
    trained = train(make("run", "optimizer.learning_rate=1e-2"))
    assert trained.adapter_file is not None
    generator = ImageGenerator.load(str(folder), device="cpu", precision="fp32")
    name = generator.add_adapter(trained.adapter_file)
    base, adapted, other = (
        GenerateRequest(
            "a cat",
            height=32,
            width=32,
            steps=4,
            guidance=2.0,
            sampler=sampler,
            seed=0,
            strengths=strengths,
        )
        for sampler, strengths in (("Euler", {}), ("Euler", {name: {"transformer": 2.0}}), ("DDIM", {}))
    )
    first, second = (image.image.tobytes() for image in generator.generate([base, adapted]))
    assert first != second
    with pytest.raises(ConfigError, match=r"`DDIM`: cannot take away the noise.*predicts flow; use Euler"):
        generator.generate([other])
    weights = read_adapter(trained.adapter_file)
    assert isinstance(weights, AdapterFile)


def _state(result: TrainResult) -> dict[str, Tensor]:
    return load_file(list_checkpoints(result.folder / "checkpoints")[-1].optimizer_file)
