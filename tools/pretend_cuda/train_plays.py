"""Scenarios that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .stage import PROMPTS, Play, Stage, draw_images, only_card, train

if TYPE_CHECKING:
    from sdlora.events import Event


def training(*overrides: str, base: str = "mini") -> Play:
    """Return a scenario that trains two steps with these settings."""
    return lambda stage: _trained(stage, overrides, base)


def _trained(stage: Stage, overrides: Sequence[str], base: str) -> None:
    train(stage, *overrides, base=base)
    wanted = len(stage.told("StepDone"))
    assert wanted, "no step was told"


def not_waiting(*overrides: str) -> Play:
    """Return a scenario that trains five steps, of which the third and fourth must not wait for the card."""

    def play(stage: Stage) -> None:
        def listen(event: Event) -> None:
            stage.hear(event)
            if type(event).__name__ == "StepDone" and getattr(event, "step", 0) == 2:
                stage.cards.ledger.clear()
            if type(event).__name__ == "StepDone" and getattr(event, "step", 0) == 4:
                stage.facts["step"] = stage.cards.ledger.step()

        train(stage, "training.steps=5", "training.checkpoint_every=5", *overrides, listen=listen)
        step = stage.facts["step"]
        assert step["launches"] > 100 and not step["waits"], step["waits_by_place"]

    return play


def resumed(*overrides: str) -> Play:
    """Return a scenario that stops after one step of three and resumes from the checkpoint."""

    def play(stage: Stage) -> None:
        settings = ("training.steps=3", *overrides)
        train(stage, *settings, stop_at=1)
        stage.cards.ledger.clear()
        train(stage, *settings, resume=True)
        steps = [getattr(event, "step", None) for event in stage.told("StepDone")]
        assert steps == [1, 2, 3], f"steps {steps}"

    return play


def whole_run(stage: Stage) -> None:
    """Train with validation and previews, stop, resume, export: what most users do."""
    settings = (
        # with the linear layers, which this base recommends, placing takes 7 % more than planned (2 MB);
        # at true sizes the plan of placing is right (docs/cuda.md)
        "adapter.targets=attention",
        *("training.precision=bf16", "training.steps=3", "data.validation=0.25", "training.validate_every=1"),
        *(f"sample.prompts={PROMPTS}", "sample.steps=2", "sample.every=1"),
    )
    train(stage, *settings, stop_at=1)
    train(stage, *settings, resume=True)
    counts = {kind: len(stage.told(kind)) for kind in ("StepDone", "Validated", "Sampled", "CheckpointSaved")}
    stage.facts["events"] = counts
    assert counts == {"StepDone": 3, "Validated": 4, "Sampled": 4, "CheckpointSaved": 2}, counts
    _plan_agrees(stage)


def true_base(family: str, *overrides: str, side: int) -> Play:
    """Return a scenario that trains a step of a base of the true size, with validation and a preview."""

    def play(stage: Stage) -> None:
        from .true_bases import reading_zeros, write_hollow_checkpoint

        base = stage.folder / f"{family}.safetensors"
        write_hollow_checkpoint(base, family)
        # the plan reckons with images of the run's resolution, so the one that is held out must have it, too
        draw_images(stage.folder / "images", side=side, mixed=False)
        with reading_zeros():
            train(
                *(stage, "training.steps=1", "training.precision=bf16", "training.batch_size=1"),
                *("data.validation=1", 'sample.prompts=["a fox"]', "sample.steps=1", *overrides),
                base=str(base),
            )
        _plan_agrees(stage)

    return play


_JUDGED = ("judge.every=1", "judge.share=1000", "judge.images=4", "judge.strengths=[1.0]")


def judged(family: str, *overrides: str, side: int) -> Play:
    """Return the same scenario with a run that judges itself; what it is judged by must be drawn."""

    def play(stage: Stage) -> None:
        with _images_that_differ():
            true_base(family, *_JUDGED, *overrides, side=side)(stage)
        assert "judging" in stage.facts["plan_by_peak"], stage.facts
        assert len(stage.told("Judged")) == 1, _notices(stage)

    return play


@contextmanager
def _images_that_differ() -> Iterator[None]:
    """Have what the card made of true images look otherwise than what it drew, which is grey, all of it."""
    import sdlora.training.judge as judge

    original = judge.through_autoencoder

    def noisy(model: Any, images: Sequence[Any], side: int | None = None) -> list[Any]:
        from PIL import Image

        seen = original(model, images, side)
        return [Image.effect_noise(image.size, 20 + 9 * n).convert("RGB") for n, image in enumerate(seen)]

    judge.through_autoencoder = noisy
    try:
        yield
    finally:
        judge.through_autoencoder = original


def one_step(family: str, *overrides: str, side: int) -> Play:
    """Return a scenario that counts what a step of a base of the true size asks of the card, once warm.

    Batch 1, rank 16, bf16. Counted is all that happens from the report of one step to that of the next.
    """

    def play(stage: Stage) -> None:
        from .true_bases import reading_zeros, write_hollow_checkpoint

        base, ledger, first = stage.folder / f"{family}.safetensors", stage.cards.ledger, 2
        write_hollow_checkpoint(base, family)
        draw_images(stage.folder / "images", count=4, side=side)
        alive = 0

        def listen(event: Event) -> None:
            nonlocal alive
            stage.hear(event)
            step = getattr(event, "step", 0) if type(event).__name__ == "StepDone" else 0
            if step == first:
                alive = ledger.alive(0)
                ledger.clear()
            if step == first + 1:
                stage.facts["step"] = {**ledger.step(), "activations": ledger.peak() - alive}

        with reading_zeros():
            train(
                *(stage, f"training.steps={first + 1}", "training.precision=bf16", "training.batch_size=1"),
                *("adapter.rank=16", "adapter.alpha=16", *overrides),
                base=str(base),
                listen=listen,
            )
        assert stage.facts["step"]["launches"] > 100, stage.facts

    return play


def _plan_agrees(stage: Stage) -> None:
    """Compare the plan with the live peak of the card, phase by phase."""
    planned, peaks = stage.facts["phases"], stage.cards.ledger.memory[0].peaks
    assert len(planned) >= 5, planned
    shares = {phase: round(size / peaks.get(phase, 1), 4) for phase, size in planned.items()}
    stage.facts["plan_by_peak"] = shares
    wrong = {phase: share for phase, share in shares.items() if not 0.95 <= share <= 1.05}
    assert not wrong, f"the plan divided by the live peak: {wrong}"


def second_card(stage: Stage) -> None:
    """Train on cuda:1 with everything; the first card is another program's and must not be touched."""
    train(
        *(stage, "training.device=cuda:1", "training.precision=bf16", "data.validation=0.25"),
        *(f"sample.prompts={PROMPTS}", "sample.steps=2", "adapter.text_encoder=true", "adapter.dropout=0.1"),
    )
    only_card(stage, 1)


def served_by_the_second_card(stage: Stage) -> None:
    """Nothing was said of the device: the card that works is taken, in its best format, and goes on later."""
    import torch

    import sdlora
    from sdlora.machine import idle_card_notice

    draw_images(stage.folder / "images")
    settings = {"data.folder": stage.folder / "images", "output.folder": stage.folder / "open"}
    values = {"training.steps": 2, "sample.prompts": [], "data.validation": 0, "training.batch_size": 2}
    sdlora.train(sdlora.load_config(None, (), settings | values), listeners=[stage.hear])
    chosen = {getattr(event, "key", ""): getattr(event, "value", "") for event in stage.told("Decided")}
    assert (chosen["training.device"], chosen["training.precision"]) == ("cuda:1", "bf16"), chosen
    generator = sdlora.ImageGenerator.load("mini")
    assert generator.model.facts.device == torch.device("cuda:1")
    assert idle_card_notice() is None
    only_card(stage, 1)


def previews_out_of_memory(stage: Stage) -> None:
    """Previews do not fit on the card: one notice, however often, and training continues."""
    _refuse(stage, "previews")
    train(
        *(stage, "training.precision=bf16", f"sample.prompts={PROMPTS}", "sample.steps=2"),
        *("data.validation=0.25", "training.batch_size=1"),
    )
    skipped = [text for text in _notices(stage) if "skipped, and training continues" in text]
    assert len(skipped) == 1 and "previews" in skipped[0], _notices(stage)
    counts = {kind: len(stage.told(kind)) for kind in ("StepDone", "Validated", "Sampled")}
    assert counts == {"StepDone": 2, "Validated": 2, "Sampled": 0}, counts


def validation_out_of_memory(stage: Stage) -> None:
    """Validation does not fit on the card: one notice, however often, and training continues."""
    _refuse(stage, "validation")
    train(stage, "training.precision=bf16", "data.validation=0.25", "training.validate_every=1")
    skipped = [text for text in _notices(stage) if "for validation; skipped, and training continues" in text]
    counts = {kind: len(stage.told(kind)) for kind in ("StepDone", "Validated")}
    assert (len(skipped), counts) == (1, {"StepDone": 2, "Validated": 0}), (skipped, counts)


def judging_out_of_memory(stage: Stage) -> None:
    """Judging does not fit on the card: one notice, however often, and training continues."""
    _refuse(stage, "judging")
    train(stage, "training.precision=bf16", *_JUDGED)
    skipped = [text for text in _notices(stage) if "skipped, and training continues" in text]
    assert len(skipped) == 1 and "judging" in skipped[0], _notices(stage)
    counts = {kind: len(stage.told(kind)) for kind in ("StepDone", "Judged")}
    assert counts == {"StepDone": 2, "Judged": 0}, counts


def _refuse(stage: Stage, phase: str) -> None:
    """Let the card be full whenever ``phase`` (of ``ledger.PHASES``) allocates, however little."""
    import torch

    allocate = stage.cards.allocate

    def refuse(index: int, storage: Any) -> None:
        if stage.cards.ledger.here().phase == phase:
            raise torch.OutOfMemoryError(f"CUDA out of memory. The phase {phase} is refused here")
        allocate(index, storage)

    stage.cards.allocate = refuse  # type: ignore[method-assign]


def _notices(stage: Stage) -> list[str]:
    return [getattr(event, "message", "") for event in stage.told("Notice")]


def card_settings(stage: Stage) -> None:
    """What is set for the whole process follows the format that was chosen, in training and in drawing."""
    import torch

    import sdlora

    def now() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic

    for precision in ("bf16", "fp32"):
        dropout = ("adapter.dropout=0.1", "training.steps=1", f"output.folder={stage.folder / precision}")
        train(stage, "training.device=cuda:1", f"training.precision={precision}", *dropout)
        half = precision != "fp32"
        assert now() == (half, half, False, True), (precision, now())
        assert torch.cuda.current_device() == 1
    only_card(stage, 1)
    for precision in ("fp32", "bf16"):
        sdlora.ImageGenerator.load("mini", device="cuda:1", precision=precision)
        assert now()[:2] == (precision != "fp32",) * 2, (precision, now())
    only_card(stage, 1)
    assert not stage.cards.ledger.calls["get_rng_state_all"]


def optimizers_resumed(stage: Stage) -> None:
    """What optimizers keep goes through a checkpoint and comes back to where each wants it."""
    import torch
    from torch import nn

    from sdlora.training import optimizer_state

    shapes = ((64, 32), (16, 4, 3, 3), (40,))

    def parameters() -> list[nn.Parameter]:
        tensors = [nn.Parameter(torch.zeros(shape, device="cuda")) for shape in shapes]
        for parameter in tensors:
            parameter.grad = torch.ones_like(parameter)
        return tensors

    names = [f"part {number}" for number in range(len(shapes))]
    for title, make in _optimizers().items():
        first, fresh = make(parameters()), make(parameters())
        for _ in range(2):
            first.step()
        tensors, values = optimizer_state.pack(first, names)
        assert tensors, title
        assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}, title
        optimizer_state.unpack(fresh, names, tensors, values)
        fresh.step()
        before, after = [_places(o) for o in (first, fresh)]
        assert before == after, (title, before, after)
    stage.facts["optimizers"] = list(_optimizers())


def _places(optimizer: Any) -> dict[str, list[str]]:
    """Return where an optimizer keeps each of its tensors."""
    places: dict[str, set[str]] = {}
    for part in (*optimizer.state.values(), *optimizer.param_groups):
        for name, value in part.items():
            if name != "params" and hasattr(value, "device"):
                places.setdefault(name, set()).add(str(value.device))
    return {name: sorted(devices) for name, devices in places.items()}


def _optimizers() -> dict[str, Callable[[list[Any]], Any]]:
    """Return makers of every kind of state there is: fused, factored, with numbers of its own, with modes."""
    import torch
    from prodigyopt import Prodigy

    makers: dict[str, Callable[[list[Any]], Any]] = {
        "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW": lambda p: torch.optim.AdamW(p, foreach=False),
        "Adafactor": lambda p: torch.optim.Adafactor(p),
        "Prodigy": lambda p: Prodigy(p),
        "RAdam": lambda p: torch.optim.RAdam(p),
        "Adagrad": lambda p: torch.optim.Adagrad(p),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        return makers

    def schedule_free(given: list[Any]) -> Any:
        optimizer = AdamWScheduleFree(given, lr=0.1)
        optimizer.train()
        return optimizer

    return {**makers, "schedule-free AdamW": schedule_free}
