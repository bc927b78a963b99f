"""What several trainers spell alike becomes the same of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.config.foreign.ledger import Outcome
from sdlora.config.foreign.programs import import_settings
from sdlora.errors import ConfigError

KOHYA = "train_network.py --pretrained_model_name_or_path=m.safetensors --train_data_dir=data "
JOB = "job: extension\nconfig:\n  name: n\n  process:\n  - type: sd_trainer\n    model:\n      {}\n"
ONETRAINER = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE"}
SIMPLETUNER = {"model_type": "lora", "model_family": "sdxl", "data_backend_config": "none.json"}

SAID: dict[str, tuple[str, str, str | None]] = {
    "kohya": ("command", KOHYA + "--fp8_base", "fp8"),
    "kohya, U-Net": ("command", KOHYA + "--fp8_base --fp8_base_unet", "fp8"),
    "kohya, nothing": ("command", KOHYA, None),
    "ai-toolkit": ("job.yaml", JOB.format("quantize: true"), "fp8"),
    "ai-toolkit, 4 bits": ("job.yaml", JOB.format("quantize: true\n      qtype: uint4"), "nf4"),
    "ai-toolkit, off": ("job.yaml", JOB.format("quantize: false\n      qtype: uint4"), None),
    "OneTrainer": ("c.json", json.dumps({**ONETRAINER, "unet": {"weight_dtype": "FLOAT_8"}}), "fp8"),
    "OneTrainer, 4 bits": ("c.json", json.dumps({**ONETRAINER, "unet": {"weight_dtype": "NFLOAT_4"}}), "nf4"),
    "OneTrainer, whole": ("c.json", json.dumps({**ONETRAINER, "unet": {"weight_dtype": "BFLOAT_16"}}), None),
    "SimpleTuner": ("config.json", json.dumps({**SIMPLETUNER, "base_model_precision": "int8-quanto"}), "fp8"),
    "SimpleTuner, 4 bits": (
        "config.json",
        json.dumps({**SIMPLETUNER, "base_model_precision": "nf4-bnb"}),
        "nf4",
    ),
    "SimpleTuner, whole": (
        "config.json",
        json.dumps({**SIMPLETUNER, "base_model_precision": "no_change"}),
        None,
    ),
}


@pytest.mark.parametrize("program", SAID)
def test_the_format_of_the_base_is_taken_over(program: str, tmp_path: Path) -> None:
    name, text, wanted = SAID[program]
    if name != "command":
        (tmp_path / name).write_text(text, encoding="utf-8")
    imported = import_settings(text if name == "command" else tmp_path / name)
    assert imported.values.get("training.base_format") == wanted
    rows = [row for row in imported.rows if row.ours.startswith("training.base_format")]
    assert bool(rows) == (wanted is not None)
    assert all(row.outcome == Outcome.TRANSLATED and "text encoders stay whole" in row.reason for row in rows)


DATA_SETS = "    datasets:\n    - folder_path: {}\n      resolution: {}\n"
"""Of ai-toolkit's job."""
KOHYA_TOML = 'pretrained_model_name_or_path = "m"\ntrain_data_dir = "x"\nnetwork_module = "networks.lora"\n'
LONG = "9" * 5000
REFUSED: dict[str, tuple[str, str, str]] = {
    "infinite": ("c.toml", KOHYA_TOML + "network_dim = inf\n", "`network_dim=inf` is no number"),
    "not a number": ("c.toml", KOHYA_TOML + "network_dim = nan\n", "`network_dim=nan` is no number"),
    "no side": (
        "job.yaml",
        JOB.format("{}") + DATA_SETS.format("x", "[.inf]"),
        "is no number; mend it there",
    ),
    "a long word": ("c.bat", KOHYA + f"--network_alpha {LONG}=x", "`network_alpha=999"),
    "a bell": ("c.json", json.dumps({**ONETRAINER, "lora_rank": "\a8\x1b["}), "is no number"),
    "a long text": ("job.yaml", JOB.format("{}") + "x: y\n" * 40_000, "characters, more than the"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_program_writes_is_refused_in_a_line_that_can_be_read(case: str, tmp_path: Path) -> None:
    """Found by tools/fuzz_texts."""
    name, text, message = REFUSED[case]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        import_settings(tmp_path / name)
    told = str(caught.value)
    assert message in told and len(told) < 1000 and told.isprintable()


def test_a_folder_that_is_not_named_costs_that_folder_alone(tmp_path: Path) -> None:
    text = JOB.format("{}") + DATA_SETS.format("''", 512) + DATA_SETS.format("cats", 512).partition("\n")[2]
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
    imported = import_settings(tmp_path / "job.yaml")
    assert [str(source["folder"]) for source in imported.values["data.sources"]] == ["cats"]
    assert any("the folder `` is left out" in note for note in imported.notes)


def test_more_folders_than_anyone_has_are_refused_at_once(tmp_path: Path) -> None:
    backends = [{"id": str(n), "type": "local", "instance_data_dir": f"f{n}"} for n in range(30_000)]
    (tmp_path / "data.json").write_text(json.dumps(backends), encoding="utf-8")
    (tmp_path / "config.json").write_text(
        json.dumps({**SIMPLETUNER, "data_backend_config": "data.json"}), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="names 30000 folders of images; take at most 1000"):
        import_settings(tmp_path / "config.json")


def test_a_file_whose_name_is_too_long_is_not_there(tmp_path: Path) -> None:
    text = json.dumps({**SIMPLETUNER, "data_backend_config": "b" * 5000})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert any("no folder of images" in note for note in import_settings(tmp_path / "config.json").notes)


@pytest.mark.parametrize(
    ("more", "expected"),
    [("", 1e-6), (" --optimizer_args d0=1e-5 d_coef=2", 1e-5)],
)
def test_prodigy_begins_where_their_program_has_it_begin(more: str, expected: float) -> None:
    """Ours begins higher when left open."""
    imported = import_settings(KOHYA + "--optimizer_type=Prodigy" + more)
    assert imported.values["optimizer.d0"] == expected
    rows = [row for row in imported.rows if row.ours.startswith("optimizer.d0")]
    assert len(rows) == 1 and imported.values.get("optimizer.d_coef") == (2 if more else None)


@pytest.mark.parametrize(("given", "expected"), [({}, 1e-6), ({"d0": 1e-5}, 1e-5)])
def test_onetrainers_prodigy_begins_where_it_has_it_begin(
    given: dict[str, float], expected: float, tmp_path: Path
) -> None:
    text = json.dumps({**ONETRAINER, "optimizer": {"optimizer": "PRODIGY", **given}})
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    imported = import_settings(tmp_path / "c.json")
    assert imported.values["optimizer.d0"] == expected
    assert len([row for row in imported.rows if row.ours.startswith("optimizer.d0")]) == 1
