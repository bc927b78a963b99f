"""What is concluded from the facts about a machine, for machines one does not have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sdlora.commands.cli import main
from sdlora.commands.machine import page
from sdlora.devices import half_of_card
from sdlora.machine import (
    Card,
    MachineFacts,
    cards_on_the_bus,
    examine,
    notice_of,
    parse_listing,
    remedies,
    serves,
    unserved,
    wheel_index,
    why_idle,
)

LINUX_CPU = MachineFacts("Linux", "/home/me/.venv/bin/python", "2.13.0+cpu", memory=2**34, free=2**33)
WINDOWS = dataclasses.replace(LINUX_CPU, system="Windows", python=r"C:\Users\me\sd\.venv\Scripts\python.exe")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")

GTX_1060 = Card("NVIDIA GeForce GTX 1060 6GB", (6, 1), 6 * 2**30)
RTX_3060 = Card("NVIDIA GeForce RTX 3060", (8, 6), 12 * 2**30)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 24 * 2**30)
RTX_5090 = Card("NVIDIA GeForce RTX 5090", (12, 0), 32 * 2**30)


def with_card(facts: MachineFacts, card: Card, driver: str, **more: object) -> MachineFacts:
    return dataclasses.replace(facts, present=(card,), driver=driver, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("card", "driver", "index"),
    [
        (GTX_1060, "591.44", "cu126"),
        (GTX_1060, "560.35", "cu126"),
        (RTX_3060, "535.183.01", "cu126"),
        (RTX_3060, "572.16", "cu128"),
        (RTX_4090, "580.95.05", "cu130"),
        (RTX_5090, "572.16", "cu128"),
        (RTX_5090, "591.44", "cu130"),
        (RTX_5090, "560.35", None),
        (RTX_3060, "470.82", None),
        (Card("unknown"), "591.44", "cu130"),
    ],
)
def test_the_index_fits_card_and_driver(card: Card, driver: str, index: str | None) -> None:
    assert wheel_index(with_card(LINUX_CPU, card, driver)) == index


@pytest.mark.parametrize("facts", [LINUX_CPU, WINDOWS])
def test_a_torch_without_cuda_is_taken_away_before_another_is_installed(facts: MachineFacts) -> None:
    """With the first torch in place pip says "Requirement already satisfied" and does nothing."""
    facts = with_card(facts, RTX_3060, "591.44")
    away, install = remedies(facts)
    assert away == f"{facts.python} -m pip uninstall -y torch"
    assert install.startswith(f"{facts.python} -m pip install torch --index-url ")
    assert "https://download.pytorch.org/whl/cu130" in install
    notice = notice_of(facts)
    assert notice is not None and "\n" not in notice
    assert "RTX 3060 (sm_86, 12.0 GiB) is here, but this torch (2.13.0+cpu) is built without CUDA" in notice
    assert away in notice and install in notice


def test_a_path_with_a_blank_is_quoted() -> None:
    facts = with_card(
        dataclasses.replace(WINDOWS, python=r"C:\Program Files\Python\python.exe"), RTX_3060, "591.44"
    )
    assert remedies(facts)[0].startswith('"C:\\Program Files\\Python\\python.exe" -m pip')


def test_the_last_torch_for_an_old_card_is_asked_for() -> None:
    assert '"torch<2.15"' in remedies(with_card(LINUX_CPU, GTX_1060, "580.95.05"))[1]


@pytest.mark.parametrize(
    ("change", "reason", "first"),
    [
        (
            {"driver": None, "present": (Card("an NVIDIA card (PCI 0000:01:00.0)"),)},
            "driver is not running",
            "",
        ),
        ({"hidden": "", "cuda_build": "13.0"}, "CUDA_VISIBLE_DEVICES=", "unset CUDA_VISIBLE_DEVICES"),
        ({"driver": "535.183.01", "cuda_build": "13.0"}, "too old for CUDA 13.0", "uninstall"),
        ({"driver": "470.82", "cuda_build": "13.0"}, "too old", ""),
        ({"cuda_build": "13.0"}, "cannot reach it", "nvidia-smi"),
    ],
)
def test_each_hindrance_has_its_remedy(change: dict[str, object], reason: str, first: str) -> None:
    facts = dataclasses.replace(with_card(LINUX_CPU, RTX_3060, "591.44"), **change)  # type: ignore[arg-type]
    assert reason in (why_idle(facts) or "")
    assert first in remedies(facts)[0]
    assert len(remedies(facts)) == (1 if "hidden" in change else 2)


@pytest.mark.parametrize(
    ("capability", "served"),
    [((7, 5), True), ((8, 9), True), ((9, 0), True), ((12, 1), True), ((6, 1), False), ((7, 0), False)],
)
def test_kernels_serve_cards_of_their_generation_and_compiled_ones_later_cards(
    capability: tuple[int, int], served: bool
) -> None:
    assert serves(CU130, capability) is served
    assert serves((), capability)
    assert serves(CU130, None)


def test_a_card_without_kernels_is_told_in_one_line() -> None:
    facts = dataclasses.replace(
        with_card(LINUX_CPU, GTX_1060, "580.95.05"),
        usable=True,
        cuda_build="13.0",
        cards=(GTX_1060,),
        architectures=CU130,
    )
    line = unserved(CU130, GTX_1060)
    assert line is not None and line.startswith(
        "NVIDIA GeForce GTX 1060 6GB (sm_61, 6.0 GiB): this torch only has"
    )
    assert why_idle(facts) == line
    assert "cu126" in remedies(facts)[1]
    assert why_idle(dataclasses.replace(facts, cards=(GTX_1060, RTX_3060))) is None


def test_machines_without_card_or_with_one_that_works_need_nothing() -> None:
    works = dataclasses.replace(
        with_card(LINUX_CPU, RTX_4090, "591.44"),
        usable=True,
        cuda_build="13.0",
        cards=(RTX_4090,),
        architectures=CU130,
    )
    for facts in (LINUX_CPU, WINDOWS, works):
        assert (why_idle(facts), remedies(facts), notice_of(facts)) == (None, [], None)


def test_the_drivers_listing_is_read() -> None:
    new = (
        "NVIDIA GeForce RTX 3060, 8.6, 12288, 580.95.05\nNVIDIA GeForce GTX 1060 6GB, 6.1, 6144, 580.95.05\n"
    )
    assert parse_listing(new) == ("580.95.05", (RTX_3060, GTX_1060))
    assert parse_listing("Tesla K80, 11441, 470.82\n") == (
        "470.82",
        (Card("Tesla K80", None, 11441 * 2**20),),
    )
    assert parse_listing("") == (None, ())


def test_cards_on_the_bus_are_seen_without_a_driver(tmp_path: Path) -> None:
    for name, vendor, kind in (("01:00.0", "0x10de", "0x030000"), ("01:00.1", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n", encoding="ascii")
        (tmp_path / name / "class").write_text(f"{kind}\n", encoding="ascii")
    assert cards_on_the_bus(tmp_path) == (Card("an NVIDIA card (PCI 01:00.0)"),)
    assert cards_on_the_bus(tmp_path / "none") == ()


def test_cards_that_give_nan_in_fp16_compute_in_fp32() -> None:
    assert half_of_card("NVIDIA GeForce GTX 1660 SUPER") == torch.float32
    assert half_of_card("NVIDIA GeForce GTX 1650") == torch.float32
    for name in ("NVIDIA T1000 8GB", "Quadro T2000", "NVIDIA T400 4GB", "NVIDIA GeForce MX450", "CMP 30HX"):
        assert half_of_card(name) == torch.float32, name
    for name in ("Tesla T4", "Quadro RTX 4000", "NVIDIA GeForce GTX 1080 Ti", "Tesla V100-SXM2-16GB"):
        assert half_of_card(name) == torch.float16, name
    assert half_of_card("NVIDIA GeForce RTX 2060") == torch.float16
    assert half_of_card("NVIDIA GeForce GTX 1080") == torch.float16


def test_the_page_says_what_lies_idle_and_how_to_mend_it() -> None:
    facts = with_card(WINDOWS, RTX_3060, "591.44")
    rows = {row.topic: row for row in page(facts, {"training.device": "cpu"})}
    assert rows["card"].good is False
    assert rows["card"].remedies == tuple(remedies(facts))
    assert rows["torch"].good is False
    assert rows["chosen"].value == "training.device: cpu"
    assert rows["xformers"].good is None
    assert rows["memory"].value == "8.0 GiB of 16.0 GiB free"


def test_this_machine_can_be_examined() -> None:
    facts = examine()
    assert facts.torch == torch.__version__
    assert facts.usable == torch.cuda.is_available()
    assert 0 < facts.free < facts.memory
    assert facts.card_lies_idle == (notice_of(facts) is not None)


def test_the_command_prints_a_page_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    lines = capsys.readouterr().out.splitlines()
    answer = json.loads(lines[-1])
    assert code == int(any(row["good"] is False for row in answer["rows"]))
    assert len(lines) - 1 >= len(answer["rows"]) >= 8
    assert answer["chosen"]["training.device"] in ("cpu", "cuda", "mps")
    assert answer["facts"]["torch"] == torch.__version__
