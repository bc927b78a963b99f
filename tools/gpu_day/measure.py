"""One job's process: ``python -m tools.gpu_day.measure JOB ... --answer FILE`` writes what it saw as JSON.

With ``--pretend LIBRARIES`` the card is the one of :mod:`tools.pretend_cuda`, which computes nothing. The
exit code is 1 where something is not as it must be; that is in the answer's ``faults``.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

EXACTNESS = {"fp32": (1e-3, 0.999), "fp16": (2e-2, 0.98), "bf16": (4e-2, 0.95)}
"""Number format -> (relative error of the loss at most, cosine to the CPU's gradient at least)."""


def main(arguments: list[str] | None = None) -> int:
    """Do one job."""
    given = _parser().parse_args(arguments)
    with ExitStack() as inside:
        if given.pretend is not None:
            inside.enter_context(_pretence(given.pretend))
        seen = JOBS[given.job](given)
    given.answer.write_text(json.dumps(seen, indent=1, default=str), encoding="utf-8")
    for fault in seen.get("faults", ()):
        print(f"FAULT: {fault}", file=sys.stderr)
    return int(bool(seen.get("faults")))


def _pretence(libraries: Path) -> Any:
    """Return the mode in which there is a card of 24 GiB that computes nothing."""
    from tools.pretend_cuda.cards import Card
    from tools.pretend_cuda.device import Cards
    from tools.pretend_cuda.dispatch import install
    from tools.pretend_cuda.ledger import Ledger

    return install(Cards((Card(),), libraries, Ledger()))


def _base(given: argparse.Namespace) -> dict[str, Any]:
    """Write a base: of the true size with random weights, or a narrow one."""
    from . import bases

    place = Path(given.base)
    place.parent.mkdir(parents=True, exist_ok=True)
    if given.narrow:
        bases.write_narrow(place, given.name)
        return {"faults": []}
    write = bases.write_true_folder if given.folder else bases.write_true
    return {"bytes": write(place, given.name), "faults": []}


def _train(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .paths import TRAINING
    from .train import measured, settings

    overrides = (f"training.steps={given.steps}", f"training.device={given.device}", *TRAINING[given.name])
    config = settings(given.base, given.work, f"train-{given.name}", *overrides, side=given.side)
    return measured(config, torch.device(given.device), numbers=given.pretend is None)


def _profile(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .paths import TRAINING
    from .train import profiled, settings

    overrides = (f"training.device={given.device}", "training.steps=1000", *TRAINING[given.name])
    overrides += ("sample.prompts=[]", "data.validation=0")
    config = settings(given.base, given.work, "profile", *overrides, side=given.side)
    return profiled(config, torch.device(given.device), min(given.steps, 5))


def _resume(given: argparse.Namespace) -> dict[str, Any]:
    from .paths import TRAINING
    from .train import resumed, settings

    overrides = (
        "training.steps=6",
        f"training.device={given.device}",
        "sample.prompts=[]",
        "data.validation=0",
    )
    config = settings(
        given.base, given.work, f"resume-{given.name}", *overrides, *TRAINING[given.name], side=given.side
    )
    if given.pretend is None:
        return resumed(config)
    from sdlora.training.train import train

    train(config)
    return {"faults": []}


def _exact(given: argparse.Namespace) -> dict[str, Any]:
    """Compare loss and gradient of every path in one number format with the CPU's; one path fails alone."""
    from .paths import EXACT

    seen: dict[str, Any] = {"paths": {}, "faults": []}
    for name in EXACT:
        try:
            seen["paths"][name] = _compared(given, name)
        except Exception as error:  # the other paths are still to be looked at
            traceback.print_exc()
            text = str(error).strip().splitlines()
            seen["paths"][name] = {"fault": f"{type(error).__name__}: {text[0] if text else ''}"}
        fault = seen["paths"][name].get("fault")
        if fault and name == "xformers" and fault.startswith("ConfigError"):  # it is not here
            seen["paths"][name] = {"skipped": fault}
        elif fault:
            seen["faults"].append(f"{name}: {fault}")
        given.answer.write_text(json.dumps(seen, indent=1, default=str), encoding="utf-8")
    return seen


def _compared(given: argparse.Namespace, name: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    from .paths import EXACT, TURNED
    from .train import gradient_of, settings

    def made(device: str, precision: str, *chosen: str) -> dict[str, torch.Tensor]:
        overrides = (f"training.device={device}", f"training.precision={precision}", *chosen)
        overrides += ("sample.prompts=[]", "data.validation=0", "training.steps=2", "adapter.rank=4")
        overrides += () if "training.batch_size" in " ".join(chosen) else ("training.batch_size=2",)
        loss, gradient = gradient_of(
            settings("mini", given.work, f"exact-{precision}", *overrides, side=64, count=4)
        )
        return {"loss": torch.tensor(loss, dtype=torch.float64), "gradient": gradient.double()}

    file = given.work / f"reference-{name}.safetensors"  # all formats are held against it
    if not file.is_file():
        chosen = tuple(text for text in EXACT[name] if text != "training.attention=xformers")
        save_file(made("cpu", "fp32", *chosen), file)
    results = load_file(file), made(given.device, given.name, *EXACT[name])
    losses = [float(result["loss"]) for result in results]
    reference, gradient = (result["gradient"] for result in results)
    cosine = float(torch.nn.functional.cosine_similarity(reference, gradient, dim=0))
    seen: dict[str, Any] = {
        "loss": losses[1],
        "reference": losses[0],
        "loss_error": abs(losses[1] - losses[0]) / abs(losses[0]),
        "gradient_length": float(gradient.norm() / reference.norm()),
        "cosine": None if name in TURNED else cosine,
    }
    most, least = EXACTNESS[given.name]
    right = seen["loss_error"] <= most and abs(seen["gradient_length"] - 1) <= 1 - least
    right = right and (name in TURNED or cosine >= least)
    if given.pretend is None and not right:  # NaN is not right either
        seen["fault"] = (
            f"loss {losses[1]:.5g} for {losses[0]:.5g}, gradient {seen['gradient_length']:.4f} times as "
            f"long, cosine {cosine:.4f}"
        )
    return seen


def _draw(given: argparse.Namespace) -> dict[str, Any]:
    from .draw import draw

    return draw(given.base, given.name, given.device, side=given.side, steps=given.steps)


def _images(given: argparse.Namespace) -> dict[str, Any]:
    from .draw import drawn_alike

    seen = drawn_alike(given.device, "cpu", side=64, steps=given.steps)
    return seen if given.pretend is None else {**seen, "faults": []}


def _doctor(given: argparse.Namespace) -> dict[str, Any]:
    """Print the page of ``sdlora doctor`` and nvidia-smi's, and return the facts."""
    import dataclasses
    import shutil
    import subprocess

    sys.argv = ["sdlora", "doctor"]
    code: object = 0
    try:
        runpy.run_module("sdlora", run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    if program := shutil.which("nvidia-smi"):
        print(subprocess.run([program], capture_output=True, text=True, timeout=60).stdout)
    from sdlora.machine import examine

    facts = dataclasses.asdict(examine())
    return {"facts": facts, "faults": [] if code == 0 else ["`sdlora doctor` says that something is missing"]}


def _processes(given: argparse.Namespace) -> dict[str, Any]:
    """Train in several processes, one a card, and compare with one process of as many micro-batches."""
    import subprocess

    import torch
    from safetensors.torch import load_file

    from sdlora.config.toml import save_config
    from sdlora.run_folder import list_checkpoints
    from sdlora.training.train import train

    from .train import settings

    count = min(4, torch.cuda.device_count()) if given.device == "cuda" else 2
    if count < 2 or given.pretend is not None:
        return {"skipped": "one process a card, and there is one card"}
    kind = (f"training.device={given.device}", "training.precision=fp32", "training.steps=4")
    kind += ("sample.prompts=[]", "data.validation=0")
    several = settings(given.base, given.work, "several", *kind, side=given.side)
    file = given.work / "several.toml"
    save_config(several, file)
    command = [sys.executable, "-m", "sdlora", "train", "--config", str(file), "--processes", str(count)]
    subprocess.run(command, check=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // count))))
    together = (*kind, f"training.gradient_accumulation={count}")
    train(settings(given.base, given.work, "one", *together, side=given.side))
    states = [
        load_file(list_checkpoints(given.work / run / "checkpoints")[-1].optimizer_file)
        for run in ("several", "one")
    ]
    distance = max(
        float((states[0][n] - states[1][n]).norm() / states[1][n].norm())
        for n in states[0]
        if n.endswith(".master")
    )
    equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    faults = [] if distance < 1e-2 else [f"{count} processes are {distance:.3g} off one"]
    return {"processes": count, "bit_equal": equal, "distance": distance, "faults": faults}


JOBS = {
    "base": _base,
    "doctor": _doctor,
    "draw": _draw,
    "exact": _exact,
    "images": _images,
    "processes": _processes,
    "profile": _profile,
    "resume": _resume,
    "train": _train,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day.measure", description=__doc__)
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("name", nargs="?", default="", help="of a path, a number format or a family")
    parser.add_argument("--answer", type=Path, required=True)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path())
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--folder", action="store_true")
    parser.add_argument("--pretend", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
