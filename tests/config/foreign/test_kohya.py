"""kohya's sd-scripts: command lines, config_file and dataset TOML as its documents write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdlora.config.foreign.ledger import Outcome
from sdlora.config.foreign.programs import Imported, import_settings
from sdlora.errors import ConfigError

BASE = "--pretrained_model_name_or_path=model.safetensors --train_data_dir=data "
COMMANDS: list[tuple[str, dict[str, Any]]] = [
    (  # docs/train_network.md
        "accelerate launch --num_cpu_threads_per_process 1 train_network.py "
        '--pretrained_model_name_or_path="/sd/v1-5.safetensors" --dataset_config="missing.toml" '
        '--output_dir="/out" --output_name="my_lora" --save_model_as=safetensors '
        "--network_module=networks.lora "
        "--network_dim=16 --network_alpha=1 --learning_rate=1e-4 --optimizer_type=AdamW8bit "
        "--lr_scheduler=constant "
        "--sdpa --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=fp16 "
        "--gradient_checkpointing",
        {
            "model.base": "/sd/v1-5.safetensors",
            "output.folder": "/out/my_lora",
            "output.name": "my_lora",
            "adapter.rank": 16,
            "adapter.alpha": 1.0,
            "adapter.targets": "linear",
            "adapter.text_encoder": True,
            "optimizer.learning_rate": 1e-4,
            "optimizer.text_encoder_learning_rate": 1e-4,
            "optimizer.schedule": "constant",
            "training.epochs": 10,
            "training.precision": "fp16",
            "training.attention": "sdpa",
            "training.recompute": "blocks",
            "training.min_snr_gamma": 0.0,
        },
    ),
    (
        "python sdxl_train_network.py --pretrained_model_name_or_path D:\\models\\xl.safetensors "
        '--train_data_dir "D:\\my images" --resolution 1024,768 --enable_bucket --network_train_unet_only '
        "--unet_lr 4e-4 --learning_rate 1e-4 --max_train_steps 3000 --train_batch_size 4 --bucket_no_upscale",
        {
            "model.base": "D:\\models\\xl.safetensors",
            "data.folder": "D:\\my images",
            "data.kohya_folders": True,
            "data.resolution": 887,
            "data.buckets": True,
            "data.upscale": False,
            "optimizer.learning_rate": 4e-4,
            "training.steps": 3000,
            "training.batch_size": 4,
        },
    ),
    (
        BASE,
        {
            "adapter.rank": 4,
            "adapter.alpha": 1.0,
            "training.steps": 1600,
            "training.batch_size": 1,
            "optimizer.learning_rate": 2e-6,
            "optimizer.schedule": "constant",
            "data.buckets": False,
            "data.caption_dropout": 0.0,
            "optimizer.betas": (0.9, 0.999),
        },
    ),  # all of its defaults
    (
        BASE + "--network_module=lycoris.kohya --network_args algo=loha preset=full conv_dim=8 conv_alpha=4 "
        "--network_dim=8 --network_alpha=4 --seed=7",
        {
            "adapter.kind": "loha",
            "adapter.targets": "all",
            "adapter.rank": 8,
            "adapter.alpha": 4.0,
            "training.seed": 7,
        },
    ),
    (
        BASE + '--network_module lycoris.kohya --network_args "algo=lokr" "factor=8" --network_dim 100 '
        "--network_alpha 1",
        {"adapter.kind": "lokr", "adapter.lokr_factor": 8, "adapter.rank": 100},
    ),
    (
        BASE + "--network_module=lycoris.kohya --network_args algo=lora dora_wd=True --network_dim=16",
        {"adapter.kind": "dora", "adapter.rank": 16},
    ),
    (
        BASE + "--network_args loraplus_lr_ratio=16 --optimizer_args weight_decay=0.1 betas=0.9,0.95 "
        "--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3 --lr_warmup_steps=0.1 "
        "--max_train_steps=500",
        {
            "optimizer.lora_plus_ratio": 16,
            "optimizer.weight_decay": 0.1,
            "optimizer.betas": (0.9, 0.95),
            "optimizer.schedule": "cosine_with_restarts",
            "optimizer.schedule_cycles": 3,
            "optimizer.warmup_share": 0.1,
        },
    ),
    (
        BASE + "--shuffle_caption --keep_tokens=2 --caption_tag_dropout_rate=0.1 --caption_dropout_rate=0.05 "
        "--enable_wildcard --weighted_captions --flip_aug --random_crop --color_aug "
        "--caption_prefix='masterpiece, '",
        {
            "data.shuffle_tags": True,
            "data.keep_tags": 2,
            "data.tag_dropout": 0.1,
            "data.caption_dropout": 0.05,
            "data.wildcards": True,
            "data.emphasis": True,
            "data.flip": True,
            "data.crop": "random",
            "data.colour_jitter": 0.1,
            "data.caption_prefix": "masterpiece, ",
        },
    ),
    (
        BASE + "--reg_data_dir=reg --prior_loss_weight=0.5 --v2 --v_parameterization --zero_terminal_snr "
        "--clip_skip=2 "
        "--noise_offset=0.05 --min_snr_gamma=5 --vae=vae.safetensors --no_metadata --save_precision=bf16",
        {
            "data.sources": [{"folder": "reg", "regularisation": True, "kohya_folders": True, "weight": 0.5}],
            "model.prediction_type": "v_prediction",
            "model.zero_terminal_snr": True,
            "model.clip_skip": 2,
            "training.noise_offset": 0.05,
            "training.min_snr_gamma": 5.0,
            "model.vae": "vae.safetensors",
            "output.private": True,
            "output.dtype": "bf16",
        },
    ),
]


def has(imported: Imported, expected: dict[str, Any]) -> None:
    """Compare settings; their sum is a configuration that `train --config` reads back alike."""
    assert {key: imported.values.get(key) for key in expected} == expected
    imported.config()


@pytest.mark.parametrize(("command", "expected"), COMMANDS)
def test_a_command_becomes_settings_that_train_reads(command: str, expected: dict[str, Any]) -> None:
    if ".py" not in command:
        command = f"accelerate launch train_network.py {command}"
    has(import_settings(command), expected)


def test_a_bat_file_goes_on_behind_carets_and_knows_its_variables(tmp_path: Path) -> None:
    file = tmp_path / "train.bat"
    file.write_text(
        "@echo off\r\nrem my run\r\nset MODEL=D:\\sd\\v1-5.safetensors\r\ncall venv\\Scripts\\activate\r\n"
        "accelerate launch --num_processes 2 train_network.py ^\r\n  "
        "--pretrained_model_name_or_path=%MODEL% ^\r\n"
        '  --train_data_dir="D:\\a b" ^\r\n  --network_dim=8\r\npause\r\n',
        encoding="utf-8",
    )
    imported = import_settings(file)
    has(imported, {"model.base": "D:\\sd\\v1-5.safetensors", "data.folder": "D:\\a b", "adapter.rank": 8})
    assert any("--processes 2" in note for note in imported.notes)


def test_a_shell_script_with_variables_is_read(tmp_path: Path) -> None:
    file = tmp_path / "train.sh"
    file.write_text(
        '#!/bin/bash\nexport MODEL="/sd/xl.safetensors"\nRANK=32\n# old: --network_dim=4\n'
        "accelerate launch sdxl_train_network.py \\\n  --pretrained_model_name_or_path=$MODEL \\\n"
        "  --train_data_dir ./data --network_dim ${RANK}\n",
        encoding="utf-8",
    )
    has(
        import_settings(file),
        {"model.base": "/sd/xl.safetensors", "data.folder": "./data", "adapter.rank": 32},
    )


CONFIG_FILES: list[tuple[str, dict[str, Any]]] = [
    (
        '[model]\npretrained_model_name_or_path = "m.safetensors"\n[net]\nnetwork_dim = '
        "8\nnetwork_alpha = 8.0\n",
        {"model.base": "m.safetensors", "adapter.rank": 8, "adapter.alpha": 8.0},
    ),
    (
        'pretrained_model_name_or_path = "m"\nnetwork_module = "networks.lora"\nlearning_rate = 1e-4\n',
        {"optimizer.learning_rate": 1e-4},
    ),
    (
        'network_module = "networks.lora"\nnetwork_dim = 4\noptimizer_type = "AdamW"\noptimizer_args = '
        '["weight_decay=0.2"]\n',
        {"optimizer.name": "adamw", "optimizer.weight_decay": 0.2},
    ),
    (
        'train_data_dir = "d"\nnetwork_dim = 4\nresolution = "768,768"\nenable_bucket = true\n',
        {"data.resolution": 768, "data.buckets": True},
    ),
    ("network_dim = 4\nmax_train_epochs = 3\nmax_train_steps = 1600\n", {"training.epochs": 3}),
    (
        'network_dim = 4\nmixed_precision = "bf16"\nfull_bf16 = true\nsave_precision = "float"\n',
        {"training.precision": "bf16", "output.dtype": "fp32"},
    ),
    (
        "network_dim = 4\ntext_encoder_lr = [5e-5, 1e-5]\nunet_lr = 1e-4\n",
        {"optimizer.text_encoder_learning_rate": 5e-5, "optimizer.text_encoder_2_learning_rate": 1e-5},
    ),
    (
        'network_dim = 4\nlr_warmup_steps = 100\nlr_scheduler = "cosine"\nmax_train_steps = 1000\n',
        {"optimizer.warmup_steps": 100, "optimizer.schedule": "cosine", "training.steps": 1000},
    ),
]


@pytest.mark.parametrize(("text", "expected"), CONFIG_FILES)
def test_a_config_file_is_read_whatever_its_sections_are_called(
    text: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    has(import_settings(tmp_path / "run.toml"), expected)


DATASETS: list[tuple[str, dict[str, Any]]] = [
    (  # docs/config_README-en.md
        "[general]\nshuffle_caption = true\ncaption_extension = '.txt'\nkeep_tokens = 1\n"
        "[[datasets]]\nresolution = 512\nbatch_size = 4\n"
        "[[datasets.subsets]]\nimage_dir = 'C:\\hoge'\nclass_tokens = 'hoge girl'\n"
        "[[datasets.subsets]]\nimage_dir = 'C:\\reg'\nis_reg = true\nclass_tokens = 'human'\n",
        {
            "data.shuffle_tags": True,
            "data.keep_tags": 1,
            "data.resolution": 512,
            "training.batch_size": 4,
            "data.sources": [
                {
                    "folder": "C:\\hoge",
                    "recursive": False,
                    "kohya_folders": False,
                    "repeats": 1,
                    "caption": "hoge girl",
                },
                {
                    "folder": "C:\\reg",
                    "recursive": False,
                    "kohya_folders": False,
                    "repeats": 1,
                    "caption": "human",
                    "regularisation": True,
                    "weight": 1.0,
                },
            ],
        },
    ),
    (
        "[[datasets]]\nresolution = [768, 768]\n[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeats = 10\n",
        {"data.resolution": 768},
    ),
    (
        "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'a'\n"
        "[[datasets]]\nresolution = 768\n[[datasets.subsets]]\nimage_dir = 'a'\n",
        {"data.resolution": 512, "data.more_resolutions": [768]},
    ),
    (
        "[general]\nenable_bucket = true\nbucket_no_upscale = "
        "true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n",
        {"data.buckets": True, "data.upscale": False},
    ),
    (
        "[general]\nflip_aug = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nalpha_mask = "
        "true\n",
        {"data.flip": True, "data.alpha_mask": True},
    ),
    (
        "[[datasets]]\nenable_wildcard = true\n[[datasets.subsets]]\nimage_dir = 'a'\n",
        {"data.wildcards": True, "data.caption_lines": "one"},
    ),
    (
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\ncaption_dropout_rate = 0.1\n"
        "[[datasets.subsets]]\nimage_dir = 'b'\ncaption_dropout_rate = 0.1\n",
        {"data.caption_dropout": 0.1},
    ),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nconditioning_data_dir = 'masks'\n", {}),
]


@pytest.mark.parametrize(("text", "expected"), DATASETS)
def test_a_dataset_toml_becomes_sources(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    has(import_settings(tmp_path / "data.toml"), expected)


def test_a_command_reads_the_files_that_it_names_beside_it(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(DATASETS[0][0], encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(
        "# mine\na cat, sitting --n low quality, bad --w 512 --h 512 --d 1 --l 7.5 --s 28\n"
        "a dog --s 12 --ss euler_a --fs 2 --d -1.5\na bird --w 517\n",
        encoding="utf-8",
    )
    (tmp_path / "run.sh").write_text(
        "accelerate launch train_network.py --pretrained_model_name_or_path=m --dataset_config=data.toml "
        "--sample_prompts=prompts.txt --sample_every_n_steps=200 --sample_sampler=euler_a "
        "--train_batch_size=2\n",
        encoding="utf-8",
    )
    has(
        import_settings(tmp_path / "run.sh"),
        {
            "sample.prompts": [
                "a cat, sitting --n low quality, bad --w 512 --h 512 --d 1 --l 7.5 --s 28",
                "a dog --s 12 --ss euler_a",
                "a bird --w 512",
            ],
            "sample.prompt_options": True,
            "sample.every": 200,
            "sample.sampler": "Euler a",
            "training.batch_size": 4,  # the dataset TOML takes precedence over the command
            "data.shuffle_tags": True,
        },
    )
    imported = import_settings(tmp_path / "run.sh")
    cat, dog, bird = imported.config().sample.lines
    assert (cat.negative, cat.guidance, cat.seed, cat.height) == ("low quality, bad", 7.5, 1, 512)
    assert (dog.prompt, dog.steps, dog.sampler, bird.width) == ("a dog", 12, "Euler a", 512)
    lost = {row.setting: row for row in imported.rows if row.outcome == "without counterpart"}
    assert "no option of a prompt" in lost["sample_prompts: line 3: --fs"].reason
    assert "a whole number" in lost["sample_prompts: line 3: --d"].reason


def test_every_setting_that_is_given_has_a_row() -> None:
    command = (
        COMMANDS[0][0]
        + " --made_up=3 --lowram --base_weights a.safetensors --caption_dropout_every_n_epochs=2"
    )
    rows = {row.setting: row for row in import_settings(command).rows}
    given = {word[2:].partition("=")[0] for word in command.split() if word.startswith("--")}
    given = given - {"num_cpu_threads_per_process"} | {"accelerate: num_cpu_threads_per_process"}
    assert len(given) == 21 and given <= rows.keys()
    assert rows["made_up"].outcome is Outcome.NONE and "no setting like it" in rows["made_up"].reason
    assert rows["lowram"].outcome is Outcome.DEFAULT
    assert rows["base_weights"].outcome is Outcome.NONE and "bake" in rows["base_weights"].reason
    assert rows["caption_dropout_every_n_epochs"].outcome is Outcome.NONE
    assert all(row.reason for row in rows.values() if row.outcome in (Outcome.NONE, Outcome.DEFAULT))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("accelerate launch flux_train_network.py --network_dim=4", "trains flux"),
        ("accelerate launch train_network.py --network_dim=many", "`network_dim=many` is no number"),
        ("accelerate launch train_network.py --output_name='half", "check its quotes"),
        ("accelerate launch train_network.py --output_name=" + "x" * 500_000, "characters in a line"),
        ("python make_coffee.py --cups=2", "is of no trainer that sdlora reads"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_settings(text)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_an_unreadable_value_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'network_module = "networks.lora"\n\nnetwork_dim = "few"\n', encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"run\.toml, line 3: `network_dim=few` is no number"):
        import_settings(tmp_path / "run.toml")
    (tmp_path / "bad.toml").write_text("network_dim = 4\nnetwork_alpha = = 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2"):
        import_settings(tmp_path / "bad.toml")
