"""What only an NVIDIA GPU can show. Skipped, and said so, where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.events import Control, Emitter, Event, StepDone
from sdlora.families.base import SizeHint
from sdlora.families.loading import load_model
from sdlora.training.checkpoint import load_newest
from sdlora.training.memory import free_memory, plan_memory
from sdlora.training.run import prepare_run
from sdlora.training.step import train_step
from sdlora.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
CUDA, META = torch.device("cuda"), torch.device("meta")


def settings(folder: Path, tmp_path: Path, name: str, *overrides: str) -> Config:
    fixed = ("training.device=cuda", "data.validation=0", "sample.prompts=[]", "data.resolution=64")
    values = {
        "data.folder": folder,
        "data.cache_folder": tmp_path / "cache",
        "output.folder": tmp_path / name,
        "model.base": "mini",
    }
    return load_config(None, [*fixed, *overrides], values)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_in_every_precision(
    precision: str, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings(image_folder(), tmp_path, "run", f"training.precision={precision}", "training.steps=40")
    result = train(config)
    assert result.loss is not None and result.loss < 0.3
    assert result.adapter_file is not None and result.adapter_file.is_file()


def test_the_planned_memory_is_within_15_percent_of_the_peak(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings(image_folder(12), tmp_path, "run", "training.batch_size=8", "training.precision=bf16")
    run = prepare_run(config, resume=False, emit=Emitter(()))
    torch.cuda.reset_peak_memory_stats()
    train_step(run)
    train_step(run)
    measured = torch.cuda.max_memory_allocated()
    planned = plan_memory(
        run.config,
        lambda: load_model("mini", dtype=torch.bfloat16, device=META),
        free=free_memory(CUDA),
    )
    assert planned.peak == pytest.approx(measured, rel=0.15)


def test_drawing_and_training_devices_agree_within_rounding() -> None:
    collected = []
    for device in (torch.device("cpu"), CUDA):
        model = load_model("mini", dtype=torch.float32, device=device)
        model.prepare(training=False)
        with torch.no_grad():
            text = model.encode_text(["an icon of a cat"])
            noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            collected.append(
                model.predict(noisy, torch.tensor([300]), text, [SizeHint((64, 64), (0, 0), (64, 64))]).cpu()
            )
    torch.testing.assert_close(collected[0], collected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_xformers_and_torchs_own_attention_agree_within_rounding(dtype: torch.dtype) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed here")
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    collected = []
    for name in ("sdpa", "xformers"):
        model = load_model("mini", dtype=dtype, device=CUDA, attention=name)  # type: ignore[arg-type]
        model.prepare(training=False)
        with torch.no_grad():
            text = model.encode_text(["an icon of a cat"])
            collected.append(
                model.predict(noisy, torch.tensor([300]), text, [SizeHint((64, 64), (0, 0), (64, 64))])
            )
    scale = float(collected[0].square().mean().sqrt())
    assert float((collected[0] - collected[1]).abs().max()) < 0.05 * scale


def test_the_scaler_of_fp16_goes_on_where_it_was(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    given = ("training.precision=fp16", "training.steps=6", "training.checkpoint_every=3")
    config = settings(image_folder(), tmp_path, "run", *given)
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            control.stop()

    assert train(config, listeners=[stop], control=control).stopped
    saved = load_newest(tmp_path / "run" / "checkpoints", print).state["scaler"]
    run = prepare_run(config, resume=True, emit=Emitter(()))
    assert run.scaler.is_enabled() and run.scaler.get_scale() == saved["scale"]
    assert run.scaler.state_dict() == saved
    assert train(config, resume=True).step == 6
