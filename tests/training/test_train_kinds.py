"""Every kind of adapter, start, rate and block setting through the training loop on a tiny real base."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdlora.adapters.attach import attach, create_adapter, detach, set_strengths
from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey
from sdlora.adapters.kinds.dora import DoRA
from sdlora.adapters.kinds.loha import LoHa
from sdlora.adapters.kinds.lokr import LoKr, split_side
from sdlora.config.defaults import OpenSettings
from sdlora.config.schema import Config
from sdlora.config.toml import load_config, save_config
from sdlora.data.batching.prepare import base_facts
from sdlora.errors import ConfigError
from sdlora.events import Control, Emitter, Event, StepDone
from sdlora.families.base import DiffusionModel, SizeHint
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.run_folder import list_checkpoints
from sdlora.training.run import prepare_run
from sdlora.training.state import Run
from sdlora.training.step import train_step
from sdlora.training.train import TrainResult, train
from sdlora.training.warm_start import warm_start

Settings = Callable[..., Config]
CPU = torch.device("cpu")


USUAL = (
    *("training.batch_size=2", "data.validation=0", "sample.prompts=[]", "training.device=cpu"),
    *("training.precision=fp32", "training.steps=3", "data.resolution=32"),
)


@pytest.fixture
def settings(run_settings: Callable[..., Config], image_folder: Callable[..., Path]) -> Settings:
    folder = image_folder(4)

    def make(run: str, *overrides: str) -> Config:
        from_file = any(text.startswith("adapter.from_file") for text in overrides)  # has its rank
        usual = USUAL if from_file else (*USUAL, "adapter.rank=2")
        return run_settings(run, usual, overrides, {"data.folder": folder})

    return make


@torch.no_grad()
def output(model: DiffusionModel) -> Tensor:
    model.prepare(training=False)
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn((2, *model.facts.latents.shape(32, 32)), generator=generator)
    hints = [SizeHint((32, 32), (0, 0), (32, 32))] * 2
    text = model.encode_text(["an icon of a cat", "doughnut"])
    return model.predict(noisy, torch.tensor([20, 700]), text, hints)


def base_of(config: Config, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    return load_model(config.model.base, dtype=dtype, device=CPU)


def prepared(config: Config, resume: bool = False) -> Run:
    return prepare_run(config, resume=resume, emit=Emitter(()))


def last_checkpoint(result: TrainResult) -> Path:
    return list_checkpoints(result.folder / "checkpoints")[-1].path


def assert_equal_files(file: Path, other: Path) -> None:
    first, second = load_file(file), load_file(other)
    assert first.keys() == second.keys() and len(first) > 2
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


VARIANTS = {
    "dora": ("adapter.kind=dora", "adapter.text_encoder=true", "adapter.targets=all"),
    "loha": ("adapter.kind=loha", "adapter.targets=all"),
    "lokr": ("adapter.kind=lokr", "adapter.targets=all", "adapter.lokr_factor=4"),
    "pissa": ("adapter.init=pissa", "adapter.targets=linear"),
    "olora": ("adapter.init=olora", "adapter.targets=all", "training.precision=bf16"),
    "rates": (
        *("adapter.init=gaussian", "optimizer.lora_plus_ratio=16", "adapter.targets=linear"),
        'adapter.block_ranks={"down_blocks.0" = 4, "mid_block" = 0, "mid_block.attentions.*.proj_in" = 1}',
        'optimizer.block_rates={"up_blocks" = 0.5}',
    ),
    "rslora": ("adapter.scaling=rslora", "adapter.alpha=4", "adapter.rank=4"),
}


OFTEN = {"dora": (), "pissa": [pytest.mark.long]}


@pytest.mark.long
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=OFTEN.get(v, [pytest.mark.slow])) for v in VARIANTS]
)
def test_each_variant_starts_at_the_base_resumes_exactly_and_is_what_it_trained(
    variant: str, settings: Settings
) -> None:
    overrides = VARIANTS[variant]
    whole = settings("whole", *overrides)
    bf16 = whole.training.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = output(base_of(whole, dtype))
    close = {"rtol": 1e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(output(prepared(settings("fresh", *overrides)).model), base, **close)

    finished = train(whole)
    control = Control()

    def stop_at_one(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            control.stop()

    parts = settings("parts", *overrides)
    assert train(parts, listeners=[stop_at_one], control=control).stopped
    resumed = train(parts, resume=True)
    for file in ("optimizer.safetensors", "adapter.safetensors"):
        assert_equal_files(last_checkpoint(finished) / file, last_checkpoint(resumed) / file)
    assert finished.adapter_file is not None and resumed.adapter_file is not None
    assert_equal_files(finished.adapter_file, resumed.adapter_file)

    weights = read_adapter(last_checkpoint(finished) / "adapter.safetensors").weights
    trained = output(prepared(whole, resume=True).model)
    assert float((trained - base).abs().max()) > 1e-4
    model = base_of(whole, dtype)
    attach(model, weights, "trained")
    if not bf16:
        torch.testing.assert_close(output(model), trained, rtol=1e-3, atol=1e-4)
    set_strengths(model, {"trained": 0.0})
    assert torch.equal(output(model), base)
    detach(model, "trained")
    check_kind(variant, weights)


def check_kind(variant: str, weights: AdapterWeights) -> None:
    kind = variant if variant in ("dora", "loha", "lokr") else "lora"
    assert weights.kinds() == {kind: len(weights)} and len(weights) > 20
    if variant in ("pissa", "olora"):
        assert weights.ranks()[-1] == 4
    if variant == "rslora":
        assert {pair.alpha for pair in weights.pairs.values()} == {4 * math.sqrt(4)}
    if variant == "rates":
        ranks = {key.path: pair.rank for key, pair in weights.items()}
        assert {rank for path, rank in ranks.items() if path.startswith("down_blocks.0")} == {4}
        assert {path: rank for path, rank in ranks.items() if path.startswith("mid_block")} == {
            "mid_block.attentions.0.proj_in": 1
        }
        assert {pair.scale for pair in weights.pairs.values()} == {1.0}


@pytest.mark.long
@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_lycoris_kinds_start_at_the_base_and_every_layer_learns(variant: str, settings: Settings) -> None:
    config = settings("run", *VARIANTS[variant])
    run = prepared(config)
    assert torch.equal(output(run.model), output(base_of(config)))
    before = run.trainable.masters()
    run.model.prepare(training=True)
    train_step(run)
    after = run.trainable.masters()
    assert after.kinds() == {variant: len(before)} and len(before) > 20
    for key, update in after.all_items():
        assert float(update.delta().abs().max()) > 0 == float(before.updates[key].delta().abs().max()), key


@pytest.mark.long
def test_dora_in_bf16_starts_at_the_base_and_keeps_its_magnitudes_in_fp32(settings: Settings) -> None:
    config = settings("run", "adapter.kind=dora", "adapter.targets=all", "training.precision=bf16")
    base = base_of(config, torch.bfloat16)
    run = prepared(config)
    torch.testing.assert_close(output(run.model), output(base), rtol=1e-2, atol=2e-2)
    magnitudes = [layer.parameters["dora_scale"] for layer in run.trainable.layers]
    assert {tensor.dtype for tensor in magnitudes} == {torch.float32}
    for layer in run.trainable.layers:
        update = layer.rebuilt({name: p.detach() for name, p in layer.parameters.items()})
        weight = base.components()["unet"].get_submodule(layer.key.path).weight.detach().float()
        assert isinstance(update, DoRA) and isinstance(weight, Tensor)
        torch.testing.assert_close(update.merged(weight), weight, rtol=1e-5, atol=1e-6)
    before = [tensor.detach().clone() for tensor in magnitudes]
    run.model.prepare(training=True)
    train_step(run)
    assert not any(torch.equal(tensor, old) for tensor, old in zip(magnitudes, before, strict=True))


def test_weight_decay_pulls_the_factors_of_dora_and_not_its_magnitudes(settings: Settings) -> None:
    config = settings(
        *("run", "adapter.kind=dora", "optimizer.weight_decay=0.5", "optimizer.learning_rate=0.1"),
        *("optimizer.schedule=constant", "optimizer.warmup_steps=0"),
    )
    run = prepared(config)
    before = {group.name: group.master.flat.detach().clone() for group in run.groups}
    assert set(before) == {"unet", "unet magnitude"}
    for group in run.groups:  # without a gradient nothing but the decay moves anything
        group.master.collect()
        assert group.master.flat.grad is not None and not group.master.flat.grad.any()
    run.optimizer.step()
    factors, magnitudes = (group.master.flat.detach() for group in run.groups)
    assert torch.equal(magnitudes, before["unet magnitude"]) and float(magnitudes.abs().min()) > 0
    torch.testing.assert_close(factors, before["unet"] * (1 - 0.1 * 0.5))
    assert factors.any()


def test_the_first_step_moves_each_group_by_its_own_rate(settings: Settings) -> None:
    config = settings(
        *("run", "optimizer.lora_plus_ratio=4", "optimizer.learning_rate=1e-3", "adapter.init=gaussian"),
        *("optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.weight_decay=0"),
        *('optimizer.block_rates={"unet.mid_block" = 0.5}', "optimizer.text_encoder_learning_rate=2e-4"),
        "adapter.text_encoder=true",
    )
    run = prepared(config)
    before = run.trainable.masters()
    train_step(run)
    train_step(run)  # B is zero at first, so A has a gradient only in the second step
    after = run.trainable.masters()
    names = [group.name for group in run.groups]
    assert names == ["unet", "unet x0.5", "unet x2.0", "unet x4.0", "text_encoder", "text_encoder x4.0"]
    for key, pair in after.items():
        rate = 2e-4 if key.component == "text_encoder" else 1e-3
        rate *= 0.5 if key.path.startswith("mid_block") else 1.0
        moved_up = (pair.up - before.pairs[key].up).abs()
        moved_down = (pair.down - before.pairs[key].down).abs()
        # AdamW moves every value by about the rate in its first steps, whatever the gradient's size
        assert 0.5 * 4 * rate < float(moved_up.max()) < 2.1 * 4 * rate, key
        assert 0.2 * rate < float(moved_down.max()) < 2.1 * rate, key


def test_pissa_takes_the_largest_singular_values_and_leaves_the_base_alone(settings: Settings) -> None:
    config = settings("run", "adapter.init=pissa", "adapter.alpha=4")
    run, base = prepared(config), base_of(config)
    assert run.trainable.start is not None
    for component in run.model.components():
        theirs = {n: p for n, p in base.components()[component].state_dict().items()}
        ours = {
            name.replace(".base_layer", ""): tensor
            for name, tensor in run.model.components()[component].state_dict().items()
            if "lora_" not in name
        }
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    for layer in run.trainable.layers:
        weight = base.components()["unet"].get_submodule(layer.key.path).weight.detach()
        assert isinstance(weight, Tensor)
        u, sizes, v = torch.linalg.svd(weight.double(), full_matrices=False)
        wanted = (u[:, :2] * sizes[:2]) @ v[:2]
        # singular values of random weights lie close together, so the iteration is not quite through
        torch.testing.assert_close(layer.update.delta().double(), wanted, rtol=1e-2, atol=1e-3)
    masters = run.trainable.masters()
    assert max(float(pair.delta().abs().max()) for pair in masters.pairs.values()) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["loha", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora", "dora", "lokr"))]
)
def test_a_run_goes_on_from_a_file_of_any_kind_with_its_ranks_and_alphas(
    kind: str, settings: Settings
) -> None:
    first = train(settings("first", f"adapter.kind={kind}", "adapter.alpha=3", "adapter.rank=3"))
    assert first.adapter_file is not None
    file = read_adapter(first.adapter_file)
    config = settings(
        *("second", f"adapter.kind={kind}", "training.steps=1"),
        f"adapter.from_file={first.adapter_file.as_posix()}",
    )
    run = prepared(config)
    assert run.config.adapter.alpha == 3.0 and run.config.adapter.rank in file.weights.ranks()
    start = run.trainable.masters()
    for key, update in file.weights.all_items():
        assert (start.updates[key].kind, start.updates[key].alpha) == (update.kind, update.alpha)
        for name, tensor in update.tensors().items():
            assert torch.equal(start.updates[key].tensors()[name], tensor.float()), (key, name)
    model = base_of(config)
    attach(model, file.weights, "file")
    torch.testing.assert_close(output(run.model), output(model), rtol=1e-4, atol=1e-5)


def test_contradictions_with_the_file_are_errors(settings: Settings, tmp_path: Path) -> None:
    model = base_of(settings("probe"))
    adapter = settings("probe", "adapter.rank=3", "adapter.alpha=1.5").adapter
    target = tmp_path / "first.safetensors"
    info = AdapterInfo(metadata={"ss_base_model_version": "sd_v1"})
    file = AdapterFile(create_adapter(model, adapter, 0), info)
    write_adapter(file, "webui", target, torch.float32, model.info)
    given = f"adapter.from_file={target.as_posix()}"
    wrong = {
        "adapter.rank=4": r"adapter.rank=4` contradicts .* whose layers have 3",
        "adapter.alpha=9": r"adapter.alpha=9.0` contradicts .* whose layers have 1.5",
        "adapter.kind=loha": r"which holds LoRA; set adapter.kind=lora",
        "adapter.text_encoder=true": r"does not adapt the text_encoder; set adapter.text_encoder=false",
        "adapter.targets=all": r"adapter.targets=all` contradicts",
    }
    for override, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            warm_start(OpenSettings(settings("wrong", given, override), base_facts(model, "cpu")), model)
    right = OpenSettings(settings("right", given, "adapter.rank=3"), base_facts(model, "cpu"))
    weights, chosen = warm_start(right, model), right.final().adapter
    assert (chosen.rank, chosen.alpha, len(weights)) == (3, 1.5, len(file.weights))
    assert [default.key for default in right.defaults] == ["adapter.alpha"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter.kind=loha", "adapter.dropout=0.1"), "adapter.dropout.*loha does not have"),
        (("adapter.kind=lokr", "optimizer.lora_plus_ratio=2"), "lora_plus_ratio"),
        (("adapter.kind=loha", "adapter.init=pissa"), "adapter.init=pissa"),
        (("adapter.kind=dora", "adapter.init=olora"), "cannot be undone in a DoRA file"),
        (("adapter.lokr_factor=4",), "without `adapter.kind=lokr`"),
        (("adapter.scaling=rslora",), "without `adapter.alpha`"),
        (("adapter.from_file=x.safetensors", "adapter.init=gaussian"), "both fix the start"),
        (("adapter.from_file=x.safetensors", "adapter.block_ranks={mid_block = 2}"), "block_ranks"),
        (("adapter.block_ranks={mid_block = -1}",), "adapter.block_ranks"),
    ],
)
def test_settings_without_effect_are_errors(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_a_pattern_that_matches_no_layer_is_an_error_with_the_blocks_there_are(settings: Settings) -> None:
    for key in ("adapter.block_ranks", "optimizer.block_rates"):
        with pytest.raises(
            ConfigError, match=rf"{key}`: `down_blocks.7` matches no adapted layer.*mid_block"
        ):
            prepared(settings("run", f'{key}={{"down_blocks.7" = 1}}'))
    with pytest.raises(ConfigError, match="leaves no layer to adapt"):
        prepared(settings("run", "adapter.block_ranks={unet = 0}"))


def test_tables_survive_the_settings_file(tmp_path: Path) -> None:
    config = load_config(
        None, ['adapter.block_ranks={"down_blocks.1" = 4, mid_block = 0}', "optimizer.block_rates={a = 0.5}"]
    )
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    assert config.adapter.block_ranks == {"down_blocks.1": 4, "mid_block": 0}


def test_a_tucker_locon_goes_on_as_the_plain_lora_it_is(settings: Settings, tmp_path: Path) -> None:
    from adapters.kinds import tucker

    key = ModuleKey("unet", "mid_block.resnets.0.conv1")
    config = settings("probe")
    shape = tuple(base_of(config).components()["unet"].get_submodule(key.path).weight.shape)
    update = tucker(shape)
    info = AdapterInfo(metadata={"ss_base_model_version": "sd_v1"})
    family = base_of(config).info
    file = tmp_path / "locon.safetensors"
    write_adapter(AdapterFile(AdapterWeights({key: update}), info), "webui", file, torch.float32, family)
    run = prepared(settings("run", f"adapter.from_file={file.as_posix()}"))
    (actual,) = run.trainable.masters().updates.values()
    assert isinstance(actual, LowRankPair) and (actual.rank, actual.alpha) == (update.rank, update.alpha)
    torch.testing.assert_close(actual.delta(), update.delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_defaults_follow_the_kind(settings: Settings) -> None:
    loha = prepared(settings("loha", "adapter.kind=loha", "adapter.rank=2")).config
    assert (loha.adapter.alpha, loha.optimizer.learning_rate) == (1.0, 1e-4)
    doubled = prepared(settings("doubled", "adapter.kind=loha", "adapter.alpha=2")).config
    assert doubled.optimizer.learning_rate == 5e-5
    rslora = prepared(
        settings("rslora", "adapter.scaling=rslora", "adapter.rank=4", "adapter.alpha=4")
    ).config
    assert rslora.optimizer.learning_rate == 5e-5


@pytest.mark.long
def test_lokr_factors_follow_the_sides_of_the_layer(settings: Settings) -> None:
    assert [split_side(size, None) for size in (320, 640, 768, 1280)] == [
        (16, 20),
        (20, 32),
        (24, 32),
        (32, 40),
    ]
    assert [split_side(size, 8) for size in (320, 12, 7)] == [(8, 40), (3, 4), (1, 7)]
    run = prepared(settings("run", "adapter.kind=lokr", "adapter.targets=all", "adapter.rank=4"))
    forms = {len(layer.update.tensors()) for layer in run.trainable.layers}
    assert forms == {2, 3}  # both full, and the second decomposed
    assert all(
        isinstance(layer.update, LoKr) and layer.update.w1 is not None for layer in run.trainable.layers
    )
    loha = prepared(settings("loha", "adapter.kind=loha"))
    assert all(isinstance(layer.update, LoHa) and layer.update.rank == 2 for layer in loha.trainable.layers)
