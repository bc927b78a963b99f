"""The memory plan against what torch really allocates."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sdlora.adapters.attach import attach, create_adapter
from sdlora.adapters.folded import folded
from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.errors import TrainingError
from sdlora.events import Emitter
from sdlora.families.attention import choose_attentions
from sdlora.families.base import SizeHint
from sdlora.families.loading import load_model
from sdlora.generation.render import GenerateRequest, encode_prompts, render
from sdlora.training.masters import MasterWeights
from sdlora.training.memory import (
    MemoryPlan,
    free_memory,
    plan_memory,
    refuse_what_cannot_fit,
)
from sdlora.training.memory_count import counting_memory
from sdlora.training.run import prepare_run
from sdlora.training.validation import measure
from tools.measure_step import measure_memory, most_allocated
from tools.measure_step import settings as run_settings

GIB = 2**30
CPU, META = torch.device("cpu"), torch.device("meta")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


FIXED = ("adapter.rank=8", "adapter.alpha=8", "training.device=cpu", "training.batch_size=4")


def settings(*overrides: str) -> Config:
    return load_config(None, [*FIXED, *overrides])


def planned(base: str, config: Config, free: int | None = None) -> MemoryPlan:
    dtype = DTYPES[config.training.precision or "fp32"]
    attention = choose_attentions("auto", CPU, dtype)
    base_format = config.training.base_format or "full"
    blueprint = partial(
        load_model, base, dtype=dtype, device=META, attention=attention, base_format=base_format
    )
    return plan_memory(config, blueprint, free=free)


def allocated(base: str, config: Config) -> int:
    """Return the most bytes that two true training steps have allocated at once, as torch's profiler says."""
    side, count = config.data.resolution, config.training.batch_size
    assert side is not None and count is not None
    dtype, base_format = DTYPES[config.training.precision or "fp32"], config.training.base_format or "full"
    model = load_model(base, dtype=dtype, device=CPU, base_format=base_format)
    weights = create_adapter(model, config.adapter, 0)
    layers = attach(model, weights, "run")
    pairs = [weights.pairs[layer.key] for layer in layers]
    parameters = [parameter for layer in layers for parameter in (layer.down, layer.up)]
    master = MasterWeights(parameters, [t for pair in pairs for t in (pair.down, pair.up)])
    optimizer = torch.optim.AdamW([master.flat])
    text_trained = config.adapter.adapts_text
    model.prepare(training=True, gradient_checkpointing=config.training.rung != "nothing")
    with torch.no_grad():
        cached = model.encode_text([""] * count)

    def step() -> None:
        text = model.encode_text([""] * count) if text_trained else cached
        latents = torch.zeros((count, *model.facts.latents.shape(side, side)))
        sizes = [SizeHint((side, side), (0, 0), (side, side))] * count
        prediction = model.predict(latents, torch.full((count,), 500), text, sizes)
        prediction.square().mean().backward()
        master.collect()
        optimizer.step()
        master.publish()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    return most_allocated(record)


CASES = {
    "mini, checkpointed": ("mini", "data.resolution=96", "training.recompute=blocks"),
    "mini, text": (
        *("mini", "data.resolution=64", "adapter.text_encoder=true"),
        *("adapter.text_encoder_rank=8", "adapter.text_encoder_alpha=8"),
    ),
    "mini, bf16, all": ("mini", "data.resolution=64", "training.precision=bf16", "adapter.targets=all"),
    "sdxl": ("sdxl", "data.resolution=256"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "mini, text" else [pytest.mark.long]) for name in CASES]
)
def test_the_planned_peak_is_within_15_percent_of_what_torch_allocates(case: str, narrow_sdxl: Path) -> None:
    base, *overrides = CASES[case]
    config = settings(*overrides)
    base = str(narrow_sdxl) if base == "sdxl" else base
    plan, true = planned(base, config), allocated(base, config)
    assert true > 2**20
    assert plan.activations == pytest.approx(true, rel=0.15)


@pytest.mark.long
def test_weights_and_adapter_are_counted_exactly() -> None:
    config = settings("data.resolution=64")
    plan = planned("mini", config)
    model = load_model("mini", dtype=torch.float32, device=CPU)
    modules = (model.unet, model.vae, *model.text_encoders.values())
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    assert plan.weights == sum(t.numel() * t.element_size() for t in tensors)
    pairs = create_adapter(model, config.adapter, 0).pairs
    sizes = {key.path: pair.down.numel() + pair.up.numel() for key, pair in pairs.items()}
    # layers without bias are computed together, from copies with a gradient of their own
    joined = sum(size for path, size in sizes.items() if path.endswith(("to_q", "to_k", "to_v")))
    # fp32: master, two moments, and the model's own gradient buffer; the sum of several micro-batches'
    assert plan.adapter == 16 * sum(sizes.values()) + 8 * joined
    alone = planned("mini", settings("data.resolution=64", "training.fast=off"))
    assert alone.adapter == 16 * sum(sizes.values())
    summing = planned("mini", settings("data.resolution=64", "training.gradient_accumulation=2"))
    assert summing.adapter == plan.adapter + 4 * sum(sizes.values())


@pytest.mark.long
def test_a_quantised_base_is_counted_exactly_and_no_layers_are_joined_over_it() -> None:
    config = settings("data.resolution=64", "training.base_format=nf4")
    plan = planned("mini", config)
    model = load_model("mini", dtype=torch.float32, device=CPU, base_format="nf4")
    modules = (model.unet, model.vae, *model.text_encoders.values())
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    assert plan.weights == sum(t.numel() * t.element_size() for t in tensors)
    pairs = create_adapter(model, config.adapter, 0).pairs
    # master, its two moments, the layer's gradient; the masters' gradients come when activations are gone
    assert plan.adapter == 16 * sum(pair.down.numel() + pair.up.numel() for pair in pairs.values())


def test_a_storage_is_counted_once_and_its_release_is_seen() -> None:
    with counting_memory() as memory:
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:]
        assert memory.alive == 4000
        second = first + 1
        assert (memory.alive, memory.peak) == (8000, 8000)
        alive = weakref.ref(second)
        del second
        assert alive() is None
        assert (memory.alive, memory.peak) == (4000, 8000)
        del first
        assert memory.alive == 4000, "a view keeps it alive"
        del view
        assert memory.alive == 0


def fake(free: int, needs: Mapping[tuple[bool, int], int]) -> tuple[MemoryPlan, Any]:
    def again(config: Config) -> MemoryPlan:
        key = (config.training.rung == "blocks", config.training.batch_size or 0)
        return MemoryPlan(0, 0, needs[key], free)

    return MemoryPlan(0, 0, needs[(False, 4)], free), again


def test_the_mildest_settings_that_fit_are_named() -> None:
    config = settings("data.resolution=512")
    needs = {(False, 4): 10 * GIB, (True, 4): 7 * GIB, (False, 1): 5 * GIB, (True, 1): 2 * GIB}
    plan, again = fake(6 * GIB, needs)
    with pytest.raises(TrainingError, match=r"10\.0 GiB.*6\.0 GiB free.*it fits with training\.batch_size=1"):
        refuse_what_cannot_fit(plan, config, CPU, again)
    plan, again = fake(9 * GIB, needs)
    warning = refuse_what_cannot_fit(plan, config, CPU, again)
    assert warning is not None and "training.recompute=blocks" in warning
    plan, again = fake(11 * GIB, needs)
    assert refuse_what_cannot_fit(plan, config, CPU, again) is None
    plan, again = fake(GIB, needs)
    with pytest.raises(TrainingError, match="a device with more memory"):
        refuse_what_cannot_fit(plan, config, CPU, again)


def test_what_can_be_skipped_is_no_reason_to_refuse_a_run() -> None:
    config = settings("data.resolution=512")
    plan = MemoryPlan(GIB, 0, 3 * GIB, 5 * GIB, {"encoding": 2 * GIB, "previews": 7 * GIB})
    assert (plan.peak, plan.needed, plan.fits()) == (7 * GIB, 4 * GIB, True)
    warning = refuse_what_cannot_fit(plan, config, CPU, lambda other: plan)
    assert warning is not None
    assert "previews 7.0 GiB" in warning and "previews may not fit on cpu and are skipped" in warning
    needed = MemoryPlan(GIB, 0, 3 * GIB, 5 * GIB, {"encoding": 8 * GIB})
    with pytest.raises(TrainingError, match=r"8\.0 GiB .*encoding 8\.0 GiB; 5\.0 GiB free"):
        refuse_what_cannot_fit(needed, config, CPU, lambda other: needed)


@pytest.mark.parametrize("share", [pytest.param(0.35, marks=pytest.mark.long), 0.6])
def test_the_named_settings_do_fit(share: float) -> None:
    """On true counts, not on made-up ones."""
    sizes = ("data.resolution=128", "data.more_resolutions=[192]")
    config = settings(*sizes)
    free = int(planned("mini", config).peak * share)
    with pytest.raises(TrainingError, match="it fits with") as caught:
        refuse_what_cannot_fit(
            planned("mini", config, free), config, CPU, lambda other: planned("mini", other, free)
        )
    changes = str(caught.value).rpartition("it fits with ")[2].split()
    assert changes
    plan = planned("mini", settings(*sizes, *changes), free)
    assert plan.fits()


RUNS = {
    "usual": (),
    "projections made again": ("training.recompute=projections",),
    "whole blocks made again": ("training.recompute=blocks",),
    "two resolutions": ("data.more_resolutions=[96]",),
    "keeping what the base predicts of nothing": ("data.prior_preservation=0.5",),
    "captions in the loop": ("data.shuffle_tags=true", 'data.encode_captions="in loop"'),
}


@pytest.mark.parametrize(
    "run", [pytest.param(name, marks=[] if name == "usual" else [pytest.mark.long]) for name in RUNS]
)
def test_the_plan_of_a_whole_run_is_within_15_percent_of_all_that_is_alive(run: str, tmp_path: Path) -> None:
    """Weights, adapter, optimizer and activations of the real loop, counted without the plan's help."""
    given = (*FIXED, "data.resolution=64", "training.precision=fp32", *RUNS[run])
    config = run_settings("mini", tmp_path, *given, count=8, side=128)
    memory = measure_memory(config)
    assert memory.bytes > 50 * 2**20
    assert memory.ratio == pytest.approx(1, abs=0.15)


FORMATS = ("full", "fp8", "nf4")


@pytest.mark.parametrize("recompute", ["nothing", pytest.param("blocks", marks=pytest.mark.long)])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_validation_is_planned_by_the_paths_that_it_is_computed_by(
    targets: str, recompute: str, tmp_path: Path
) -> None:
    """Not by the reference: products together take more than PEFT's layers, convolutions of our own less."""
    shares = {}
    for base_format in FORMATS:
        given = (f"adapter.targets={targets}", f"training.base_format={base_format}", "data.validation=1")
        given += (f"training.recompute={recompute}", "training.device=cpu", "training.precision=fp32")
        work = tmp_path / base_format
        work.mkdir()
        config = run_settings(
            *("mini", work, "adapter.rank=8", "adapter.alpha=8", "training.batch_size=1"),
            *("data.resolution=64", "judge.every=0", "training.steps=2", *given),
            **{"count": 6, "side": 64},
        )
        run = prepare_run(config, resume=False, emit=Emitter(()))
        run.fast.use(run.paths())
        with run.loader, counting_memory() as memory:
            assert len(measure(run)) == 1
        plan = run.memory
        shares[base_format] = (plan.phases["validation"] - plan.weights - plan.adapter) / memory.peak
    assert shares == {name: pytest.approx(1, abs=0.05) for name in FORMATS}


@pytest.mark.long
def test_judging_beside_a_quantised_base_is_planned_by_how_it_draws(tmp_path: Path) -> None:
    """The update is worked out as large as each weight, which previews do not do."""
    config = run_settings(
        *("mini", tmp_path, "adapter.rank=8", "adapter.alpha=8", "training.batch_size=1"),
        *("data.resolution=64", "judge.every=2", "training.steps=2", "adapter.targets=all"),
        *("training.base_format=nf4", "training.device=cpu", "training.precision=fp32"),
        **{"count": 6, "side": 64},
    )
    run = prepare_run(config, resume=False, emit=Emitter(()))
    weights = run.masters()
    factors = sum(4 * t.numel() for update in weights.updates.values() for t in update.tensors().values())
    request = GenerateRequest("a fox", height=64, width=64, steps=1, guidance=4.0, sampler="ddim", seed=0)
    with run.loader:
        run.model.prepare(training=False, lean=True)
        encoded = encode_prompts(run.model, [request.prompt, ""])
        with folded(run.model, weights, 1.0), counting_memory() as memory:
            assert len(render(run.model, [request], encoded=encoded)) == 1
    counted = memory.peak + factors
    plan = run.memory
    assert (plan.phases["judging"] - plan.weights - plan.adapter) / counted == pytest.approx(1, abs=0.1)


@pytest.mark.long
def test_each_rung_of_recomputed_parts_is_planned_to_take_less() -> None:
    rungs = ("nothing", "norms", "gates", "projections", "blocks")
    sizes = [
        planned("mini", settings("data.resolution=64", f"training.recompute={rung}")).activations
        for rung in rungs
    ]
    assert sizes == sorted(set(sizes), reverse=True), dict(zip(rungs, sizes, strict=True))
    some = planned(
        "mini", settings("data.resolution=64", "training.recompute=blocks", "training.recompute_blocks=4")
    )
    assert sizes[-1] < some.activations < sizes[-2]
    left, whole = (
        planned("mini", settings("data.resolution=64", f"training.recompute={rung}", "training.fast=off"))
        for rung in ("norms", "blocks")
    )
    assert left.activations == whole.activations < sizes[0], "whole blocks, by diffusers' way"


def test_free_memory_is_told() -> None:
    num_bytes = free_memory(CPU)
    assert num_bytes is not None and num_bytes > 2**20
