"""The machine as it is now: never waited for, and only what the system tells."""

from __future__ import annotations

import os
import sys
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from patience import wait_for
from sdlora_ui.device_watch import MOST_CARDS, DeviceWatch, amd_cards, busy, hottest, nvidia_cards, read_card
from sdlora_ui.in_background import Latest


def test_load_memory_and_room_of_this_machine_are_told(tmp_path: Path) -> None:
    watch = DeviceWatch(tmp_path)
    state = wait_for(lambda: (now := watch.state()) and "memory" in now and now, "the first look")
    assert 0 <= state["load"] <= 100
    assert 0 < state["memory"]["used"] < state["memory"]["total"]
    assert 0 < state["disk"]["used"] < state["disk"]["total"]


def test_the_load_is_that_of_the_time_between_two_looks() -> None:
    times = namedtuple("times", "user system idle iowait guest")
    before, after = times(10, 5, 100, 1, 3), times(12, 6, 104, 2, 5)  # 3 of 8 s; the guest's are the user's
    assert busy(before, after) == pytest.approx(37.5)
    assert busy(before, before) == 0
    assert busy(after, before) == 0  # of a clock that was set back


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for NVIDIA's program")
def test_cards_are_told_by_nvidias_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_cards() == []
    program = tmp_path / "nvidia-smi"
    lines = ["NVIDIA H200, 87, 20480, 143771, 61", "Card, of old, [N/A], 1, 2, [N/A]", "no card", ""]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert nvidia_cards() == [
        {
            "name": "NVIDIA H200",
            "load": 87,
            "used": 20480 * 2**20,
            "total": 143771 * 2**20,
            "temperature": 61,
        },
        {"name": "Card, of old", "load": None, "used": 2**20, "total": 2 * 2**20, "temperature": None},
    ]
    program.write_text("#!/bin/sh\nfor i in $(seq 100); do echo 'A, 1, 2, 3, 4'; done\n")
    assert len(nvidia_cards()) == MOST_CARDS


@pytest.mark.parametrize("line", ["", "a", "a, 1, 2, 3", "No devices were found"])
def test_a_line_that_is_no_card_is_passed_over(line: str) -> None:
    assert read_card(line) is None


def test_the_processors_own_sensor_counts() -> None:
    def sensor(current: float) -> SimpleNamespace:
        return SimpleNamespace(current=current)

    assert (
        hottest({"nvme": [sensor(80)], "k10temp": [sensor(50), sensor(61.5)], "acpitz": [sensor(20)]}) == 61.5
    )
    assert hottest({"coretemp": [sensor(-274)], "acpitz": [sensor(20)]}) == 20
    assert hottest({"nvme": [sensor(80)]}) is None and hottest({}) is None


def test_an_answer_that_does_not_come_keeps_nobody_waiting() -> None:
    comes, asked = threading.Event(), []

    def ask() -> str:
        asked.append(None)
        comes.wait()
        return "new"

    latest = Latest(ask, "old", every=0.0)
    assert [latest.now() for _ in range(5)] == ["old"] * 5
    assert len(asked) <= 1
    comes.set()
    assert wait_for(lambda: latest.now() == "new", "the answer")


def test_a_question_that_fails_leaves_the_last_answer() -> None:
    answers = iter(["one"])
    latest = Latest(lambda: next(answers), "none", every=0.0)
    assert wait_for(lambda: latest.now() == "one", "the answer")
    assert [latest.now() for _ in range(3)] == ["one"] * 3


def test_cards_are_told_by_amds_driver(tmp_path: Path) -> None:
    assert amd_cards(tmp_path / "none") == []
    for number, files in enumerate(
        (
            {"mem_info_vram_total": "17163091968", "mem_info_vram_used": "1048576", "gpu_busy_percent": "42"},
            {"mem_info_vram_total": "8573157376", "product_name": "Radeon PRO"},
            {"vendor": "0x8086"},  # another maker's
        )
    ):
        device = tmp_path / f"card{number}" / "device"
        (device / "hwmon" / "hwmon3").mkdir(parents=True)
        for name, text in files.items():
            (device / name).write_text(f"{text}\n")
    (tmp_path / "card0" / "device" / "hwmon" / "hwmon3" / "temp1_input").write_text("51000\n")
    first = {"name": "AMD GPU", "load": 42, "used": 2**20, "total": 17163091968, "temperature": 51.0}
    second = {"name": "Radeon PRO", "load": None, "used": None, "total": 8573157376, "temperature": None}
    assert amd_cards(tmp_path) == [first, second]
