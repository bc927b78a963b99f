"""The true SD1.5 and SDXL, random weights: loaded within their memory, trained, exported, loaded again.

Slow and large (SDXL: 7 GB of disk and of memory), so only on request: ``pytest -m slow tests/families``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.adapters.lora import target_modules
from sdlora.config import AdapterConfig
from sdlora.families.loading import load_model
from sdlora.formats import read_adapter

from .true_sizes import blueprint, write_checkpoint

COUNTS = {
    ("sd1", "linear"): {"unet": 192, "text_encoder": 72},
    ("sd1", "all"): {"unet": 278, "text_encoder": 72},
    ("sd2", "linear"): {"unet": 192, "text_encoder": 138},
    ("sd2", "all"): {"unet": 278, "text_encoder": 138},
    ("sdxl", "linear"): {"unet": 722, "text_encoder": 72, "text_encoder_2": 192},
    ("sdxl", "all"): {"unet": 788, "text_encoder": 72, "text_encoder_2": 192},
}
LOAD = """
import json, resource, sys, time, torch
import diffusers, transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from sdlora.families.loading import load_model
from sdlora.families.recognition import recognise
from pathlib import Path
began = time.perf_counter(); recognise(Path(sys.argv[1])); recognised = time.perf_counter() - began
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
began = time.perf_counter()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
modules = (model.unet, model.vae, *model.text_encoders.values())
weights = sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))
extra = peak - before - weights
print(json.dumps({"recognised": recognised, "seconds": seconds, "weights": weights, "extra": extra}))
"""


@pytest.mark.parametrize(("family", "targets"), COUNTS)
def test_module_counts_are_the_fields(family: str, targets: str) -> None:
    """Counted on blueprints of the true sizes, for which no weight is needed."""
    model = blueprint(family)
    config = AdapterConfig(targets=targets, text_encoder=True)  # type: ignore[arg-type]
    counted = Counter(key.component for key in target_modules(model, config))
    assert counted == COUNTS[family, targets]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("true")

    def make(family: str) -> Path:
        file = folder / f"{family}.safetensors"
        if not file.exists():
            write_checkpoint(file, family, torch.float16)
        return file

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("sd1", "float32"), ("sd1", "float16"), ("sd2", "float16"), ("sdxl", "bfloat16")]
)
def test_loading_takes_its_weights_and_at_most_one_gib_more(
    family: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    command = [sys.executable, "-c", LOAD, str(checkpoint(family)), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(family, dtype, found)
    assert found["recognised"] < 1.0
    assert found["extra"] < 2**30


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_true_checkpoint_trains_and_its_adapter_loads_again(
    family: str, checkpoint: Callable[[str], Path], picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    steps = 1 if family == "sdxl" else 3
    base = checkpoint(family)
    command = [
        *(sys.executable, "-m", "sdlora", "train", str(picture_folder(count=2)), "--base", str(base)),
        *("--output", str(tmp_path / "run"), "--name", "true", "--json", f"training.steps={steps}"),
        *("data.resolution=128", "data.validation=0", "sample.prompts=[]", "training.batch_size=1"),
        *("training.precision=bf16", "adapter.rank=4", "training.device=cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(family, done.stdout.splitlines()[-1])
    print("peak RSS of children, GiB:", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
    adapter = read_adapter(Path(json.loads(done.stdout.splitlines()[-1])["adapter_file"]))
    assert adapter.info.family == family
    model = load_model(str(base), dtype=torch.bfloat16, device=torch.device("meta"))
    wanted = target_modules(model, AdapterConfig())
    assert sorted(adapter.weights.pairs) == wanted
