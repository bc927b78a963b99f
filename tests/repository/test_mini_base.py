"""The parts of the mini base's build that need neither npm nor a renderer."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import sdlora
from tools.mini_base import captions, models, muon, tokenizer
from tools.mini_base.build import Build, run_tokenizer
from tools.mini_base.config import BASE_SETS, RECOMMENDED
from tools.mini_base.denoiser import DenoiserSettings, Latents, Trainer
from tools.mini_base.files import sha256
from tools.mini_base.renders import IconImage, to_tensor
from tools.mini_base.vae import VaeSettings, VaeTrainer, psnr

CPU = torch.device("cpu")
MINI = Path(sdlora.__file__).parent / "assets" / "mini"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    tokenizer.train(folder)
    return folder


def trainer(words: Path, prediction: str = "epsilon", std: float = 0.5) -> Trainer:
    torch.manual_seed(0)
    tokens = models.load_tokenizer(words)
    latents = Latents(
        torch.zeros(4, 1, 4, 16, 16),
        torch.full((4, 1, 4, 16, 16), std),
        [IconImage(icon_set, "cat") for icon_set in BASE_SETS],
    )
    settings = DenoiserSettings(samples=4, batch=2, prediction=prediction)
    return Trainer(models.new_unet(), models.new_text_encoder(tokens), tokens, latents, settings, CPU)


def test_the_networks_have_the_layout_of_sd1_and_fit_in_32_mebibytes(words: Path) -> None:
    with torch.device("meta"):
        parts = [models.new_unet(), models.new_vae()]
    text_encoder = models.new_text_encoder(models.load_tokenizer(words))
    for part in parts:
        assert part.config.layers_per_block == 2
        assert all(width % 32 == 0 for width in part.config.block_out_channels)
    assert parts[1].config.latent_channels == 4 and text_encoder.config.max_position_embeddings == 77
    count = sum(p.numel() for part in [*parts, text_encoder] for p in part.parameters())
    assert 2 * count < 31 * 2**20  # fp16; the rest is for tokenizer, licences and the contact sheet


def test_captions_teach_every_style_word_and_leave_plain_prompts_to_the_main_sets() -> None:
    rng = random.Random(0)
    for icon_set in BASE_SETS:
        drawn = Counter(
            "empty" if not text else "styled" if icon_set.styles[0] in text else "plain"
            for text in (captions.caption("a cat", icon_set, rng) for _ in range(4000))
        )
        plain = captions.PLAIN_SHARES[icon_set.key]
        assert drawn["empty"] / 4000 == pytest.approx(captions.EMPTY_SHARE, abs=0.02)
        assert drawn["plain"] / 4000 == pytest.approx(0.9 * plain, abs=0.03)
        assert drawn["styled"] / 4000 == pytest.approx(0.9 * (1 - plain), abs=0.03)


def test_a_build_that_goes_on_keeps_its_tokenizer(tmp_path: Path) -> None:
    build = Build(output=tmp_path / "mini", cache=tmp_path / "npm")
    run_tokenizer(build)
    before = {path.name: path.read_bytes() for path in build.tokenizer_folder.iterdir()}
    assert "tokenizer.json" in before
    run_tokenizer(build)
    assert {path.name: path.read_bytes() for path in build.tokenizer_folder.iterdir()} == before


def test_the_contact_sheet_shows_a_hundred_prompts() -> None:
    prompts = captions.sheet_prompts()
    assert len(prompts) == len(set(prompts)) == 100
    for icon_set in BASE_SETS:
        assert sum(icon_set.styles[0] in prompt for prompt in prompts) == 4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(words: Path, prediction: str) -> None:
    training = trainer(words, prediction, std=0.0)  # an image of zeros: all that is seen is noise

    def perfect(noisy: torch.Tensor, times: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        alpha = training.alphas[times].view(-1, 1, 1, 1)
        noise = noisy / (1 - alpha).sqrt()
        return (noise if prediction == "epsilon" else alpha.sqrt() * noise,)

    training.forward = perfect
    assert training.loss().item() == pytest.approx(0, abs=1e-9)
    other = "v_prediction" if prediction == "epsilon" else "epsilon"
    training.settings = DenoiserSettings(samples=4, batch=2, prediction=other)
    assert training.loss().item() > 0.01


@pytest.mark.long
def test_a_resumed_denoiser_ends_with_the_same_weights(words: Path, tmp_path: Path) -> None:
    whole = trainer(words)
    whole.run(tmp_path / "whole")
    part = trainer(words)
    part.step(part.fraction)
    part.save(tmp_path / "part")
    resumed = trainer(words)
    assert resumed.resume(tmp_path / "part")
    resumed.run(tmp_path / "part")
    assert whole.done == resumed.done == 4
    expected = dict(whole.ema_unet.state_dict()) | dict(whole.ema_text.state_dict())
    actual = dict(resumed.ema_unet.state_dict()) | dict(resumed.ema_text.state_dict())
    assert actual.keys() == expected.keys() and len(actual) > 100
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_shipped_base_is_whole_and_recommends_what_the_build_writes() -> None:
    sums = dict(line.split("  ")[::-1] for line in (MINI / "SHA256SUMS").read_text("utf-8").splitlines())
    files = {p.relative_to(MINI).as_posix(): p for p in MINI.rglob("*") if p.is_file()}
    assert set(sums) == set(files) - {"SHA256SUMS"}
    assert {name for name, digest in sums.items() if sha256(files[name]) != digest} == set()
    assert sum(p.stat().st_size for p in files.values()) < 32 * 2**20
    assert json.loads(files["sdlora.json"].read_text("utf-8")) == {"recommended": RECOMMENDED}


def test_the_shipped_autoencoder_draws_icons_and_knows_its_scale() -> None:
    vae = AutoencoderKL.from_pretrained(MINI / "vae", dtype=torch.float32)
    icons = sorted((Path(__file__).parents[2] / "datasets" / "ink-icons-holdout").glob("*.png"))
    images = np.array([np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in icons])
    assert len(images) == 60 and psnr(vae, images, CPU) > 20
    latents = vae.encode(to_tensor(images)).latent_dist.mean * vae.config.scaling_factor
    assert 0.5 < latents.std().item() < 2


def test_directions_in_bfloat16_are_those_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(3, 48, 160, generator=torch.Generator().manual_seed(0))
    for stack in (matrices, matrices.mT):
        monkeypatch.setattr(muon, "autocast_type", lambda device: None)
        exact = muon.orthogonalise(stack)
        monkeypatch.setattr(muon, "autocast_type", lambda device: torch.bfloat16)
        rounded = muon.orthogonalise(stack)
        assert rounded.dtype == torch.float32 and rounded.shape == stack.shape
        assert torch.cosine_similarity(rounded.flatten(1), exact.flatten(1)).min() > 0.995


def test_a_resumed_autoencoder_ends_with_the_same_weights(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (4, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()

    def new(samples: int) -> VaeTrainer:
        torch.manual_seed(0)
        return VaeTrainer(models.new_vae(), images, VaeSettings(samples=samples, batch=2), CPU)

    new(4).run(tmp_path / "whole")
    part = new(4)
    part.step()
    part.save(tmp_path / "part")
    new(4).run(tmp_path / "part")
    (expected,) = (tmp_path / "whole").glob("vae.*.safetensors")
    newest = max((tmp_path / "part").glob("vae.*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    ours, theirs = load_file(newest), load_file(expected)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
