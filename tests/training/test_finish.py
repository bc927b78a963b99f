"""What the finished file tells of the images it was trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora.config.toml import load_config
from sdlora.data.captioning.tags import TagFolder
from sdlora.data.captioning.wording import tag_key
from sdlora.events import Emitter
from sdlora.training.finish import adapter_file
from sdlora.training.run import prepare_run
from sdlora.training.state import Run


@pytest.mark.parametrize("private", [False, True])
def test_the_header_tells_every_folder_with_its_own_repeats_or_none(
    private: bool, tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_config(
        None,
        [
            *("adapter.rank=2", "training.batch_size=2", "training.steps=1", "sample.prompts=[]"),
            *("training.device=cpu", "training.precision=fp32", "data.validation=0", "data.recursive=false"),
        ],
        {
            "data.folder": image_folder(3, "style"),
            "data.sources": [
                {"folder": image_folder(2, "more"), "repeats": 3},
                {"folder": image_folder(4, "class"), "regularisation": True, "repeats": 2},
            ],
            "model.base": str(tiny_base),
            "output.folder": tmp_path / "run",
            "output.private": private,
            "data.cache_folder": tmp_path / "cache",
        },
    )
    run = prepare_run(config, resume=False, emit=Emitter(()))
    assert isinstance(run, Run)
    header = adapter_file(run).info.metadata
    if private:
        assert [
            k for k, text in header.items() if "style" in text or "more" in text or "icon of" in text
        ] == []
        assert header["ss_num_train_images"] == "9" and header["ss_base_model_version"] == "sd_v1"
        return
    assert json.loads(header["ss_dataset_dirs"]) == {
        "style": {"n_repeats": 1, "img_count": 3},
        "more": {"n_repeats": 3, "img_count": 2},
    }
    assert json.loads(header["ss_reg_dataset_dirs"]) == {"class": {"n_repeats": 2, "img_count": 4}}
    assert (header["ss_num_train_images"], header["ss_num_reg_images"]) == ("9", "8")
    tags = json.loads(header["ss_tag_frequency"])
    assert set(tags) == {"style", "more"} and tags["more"] == {
        "an icon of a cat 0": 1,
        "an icon of a cat 1": 1,
    }
    (dataset,) = json.loads(header["ss_datasets"])
    assert [subset["is_reg"] for subset in dataset["subsets"]] == [False, False, True]


def test_the_files_tags_are_those_that_the_tags_command_counts(
    tiny_base: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder(4, "style")
    captions = ("Long_Hair, a  cat,, hat", "long hair, hat ", "hat,a cat", "  a dog , hat")
    for image, caption in zip(sorted(folder.glob("*.png")), captions, strict=True):
        image.with_suffix(".txt").write_text(caption, encoding="utf-8")
    config = load_config(
        None,
        ["adapter.rank=2", "training.steps=1", "sample.prompts=[]", "data.validation=0", "judge.every=0"],
        {
            "data.folder": folder,
            "model.base": str(tiny_base),
            "output.folder": tmp_path / "run",
            "data.cache_folder": tmp_path / "cache",
        },
    )
    run = prepare_run(config, resume=False, emit=Emitter(()))
    assert isinstance(run, Run)
    (tags,) = json.loads(adapter_file(run).info.metadata["ss_tag_frequency"]).values()
    merged: Counter[str] = Counter()
    for tag, count in tags.items():
        merged[tag_key(tag)] += count
    counted = {tag_key(tag): count for tag, count in TagFolder(folder).counts.items()}
    assert counted == dict(merged) == {"hat": 4, "a cat": 2, "long hair": 2, "a dog": 1}
