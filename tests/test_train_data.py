"""What goes into training, seen through the training itself on a tiny real base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdlora.config import Config, load_config
from sdlora.errors import ConfigError
from sdlora.events import Announcer, Event, Noticed
from sdlora.run import Run, prepare_run
from sdlora.train import train_step

Make = Callable[..., Path]
FAST = (
    "adapter.rank=2",
    "training.batch_size=2",
    "training.steps=4",
    "data.validation=0",
    "sample.prompts=[]",
    "training.device=cpu",
    "training.precision=fp32",
)


@pytest.fixture
def settings(tiny_base: Path, picture_folder: Make, tmp_path: Path) -> Callable[..., Config]:
    folder = picture_folder()

    def make(run: str, *overrides: str, **values: Any) -> Config:
        chosen = {override.partition("=")[0] for override in overrides}
        defaults = [text for text in FAST if text.partition("=")[0] not in chosen]
        return load_config(
            None,
            [*defaults, *overrides],
            {
                "data.folder": folder,
                "model.base": str(tiny_base),
                "output.folder": tmp_path / run,
                "data.cache_folder": tmp_path / "cache",
                **values,
            },
        )

    return make


def prepared(config: Config, told: list[Event] | None = None) -> Run:
    return prepare_run(config, resume=False, tell=Announcer(() if told is None else (told.append,)))


def visits_of(run: Run, epoch: int = 0) -> list[int]:
    steps = range(epoch * run.order.steps_per_epoch, (epoch + 1) * run.order.steps_per_epoch)
    return [v.index for step in steps for rank in run.order.step(step) for micro in rank for v in micro]


# --- sources


def test_the_weight_of_a_source_is_the_weight_of_its_gradient(
    settings: Callable[..., Config], picture_folder: Make
) -> None:
    folder = picture_folder(count=1, name="one")
    norms = []
    for weight in (1.0, 0.25):
        config = settings(
            f"weight{weight}",
            "optimizer.max_grad_norm=0",
            "data.caption_dropout=0",
            **{"data.folder": None, "data.sources": [{"folder": folder, "weight": weight}]},
        )
        norms.append(train_step(prepared(config))[1])
    assert norms[1] == pytest.approx(0.25 * norms[0], rel=1e-5)


def test_regularisation_pictures_are_trained_on_but_never_held_out_or_previewed(
    settings: Callable[..., Config], picture_folder: Make
) -> None:
    told: list[Event] = []
    config = settings(
        "run",
        "data.validation=2",
        "sample.prompts=['a']",
        "data.trigger_word=zork",
        **{"data.sources": [{"folder": picture_folder(4, "class"), "regularisation": True, "repeats": 2}]},
    )
    run = prepared(config, told)
    assert [item.regularisation for item in run.validation.items] == [False, False]
    roles = Counter(item.regularisation for item in run.training.items)
    assert roles == {False: 4, True: 4}
    assert Counter(visits_of(run)) == {**dict.fromkeys(range(4), 1), **dict.fromkeys(range(4, 8), 2)}
    captions = [item.caption for item in run.training.items]
    assert all(caption.startswith("zork, ") for caption in captions[:4])
    assert not any("zork" in caption for caption in captions[4:])


def test_what_is_odd_about_the_folders_is_told(settings: Callable[..., Config], picture_folder: Make) -> None:
    folder = picture_folder(2, "7_cat")
    told: list[Event] = []
    prepared(settings("run", **{"data.folder": folder}), told)
    notes = [event.message for event in told if isinstance(event, Noticed)]
    assert any(note.startswith("7_cat: is named as kohya's folders are") for note in notes)


def test_without_any_folder_nothing_starts(settings: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="no folder of pictures given"):
        prepared(settings("run", **{"data.folder": None}))
