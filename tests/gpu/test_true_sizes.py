"""SD1.5 at 512 px and SDXL at 1024 px on an NVIDIA GPU: random weights, true sizes, 50 steps.

``pytest -n 0 -s tests/gpu`` prints what is asked of such a machine: images a second, planned and measured
memory. ``benchmarks/bases.py memory`` and ``speed`` do the same with any base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.families.loading import load_model
from tools.measure_step import measure_memory, measure_speed, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
CUDA = torch.device("cuda")
RUNS = {"sd1": ("data.resolution=512", "training.batch_size=4"), "sdxl": ("data.resolution=1024",)}
USUAL = ("training.batch_size=1", "training.precision=bf16", "training.device=cuda", "training.steps=50")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", RUNS)
def test_the_plan_is_within_15_percent_of_the_peak(
    family: str, checkpointing: bool, true_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    saving = f"training.gradient_checkpointing={str(checkpointing).lower()}"  # its old name
    config = settings(str(true_checkpoint(family)), tmp_path, *USUAL, *RUNS[family], saving)
    memory = measure_memory(config)
    print(
        family, saving, f"planned {memory.plan.peak / 2**30:.2f} GiB, measured {memory.bytes / 2**30:.2f} GiB"
    )
    assert memory.ratio == pytest.approx(1, abs=0.15)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", RUNS)
def test_fifty_steps(family: str, true_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    figures = measure_speed(settings(str(true_checkpoint(family)), tmp_path, *USUAL, *RUNS[family]))
    print(torch.cuda.get_device_name(), family, figures)
    assert figures["steps"] == 50
    assert figures["loss"] is not None and 0 < figures["loss"] < 10


@pytest.mark.parametrize("family", RUNS)
def test_offloading_holds_one_component_at_a_time_and_changes_no_number(
    family: str, true_checkpoint: Callable[[str], Path]
) -> None:
    """On small cards: beside the U-Net nothing else is on the device while it works."""
    states = []
    for offload in (False, True):
        torch.cuda.empty_cache()
        model = load_model(str(true_checkpoint(family)), dtype=torch.float16, device=CUDA, offload=offload)
        model.prepare(training=False)
        with torch.no_grad():
            states.append(model.encode_text(["a cat"])["states"].float().cpu())
        if offload:
            on_device = {p.device.type for p in (*model.unet.parameters(), *model.vae.parameters())}
            assert on_device == {"cpu"}
        del model
    assert torch.equal(states[0], states[1])


def test_sdxls_autoencoder_gives_finite_latents_while_the_rest_is_fp16(
    true_checkpoint: Callable[[str], Path],
) -> None:
    model = load_model(str(true_checkpoint("sdxl")), dtype=torch.float16, device=CUDA)
    model.prepare(training=True, keep_images=True)
    pixels = torch.rand((1, 3, 512, 512), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert model.vae.dtype == torch.float32
    assert bool(torch.isfinite(model.encode_images(pixels).mean).all())
