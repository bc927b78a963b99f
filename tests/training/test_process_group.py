"""Several processes: what they tell each other, how they add, and how one that fails ends all."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from training.process_play import gradient

from sdlora.errors import ConfigError
from sdlora.training.processes import Processes, world_size

PLAY = Path(__file__).with_name("process_play.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def play(count: int, *scenes: str) -> list[list[dict[str, Any]]]:
    """Play scenes in ``count`` processes; return what each printed by scene, and in it by rank."""
    places = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    running = []
    for rank in range(count):
        environment = {
            name: str(value) for name, value in {**places, "RANK": rank, "LOCAL_RANK": rank}.items()
        }
        running.append(
            subprocess.Popen(
                [sys.executable, str(PLAY), *scenes],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    answers: list[list[dict[str, Any]]] = [[] for _ in scenes]
    for process in running:  # one after the other: the end of its input ends the one that hangs
        text, _ = process.communicate(timeout=PATIENCE)
        for answer, line in itertools.zip_longest(answers, text.splitlines(), fillvalue=""):
            assert isinstance(answer, list)
            answer.append(json.loads(line) if line else {})
    return answers


def assert_sums_are_those_of_one_process(answers: list[dict[str, Any]]) -> None:
    total = gradient(99)
    for kind in (torch.float32, torch.bfloat16):
        for rank in range(len(answers)):
            total.add_(gradient(rank).to(kind))
    assert [answer["rank"] for answer in answers] == list(range(len(answers)))
    for answer in answers:
        result = answer["result"]
        assert result["words"] == [[rank, 1 / 3, 3000 * rank] for rank in range(len(answers))]
        assert result["main"] == "only the main process makes this"
        assert torch.equal(torch.tensor(result["total"]), total)


def test_two_processes_agree_and_one_that_fails_or_dies_ends_both() -> None:
    agreed, failed, all_failed, died = play(2, "agree", "one_fails", "all_fail", "one_dies")
    assert_sums_are_those_of_one_process(agreed)
    waiting, failing = failed
    assert (failing["kind"], failing["error"]) == ("DatasetError", "cat.png: broken")
    assert waiting["kind"] == "OtherProcessError"
    assert waiting["error"] == "process 2 of 2 ended the run: cat.png: broken"
    first, second = all_failed
    assert (first["kind"], first["error"]) == ("DatasetError", "no images")
    assert second["kind"] == "OtherProcessError"
    left, killed = died
    assert killed == {}
    assert "another process ended without a word" in left["error"]


@pytest.mark.slow
def test_three_processes_add_in_their_order() -> None:
    (agreed,) = play(3, "agree")
    assert_sums_are_those_of_one_process(agreed)


@pytest.mark.slow
def test_a_process_that_cannot_be_reached_is_not_waited_for_in_a_step() -> None:
    ((left, _),) = play(2, "one_hangs")
    assert "another process ended without a word, or its machine cannot be reached" in left["error"]


def test_one_process_exchanges_with_itself() -> None:
    alone, total = Processes(), torch.zeros(3)
    assert alone.exchange([1, 2]) == [[1, 2]]
    assert alone.from_main(lambda: b"x") == b"x"
    alone.add_in_order(total, torch.ones(3))
    assert total.tolist() == [1.0, 1.0, 1.0]
    alone.fail(ValueError("nobody hears this"))
    alone.leave()


def test_the_number_of_processes_is_what_a_launcher_says() -> None:
    assert world_size({}) == 1
    assert world_size({"WORLD_SIZE": "4"}) == 4
    assert world_size({"OMPI_COMM_WORLD_SIZE": "2"}) == 2
    with pytest.raises(ConfigError, match="WORLD_SIZE=many"):
        world_size({"WORLD_SIZE": "many"})


def test_half_a_launchers_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        Processes.join("cpu")


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_a_device_that_processes_cannot_share_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"training.device={device}"):
        Processes.join(device)
