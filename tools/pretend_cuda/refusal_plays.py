"""The pretence itself: what it refuses, and what it counts."""

from __future__ import annotations

from collections.abc import Callable

from .stage import Stage


def refusals(stage: Stage) -> None:
    """The pretence itself: it refuses what a card refuses, and counts what a card would have to do."""
    import torch

    ledger, host = stage.cards.ledger, torch.ones(1000)
    first, second = host.to("cuda:0"), host.to("cuda:1")
    step = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    step |= {"amsgrad": False, "maximize": False}
    index = torch.zeros(3, dtype=torch.long)
    wrong: dict[str, Callable[[], object]] = {
        "card and host": lambda: first + host,
        "two cards": lambda: first + second,
        "a table on the host": lambda: host[index.to("cuda")],
        "a generator of the host": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        "an optimizer's state": lambda: torch._fused_adamw_(
            *([first], [first], [first], [first], [], [torch.ones(())]), **step
        ),
        "a card that is not there": lambda: torch.ones(3, device="cuda:2"),
        "more than there is": lambda: torch.empty(30 * 2**30, dtype=torch.uint8, device="cuda"),
    }
    accepted = []
    for name, do in wrong.items():
        try:
            do()
        except (RuntimeError, torch.OutOfMemoryError):
            continue
        accepted.append(name)
    assert not accepted, f"accepted: {accepted}"
    assert float((first * 2).sum()) == 1.0 and str(first.device) == "cuda:0"
    del wrong
    ledger.clear()
    kept = (first + 1).cpu()
    first.copy_(host.pin_memory(), non_blocking=True)
    first.copy_(host, non_blocking=True)
    first[index] = 0.0
    assert kept.device.type == "cpu" and kept.shape == (1000,)
    counted = ledger.copied("to host"), ledger.copied("to card"), sum(ledger.launches.values())
    assert counted == (4000, 8000 + 24, 2), f"bytes to the host, to the card, launches: {counted}"
    assert sum(ledger.waits.values()) == 2, ledger.waits  # to the host; the index: in the background nothing
    before = ledger.alive(1), ledger.alive(0)
    torch.cuda.set_device(1)
    third = torch.zeros(256, device="cuda")
    assert third.device == torch.device("cuda:1") and (ledger.alive(1), ledger.alive(0)) == (
        before[0] + 1024,
        before[1],
    )
    del third
    assert ledger.alive(1) == before[0], "what is dead still counts"
    same, other = first.cpu(), first.add_(1).cpu()
    assert not torch.equal(same, other), "what was written to looks unchanged"
    assert torch.equal(other, first.detach().cpu()) and bool(torch.isfinite(first).cpu().all())
