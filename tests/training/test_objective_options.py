"""Losses, weights, timesteps, noise, dropout of parts: by their formulae, and the same in any company."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdlora.config.contradictions import contradictions
from sdlora.config.schema import Config, TrainingConfig
from sdlora.config.toml import load_config
from sdlora.diffusion.ddpm import DDPM
from sdlora.diffusion.process import draw_noise, multires_noise, per_image_loss
from sdlora.diffusion.weighting import ERRORS, WEIGHTINGS, huber_threshold, loss_weights
from sdlora.errors import ConfigError
from sdlora.events import Decided, Emitter, Event
from sdlora.training.finish import adapter_file
from sdlora.training.objective import check_objective, draw_timestep, loss_of
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.step import launch_step, train_step

EPSILON = DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, "epsilon")
VELOCITY = DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, "v_prediction")
TERMINAL = DDPM.from_betas(0.00085, 0.012, "scaled_linear", 1000, "v_prediction", zero_terminal_snr=True)
TIMES = torch.arange(1000)


def ratio(process: DDPM) -> Tensor:
    return process.alphas_cumprod / (1 - process.alphas_cumprod)


def test_huber_losses_are_khrapovs() -> None:
    difference = torch.tensor([0.0, 0.01, -0.3, 2.0, -50.0], dtype=torch.float64)
    for c in (0.1, 1.0):
        threshold = torch.tensor(c, dtype=torch.float64)
        root = (difference.pow(2) + c * c).sqrt() - c
        torch.testing.assert_close(ERRORS["huber"](difference, threshold), 2 * c * root)
        torch.testing.assert_close(ERRORS["smooth_l1"](difference, threshold), 2 * root)
    threshold = torch.tensor(0.1, dtype=torch.float64)
    small, large = difference[1:2], difference[-1:]
    torch.testing.assert_close(ERRORS["huber"](small, threshold), small.square(), rtol=0.01, atol=0)
    torch.testing.assert_close(ERRORS["huber"](large, threshold), 2 * 0.1 * large.abs(), rtol=0.01, atol=0)


def test_huber_thresholds_go_from_one_to_c() -> None:
    alphas = EPSILON.alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    wanted = {
        "constant": torch.full((1000,), 0.2, dtype=torch.float64),
        "exponential": torch.exp(math.log(0.2) / 1000 * TIMES.double()),
        "snr": 0.8 / (1 + sigmas).square() + 0.2,
    }
    for schedule, values in wanted.items():
        ours = huber_threshold(EPSILON, TIMES, schedule, 0.2).double()
        torch.testing.assert_close(ours, values, rtol=1e-5, atol=1e-6)
    assert float(huber_threshold(TERMINAL, TIMES, "snr", 0.2)[-1]) == pytest.approx(0.2)


def test_a_loss_of_its_own_is_masked_like_the_squared_one() -> None:
    prediction, target = torch.randn(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    ours = per_image_loss(prediction, target, mask, torch.abs)
    torch.testing.assert_close(ours, prediction[:, :, :2].abs().flatten(1).mean(1))


def test_weights_follow_the_papers() -> None:
    gamma, snr = torch.tensor(5.0, dtype=torch.float64), ratio(EPSILON)
    wanted = {
        "min_snr": torch.minimum(snr, gamma),
        "soft_min_snr": snr * gamma / (snr + gamma),
        "debiased": snr.clamp(max=1000).sqrt(),
    }
    assert set(wanted) == set(WEIGHTINGS)
    for name, clean in wanted.items():
        for process, divisor in ((EPSILON, snr), (VELOCITY, snr + 1)):
            ours = loss_weights(process, TIMES, name, 5.0).double()
            torch.testing.assert_close(ours, clean / divisor, rtol=1e-4, atol=1e-6)
    debiased = loss_weights(EPSILON, TIMES, "debiased", 5.0).double()
    torch.testing.assert_close(debiased[100:], snr[100:].rsqrt(), rtol=1e-4, atol=0)
    for process in (EPSILON, VELOCITY):
        assert torch.equal(process.loss_weights(TIMES, 5.0), loss_weights(process, TIMES, "min_snr", 5.0))
        assert torch.equal(loss_weights(process, TIMES, "min_snr", 0.0), torch.ones(1000))


def test_the_pure_noise_step_counts_where_a_schedule_has_one() -> None:
    snr = ratio(TERMINAL)
    assert float(snr[-1]) == 0.0
    wanted = torch.minimum(snr + 1, torch.tensor(5.0)) / (snr + 1)
    torch.testing.assert_close(TERMINAL.loss_weights(TIMES, 5.0).double(), wanted, rtol=1e-4, atol=1e-6)
    for weighting in WEIGHTINGS:
        weights = loss_weights(TERMINAL, TIMES, weighting, 5.0)
        assert float(weights[-1]) > 0.8 and bool(torch.isfinite(weights).all())
    assert float(VELOCITY.loss_weights(TIMES, 5.0)[-1]) < 0.01  # as the papers have it without one


def drawn(**values: Any) -> Tensor:
    settings = TrainingConfig(**values)
    generator = torch.Generator().manual_seed(1)
    return torch.cat([draw_timestep(EPSILON, generator, settings) for _ in range(4000)]).double()


def test_timesteps_come_from_the_range_in_the_distribution_asked_for() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.cat([EPSILON.draw_timesteps(1, generator) for _ in range(4000)]).double()
    assert torch.equal(drawn(), plain)  # as always, bit for bit
    ranged = drawn(min_timestep=200, max_timestep=600)
    assert 200 <= int(ranged.min()) < 205 and 594 < int(ranged.max()) <= 599
    assert float(ranged.mean()) == pytest.approx(399.5, abs=10)
    assert set(drawn(min_timestep=999).tolist()) == {999.0}
    middle = drawn(timestep_distribution="logit_normal")
    # of a standard normal number, 68.3 % lie within one deviation
    within = ((middle > 1000 / (1 + math.e)) & (middle < 1000 / (1 + 1 / math.e))).double().mean()
    assert float(within) == pytest.approx(0.683, abs=0.03)
    low, high = drawn(timestep_distribution="low_noise"), drawn(timestep_distribution="high_noise")
    assert float((low < 250).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((high >= 750).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_multires_noise_is_coarser_and_of_deviation_one() -> None:
    def generator(seed: int = 4) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    noise = draw_noise((1, 4, 64, 64), generator())
    several = torch.cat(
        [multires_noise(noise, generator(seed), iterations=6, discount=0.8) for seed in range(20)]
    )
    assert several.std(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 20, abs=1e-4)
    blocks, plain = (nn.functional.avg_pool2d(values, 16) for values in (several, noise))
    assert float(blocks.std()) > 3 * float(plain.std())  # what is left of it at 1/16 of the resolution
    first = multires_noise(noise, generator(), iterations=6, discount=0.3)
    assert torch.equal(first, multires_noise(noise, generator(), iterations=6, discount=0.3))
    narrow = multires_noise(noise[:, :, :1], generator(), iterations=6, discount=0.3)
    assert narrow.shape == (1, 4, 1, 64)


Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    folder = image_folder()

    def make(*overrides: str) -> Config:
        usual = (
            *("adapter.rank=4", "training.batch_size=4", "data.validation=0", "sample.prompts=[]"),
            *("training.device=cpu", "training.precision=fp32", "training.steps=4"),
        )
        values = {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / "run",
            "data.cache_folder": tmp_path / "cache",
        }
        return load_config(None, [*usual, *overrides], values)

    return make


def prepared(config: Config) -> Run:
    return prepare_run(config, resume=False, emit=Emitter(()))


def rows(batch: Any, chosen: Sequence[int]) -> Any:
    """Return some images of a batch."""
    picked = list(chosen)
    tuples = {
        name: tuple(getattr(batch, name)[row] for row in picked)
        for name in ("captions", "sizes", "names", "regularisation", "visits")
    }
    text = {name: tensor[picked] for name, tensor in batch.text.items()}
    return replace(batch, latents=batch.latents[picked], weights=batch.weights[picked], text=text, **tuples)


ALL = (
    *("training.loss=huber", "training.loss_weighting=debiased", "training.timestep_distribution=high_noise"),
    *("training.max_timestep=900", "training.multires_noise_iterations=4", "training.input_perturbation=0.1"),
    *("adapter.rank_dropout=0.3", "adapter.module_dropout=0.2", "optimizer.max_update_norm=0.001"),
)


def check_header(run: Run) -> None:
    header = adapter_file(run).info.metadata
    wanted = {
        "ss_loss_type": "huber",
        "ss_huber_schedule": "snr",
        "ss_huber_c": "0.1",
        "ss_debiased_estimation": "True",
        "ss_min_snr_gamma": "None",
        "ss_multires_noise_iterations": "4",
        "ss_multires_noise_discount": "0.3",
        "ss_ip_noise_gamma": "0.1",
        "ss_scale_weight_norms": "0.001",
        "modelspec.timestep_range": "0,900",
    }
    assert {key: header.get(key) for key in wanted} == wanted
    assert json.loads(header["ss_network_args"]) == {"rank_dropout": "0.3", "module_dropout": "0.2"}


def test_what_is_drawn_for_an_image_is_the_same_in_any_company(settings: Settings) -> None:
    run = prepared(settings(*ALL, "adapter.targets=all"))
    with run.loader:
        check_any_company(run)


def check_any_company(run: Run) -> None:
    batches = [ready.batch for step in range(4) for ready in run.loader.step(step)]
    batch = max(batches, key=lambda batch: len(batch.names))
    count = len(batch.names)
    for group in run.groups:  # the up factors start at zero, where dropout changes nothing
        values = torch.randn(group.master.flat.shape, generator=torch.Generator().manual_seed(3))
        group.master.load(0.1 * values)
    parts = run.trainable.random_parts

    def losses(chosen: Sequence[int], *, draw: bool = True) -> Tensor:
        if draw:
            run.leave_out_parts(rows(batch, chosen))
        weighted, plain = loss_of(run.model, rows(batch, chosen), run.config)
        return torch.stack([weighted.detach(), plain])

    together = losses(range(count))
    alone = torch.cat([losses([row]) for row in range(count)], 1)
    turned = losses(range(count)[::-1]).flip(1)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned, together, rtol=1e-4, atol=1e-6)
    assert len(set(together[0].tolist())) == count > 1 and not torch.allclose(together[0], together[1])
    assert parts is not None
    parts.draw([torch.Generator().manual_seed(row) for row in range(count)])
    assert not torch.allclose(losses(range(count), draw=False), together)  # of another draw
    train_step(run)
    pairs = run.masters().pairs.values()
    norms = [float((pair.up.flatten(1) @ pair.down.flatten(1)).norm() * pair.scale) for pair in pairs]
    assert len(norms) > 20 and max(norms) == pytest.approx(0.001, rel=1e-3)  # optimizer.max_update_norm
    check_header(run)


def test_shares_of_the_ranks_and_layers_are_left_out_and_the_mean_stays(settings: Settings) -> None:
    run = prepared(settings("adapter.rank_dropout=0.25", "adapter.module_dropout=0.5", "adapter.targets=all"))
    parts = run.trainable.random_parts
    denoiser = run.model.components()[run.model.info.denoiser.component]
    spatial, flat = 0, 0
    for layer in run.trainable.layers[::4]:
        down = layer.parameters["lora_down.weight"]
        (module,) = [module for module in denoiser.modules() if getattr(module, "weight", None) is down]
        inputs = torch.ones(400, *down.shape[1:])
        whole = module.eval()(inputs)
        assert parts is not None
        parts.draw([torch.Generator().manual_seed(seed) for seed in range(400)])
        assert torch.equal(module(inputs), whole)  # in eval mode nothing is left out
        shares = (module.train()(inputs) / whole).detach()
        kept = shares.reshape(400, 4, -1) if down.ndim == 4 else shares.reshape(400, -1, 4).transpose(1, 2)
        torch.testing.assert_close(kept, kept[:, :, :1].expand_as(kept))  # whole ranks
        there = kept[:, :, 0] != 0
        assert float(there.any(1).double().mean()) == pytest.approx(0.5, abs=0.1)
        assert float(there[there.any(1)].double().mean()) == pytest.approx(0.75, abs=0.06)
        assert float(kept.mean()) == pytest.approx(1.0, abs=0.25)
        spatial, flat = spatial + (down.ndim == 4), flat + (down.ndim == 2)
    assert spatial > 2 and flat > 2


def test_a_text_encoder_learns_up_to_its_share_of_the_run(settings: Settings) -> None:
    more = ("adapter.text_encoder=true", "optimizer.text_encoder_until=0.5", "optimizer.warmup_steps=0")
    run = prepared(settings(*more, "optimizer.lora_plus_ratio=4", "optimizer.schedule=constant"))
    seen = []
    with run.loader:
        for _ in range(4):
            step = launch_step(run)
            seen.append({group.name: group.master.flat.detach().clone() for group in run.groups})
    changed = [
        {name: not torch.equal(before[name], after[name]) for name in before}
        for before, after in pairwise(seen)
    ]
    names = ("unet", "unet x4.0", "text_encoder", "text_encoder x4.0")
    stays = {name: name.startswith("unet") for name in names}
    assert changed == [dict.fromkeys(names, True), stays, stays]
    base = run.groups[0].learning_rate
    shares = {name: rate / base for name, rate in step.rates.items()}
    assert shares == pytest.approx(dict(zip(names, (1.0, 4.0, 0.2, 0.8), strict=True)))


def problems(values: dict[str, Any]) -> list[str]:
    return contradictions(Config().with_values(values))


def test_what_cannot_be_meant_together_is_said() -> None:
    fine = {"training.loss": "huber", "training.huber_c": 0.5, "training.min_snr_gamma": 1.0}
    assert problems(fine) == []
    debiased: dict[str, Any] = {"training.loss_weighting": "debiased", "training.min_snr_gamma": 1.0}
    soft: dict[str, Any] = {"training.loss_weighting": "soft_min_snr", "training.min_snr_gamma": 0.0}
    limited: dict[str, Any] = {"optimizer.max_update_norm": 1.0}
    for values, text in (
        ({"training.huber_c": 0.5}, "`training.huber_c` has no effect with `training.loss=l2`"),
        (debiased, "`training.min_snr_gamma` has no"),
        (soft, "soft_min_snr` has no effect"),
        ({"training.min_timestep": 600, "training.max_timestep": 500}, "no timestep is left"),
        ({"training.noise_offset": 0.1, "training.multires_noise_iterations": 6}, "use one of them"),
        ({"training.multires_noise_discount": 0.5}, "`training.multires_noise_discount` has no effect"),
        ({"adapter.rank_dropout": 0.1, "adapter.kind": "dora"}, "plain LoRA, which dora lacks"),
        ({"adapter.module_dropout": 0.1, "adapter.init": "pissa"}, "`adapter.init=pissa` subtracts"),
        ({**limited, "adapter.kind": "loha"}, "`optimizer.max_update_norm=1` scales"),
        ({**limited, "adapter.init": "olora"}, "`adapter.init=olora`"),
        ({**limited, "optimizer.name": "adamw_schedulefree"}, "values of its own"),
        ({"optimizer.text_encoder_until": 0.5}, "no effect without `adapter.text_encoder=true`"),
    ):
        (problem,) = problems(values)
        assert text in problem


def test_weights_that_need_a_signal_to_noise_ratio_are_refused_for_other_noise() -> None:
    class Flow:
        prediction = EPSILON.prediction

    flow: Any = Flow()
    check_objective(flow, TrainingConfig())
    check_objective(EPSILON, TrainingConfig(loss="huber"))
    for values in ({"loss": "huber"}, {"loss_weighting": "debiased"}):
        with pytest.raises(ConfigError, match=r"`: the noise of a base that predicts epsilon has no such"):
            check_objective(flow, TrainingConfig.model_validate(values))


def test_that_a_schedule_ending_in_noise_is_weighed_otherwise_is_told(settings: Settings) -> None:
    events: list[Event] = []
    config = settings("model.prediction_type=v_prediction", "model.zero_terminal_snr=true")
    prepare_run(config, resume=False, emit=Emitter((events.append,)))
    decided = [event for event in events if isinstance(event, Decided)]
    (told,) = [event for event in decided if event.key == "training.loss_weighting"]
    assert "weighs snr + 1" in told.reason and told.value == "min_snr"
