"""The true SD1.5, SD2.1 and SDXL, random weights: loaded within their memory, trained, loaded again.

Slow and large (SDXL: 7 GB of disk and of memory), so only on request: ``pytest -n 0 -m slow -s`` and this
file; CI runs those of SD1.5. ``benchmarks/bases.py table`` takes all of them through all commands.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.adapters.attach import target_modules
from sdlora.config.schema import AdapterConfig
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import read_adapter
from tools.true_sizes import blueprint

COUNTS = {
    ("sd1", "attention"): {"unet": 128, "text_encoder": 48},
    ("sd2", "attention"): {"unet": 128, "text_encoder": 92},
    ("sdxl", "attention"): {"unet": 560, "text_encoder": 48, "text_encoder_2": 128},
    ("sd1", "linear"): {"unet": 192, "text_encoder": 72},
    ("sd1", "all"): {"unet": 278, "text_encoder": 72},
    ("sd2", "linear"): {"unet": 192, "text_encoder": 138},
    ("sd2", "all"): {"unet": 278, "text_encoder": 138},
    ("sdxl", "linear"): {"unet": 722, "text_encoder": 72, "text_encoder_2": 192},
    ("sdxl", "all"): {"unet": 788, "text_encoder": 72, "text_encoder_2": 192},
}
BASES = Path(__file__).parents[2] / "benchmarks" / "bases.py"


@pytest.mark.parametrize(("family", "targets"), COUNTS)
def test_module_counts_are_the_fields(family: str, targets: str) -> None:
    """Counted on blueprints of the true sizes, for which no weight is needed."""
    model = blueprint(family)
    config = AdapterConfig(targets=targets, text_encoder=True)  # type: ignore[arg-type]
    counted = Counter(key.component for key in target_modules(model, config))
    assert counted == COUNTS[family, targets]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux tells it")
@pytest.mark.parametrize(
    ("family", "precision"), [("sd1", "fp32"), ("sd1", "fp16"), ("sd2", "fp16"), ("sdxl", "bf16")]
)
def test_loading_takes_its_weights_and_at_most_one_gib_more(
    family: str, precision: str, true_checkpoint: Callable[[str], Path]
) -> None:
    command = [
        sys.executable,
        str(BASES),
        "load",
        "--base",
        str(true_checkpoint(family)),
        "--precision",
        precision,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    print(family, precision, answer)
    assert answer["family"] == family
    assert answer["weights_bytes"] > 2**30
    assert answer["extra_bytes"] < 2**30


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_true_checkpoint_trains_and_its_adapter_loads_again(
    family: str, true_checkpoint: Callable[[str], Path], image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    steps = 1 if family == "sdxl" else 3
    base = true_checkpoint(family)
    command = [
        *(sys.executable, "-m", "sdlora", "train", str(image_folder(count=2)), "--base", str(base)),
        *("--output", str(tmp_path / "run"), "--name", "true", "--json", f"training.steps={steps}"),
        *("data.resolution=128", "data.validation=0", "sample.prompts=[]", "training.batch_size=1"),
        *("training.precision=bf16", "adapter.rank=4", "training.device=cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(family, done.stdout.splitlines()[-1])
    adapter = read_adapter(Path(json.loads(done.stdout.splitlines()[-1])["adapter_file"]))
    assert adapter.info.family == family
    model = load_model(str(base), dtype=torch.bfloat16, device=torch.device("meta"))
    wanted = target_modules(model, AdapterConfig())
    assert sorted(adapter.weights.pairs) == wanted
