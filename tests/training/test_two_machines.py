"""Two machines, as two network namespaces joined by one cable that is cut in mid-run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from patience import PATIENCE, wait_for
from safetensors.torch import load_file

from sdlora.config.schema import Config
from sdlora.config.toml import load_config, save_config
from sdlora.events import read_events
from sdlora.run_folder import list_checkpoints
from sdlora.training.train import train

Make = Callable[..., Path]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATIENT_SECONDS = 8  # what is waited for a process that does not report
STEPS = 70  # too few for a trial of ways to compute, which one process may decide otherwise on a busy machine
TCP_RETRIES = 5  # some 13 s
Rendezvous = Callable[[int], list[str]]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    name = f"sdlora-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    ip("netns", "delete", name)
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root and `ip netns` (iproute2, Linux)"),
]


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two namespaces with one cable between them; each has nothing else than its loopback."""
    names = f"sdlora-a-{os.getpid()}", f"sdlora-b-{os.getpid()}"
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable0",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for process in inside.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def settings(tiny_base: Path, image_folder: Make, tmp_path: Path) -> Callable[..., Config]:
    folder = image_folder()

    def make(run: str, *overrides: str) -> Config:
        return load_config(
            None,
            [
                *(
                    "adapter.rank=2",
                    "training.batch_size=1",
                    "training.device=cpu",
                    "training.precision=fp32",
                ),
                *(
                    f"training.steps={STEPS}",
                    "training.checkpoint_every=20",
                    "data.validation=0",
                    "sample.prompts=[]",
                ),
                *overrides,
            ],
            {
                "data.folder": folder,
                "model.base": str(tiny_base),
                "output.folder": tmp_path / run,
                "data.cache_folder": tmp_path / f"cache {run}",
            },
        )

    return make


def numbered(machine: int) -> list[str]:
    """Torchrun's static rendezvous: each machine is told its number."""
    return ["--node-rank", str(machine), "--master-addr", ADDRESSES[0], "--master-port", "29500"]


def met(machine: int) -> list[str]:
    """Torchrun's c10d rendezvous, which knows its machine by a hostname that says nothing in a namespace."""
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", "test"]
    host = f"is_host={int(machine == 0)},read_timeout=10"
    return [*endpoint, "--rdzv-conf", host, "--local-addr", ADDRESSES[machine]]


def start(
    machine: int, names: tuple[str, str], rendezvous: Rendezvous, config: Config, *options: str
) -> subprocess.Popen[bytes]:
    """Start torchrun on one machine; each has its own run folder and cache."""
    assert config.output.folder is not None
    file = config.output.folder.with_suffix(".toml")
    save_config(config, file)
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous(machine)]
    command = [sys.executable, *launcher, "-m", "sdlora", "train", "--config", str(file), *options]
    with log_of(config).open("a", encoding="utf-8") as log:  # not a pipe: it would fill while nobody reads
        return subprocess.Popen(
            ["ip", "netns", "exec", names[machine], *command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "SDLORA_PATIENCE_SECONDS": str(PATIENT_SECONDS)},
            stdout=log,
            stderr=log,
        )


def log_of(config: Config) -> Path:
    """Return the file of all that one machine prints."""
    assert config.output.folder is not None
    return config.output.folder.with_suffix(".log")


def steps_of(run: Path) -> int:
    return sum(event["event"] == "StepDone" for event in read_events(run))


@pytest.mark.parametrize("rendezvous", [numbered, met])
def test_a_cut_cable_ends_both_machines_and_the_run_goes_on_exactly(
    rendezvous: Rendezvous, settings: Callable[..., Config], machines: tuple[str, str], tmp_path: Path
) -> None:
    if rendezvous is met:  # its agents wait for each other until TCP gives up: by itself after 15 minutes
        for name in machines:
            give_up = f"echo {TCP_RETRIES} > /proc/sys/net/ipv4/tcp_retries2"
            ip("netns", "exec", name, "sh", "-c", give_up)
    configs = [settings("first"), settings("second")]
    running = [start(number, machines, rendezvous, config) for number, config in enumerate(configs)]
    saved = tmp_path / "first" / "checkpoints"
    wait_for(lambda: list_checkpoints(saved) or any(process.poll() for process in running))
    assert list_checkpoints(saved), log_of(configs[0]).read_text(encoding="utf-8")[-3000:]
    ip("-n", machines[0], "link", "set", "cable0", "down")
    cut, reached = time.monotonic(), steps_of(tmp_path / "first")
    ends = []
    for process, config in zip(running, configs, strict=True):
        assert process.wait(PATIENCE) != 0
        ends.append(time.monotonic() - cut)
        text = log_of(config).read_text(encoding="utf-8")
        assert "cannot be reached" in text and "--resume" in text
        print(f"--- ended {ends[-1]:.0f} s after the cut, at step {reached}:", text[-2500:], sep="\n")
    first = list_checkpoints(tmp_path / "first" / "checkpoints")
    assert first and not (tmp_path / "second").exists(), "only the main process writes"
    assert max(ends) < 120

    ip("-n", machines[0], "link", "set", "cable0", "up")
    assert steps_of(tmp_path / "first") < STEPS
    running = [
        start(number, machines, rendezvous, config, "--resume") for number, config in enumerate(configs)
    ]
    for process, config in zip(running, configs, strict=True):
        assert process.wait(2 * PATIENCE) == 0, log_of(config).read_text(encoding="utf-8")[-3000:]
    print("--- resumed:", log_of(configs[0]).read_text(encoding="utf-8")[-1500:], sep="\n")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(settings("one", "training.gradient_accumulation=2"))
    torch.set_num_threads(before)
    last = [list_checkpoints(tmp_path / run / "checkpoints")[-1] for run in ("first", "one")]
    assert [saved.step for saved in last] == [STEPS, STEPS]
    states = [load_file(saved.optimizer_file) for saved in last]
    assert len(states[0]) >= 4
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert (tmp_path / "first" / "lora.safetensors").is_file()
