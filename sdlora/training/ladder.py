"""The memory ladder: from what a device has free, the mildest ways to save memory with which a run fits.

A rung is a setting, or a few. Rungs are climbed in the order of the work that they add; those that leave the
numbers as they are, bit for bit or but for rounding, come before those that change them. What the user set is
never changed. Each plan of a large base takes seconds, so few are made: the rungs of recomputation are halved
between the first and the last, and how many blocks are at one is estimated, then checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ..config.defaults import OpenSettings
from ..config.schema import Config
from ..errors import ConfigError
from ..files import size_text
from .memory import MemoryPlan

Planner = Callable[[Config], MemoryPlan]
RECOMPUTE = ("nothing", "norms", "gates", "projections", "blocks")
RUNG_KEYS = (
    *("training.autoencoder", "training.recompute", "training.recompute_blocks", "training.offload_blocks"),
    *("training.fast", "optimizer.name", "training.base_format"),
)
"""Settings that the ladder may decide; a run that goes on keeps them."""
AUTO_SHARE = 0.95
"""Of what is free, that ``auto`` plans with: kernels need room of their own, and memory is handed out in
pieces."""
_LEAST = 0.001  # share of a step's arithmetic below which no figure is told
APART = "blocks, lora, kernels"
"""The fast paths that can be named, without the one that holds copies of what it computes together."""
_AGAIN = 2  # times that the line to the number of blocks is drawn anew
_WORTH = 0.99  # of the memory before, that is worth smaller products
_SIZE = re.compile(r"^(\d+(?:\.\d+)?) ?(GB|GiB|G|MB|MiB|M)$", re.IGNORECASE)


@dataclass(frozen=True)
class Taken:
    """A rung that was taken.

    Attributes:
        key: dotted key of the setting.
        value: what it was set to.
        cost: what it costs, for people.
    """

    key: str
    value: Any
    cost: str

    def render(self) -> str:
        """Return it for people."""
        return f"{self.key}={self.value}: {self.cost}"


@dataclass(frozen=True)
class Climbed:
    """Where the ladder was left.

    Attributes:
        taken: the rungs, in the order in which they were climbed.
        config: the settings with them.
        plan: of these settings.
        fits: whether it fits.
        work: the step's arithmetic beside that without any rung, 1 for the same; None if not counted.
    """

    taken: tuple[Taken, ...]
    config: Config
    plan: MemoryPlan
    fits: bool
    work: float | None = None


def budget_of(setting: str, free: int | None, device: torch.device) -> int | None:
    """Return the bytes that a run may take, or None for any number.

    Args:
        setting: ``training.memory``.
        free: what the device has free.
        device: on a CPU ``auto`` sets no limit: all of it is main memory already.

    Raises:
        ConfigError: for a size that is none.
    """
    if setting == "max":
        return None
    if setting == "auto":
        return None if free is None or device.type != "cuda" else int(free * AUTO_SHARE)
    return parse_size(setting)


def parse_size(text: str) -> int:
    """Return the bytes that a size like ``6GB`` means; GB are counted as cards are, in 2^30 bytes.

    Raises:
        ConfigError: if it is no size.
    """
    match = _SIZE.match(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"`{text}` is no amount of memory; give auto, max or a size, e.g. 12GB")
    return int(float(match[1]) * (2**30 if match[2][0] in "gG" else 2**20))


def offload_room(device: torch.device) -> int | None:
    """Return the bytes of main memory that offloaded blocks may take: half of what is free.

    All of the base is read there, too, and pinned memory is limited.
    """
    return int(psutil.virtual_memory().available // 2) if device.type == "cuda" else None


def climb(config: Config, budget: int | None, plan: Planner, *, main_memory: int | None = None) -> Climbed:
    """Take the mildest rungs with which a run fits.

    Args:
        config: resolved settings; what they leave open may be decided.
        budget: bytes that the run may take.
        plan: counts what settings take.
        main_memory: bytes that offloaded blocks may take; None for any number.
    """
    first = plan(config)
    climber = _Climber(config, first, budget, plan, main_memory)
    if budget is not None:
        climber.climb()
    now = climber.plan
    work = now.flops / first.flops if first.flops else None
    fits = budget is None or now.needed <= budget
    return Climbed(tuple(climber.taken), climber.config, now, fits, work)


def decide(open_settings: OpenSettings, budget: int | None, plan: Planner, main_memory: int | None) -> None:
    """Climb, and fill the settings with the rungs that were taken, each with its cost as the reason.

    Without a limit nothing is counted.
    """
    if budget is None:
        return
    for rung in climb(open_settings.final(), budget, plan, main_memory=main_memory).taken:
        open_settings.put(rung.key, rung.value, rung.cost)


class _Climber:
    """Takes one rung after the other until the run fits."""

    def __init__(
        self, config: Config, plan: MemoryPlan, budget: int | None, planner: Planner, main_memory: int | None
    ) -> None:
        self.config, self.plan, self.taken = config, plan, list[Taken]()
        self._budget = math.inf if budget is None else budget
        self._planner, self._main_memory, self._first = planner, main_memory, plan

    def climb(self) -> None:
        for rung in (
            self._bands,
            self._recompute,
            self._apart,
            self._offload,
            self._eight_bit,
            self._formats,
        ):
            if self._fits():
                return
            rung()

    def _fits(self, plan: MemoryPlan | None = None) -> bool:
        """Tell whether everything fits, what can be skipped as well."""
        return (plan or self.plan).peak <= self._budget

    def _step_fits(self, plan: MemoryPlan) -> bool:
        """Tell whether the step fits, and what comes with it."""
        steps = ("placing", "step", "validation")
        return max(plan.phases.get(name, 0) for name in steps) <= self._budget

    def _take(self, changes: Mapping[str, Any], plan: MemoryPlan, cost: str) -> None:
        for key, value in changes.items():
            if self.config.get(key) != value:
                self.taken = [rung for rung in self.taken if rung.key != key]
                self.taken.append(Taken(key, value, cost))
        self.config, self.plan = _changed(self.config, changes), plan

    def _bands(self) -> None:
        """Encode and decode in bands, where that is what does not fit."""
        names = ("encoding", "previews", "judging")
        large = [name for name in names if self.plan.phases.get(name, 0) > self._budget]
        if large and self.config.training.autoencoder is None:
            changes = {"training.autoencoder": "banded"}
            cost = f"{' and '.join(large)} in less memory, but slower; steps as before"
            self._take(changes, self._planner(_changed(self.config, changes)), cost)

    def _recompute(self) -> None:
        """Compute again what the step keeps, as little as is enough."""
        if self.config.training.recompute is not None or self._step_fits(self.plan):
            return
        plans: dict[int, MemoryPlan] = {0: self.plan}

        def at(rung: int) -> MemoryPlan:
            if rung not in plans:
                plans[rung] = self._planner(self._at(rung, None))
            return plans[rung]

        low, high = 0, len(RECOMPUTE) - 1  # low does not fit; the last one is as far as it goes
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._step_fits(at(middle)) else (middle, high)
        below, there = at(low), at(high)
        count = self._enough(below, there, there.blocks.get(RECOMPUTE[high], 0))
        if count is not None:
            partly = self._planner(self._at(high, count))
            if self._step_fits(partly):
                count, partly = self._fewer(below, partly, high, count)
                self._take(self._values(high, count), partly, self._work(partly))
                return
        self._take(self._values(high, None), there, self._work(there))

    def _enough(self, below: MemoryPlan, there: MemoryPlan, blocks: int) -> int | None:
        """Return how many blocks at the higher rung should be enough; None for all.

        The first blocks save more than the later ones, so that a straight line between none and all is safe.
        """
        high, low = (max(p.phases["step"], p.phases.get("validation", 0)) for p in (below, there))
        if not blocks or low > self._budget or high <= low:
            return None
        count = math.ceil((high - self._budget) / (high - low) * blocks)
        return count if 0 < count < blocks else None

    def _fewer(self, below: MemoryPlan, plan: MemoryPlan, rung: int, count: int) -> tuple[int, MemoryPlan]:
        """Draw the line again from none to the blocks that are enough: it may show that fewer are."""
        for _ in range(_AGAIN):
            fewer = self._enough(below, plan, count)
            if fewer is None:
                break
            closer = self._planner(self._at(rung, fewer))
            if not self._step_fits(closer):
                break
            count, plan = fewer, closer
        return count, plan

    def _values(self, rung: int, count: int | None) -> dict[str, Any]:
        values: dict[str, Any] = {"training.recompute": RECOMPUTE[rung]}
        return values if count is None else {**values, "training.recompute_blocks": count}

    def _at(self, rung: int, count: int | None) -> Config:
        return _changed(self.config, self._values(rung, count))

    def _work(self, plan: MemoryPlan) -> str:
        if not self._first.flops:
            return "more work a step"
        more = plan.flops / self._first.flops - 1
        # below zero where products are made apart whose joint form multiplies zeros, too
        return f"{more:.1%} more arithmetic a step" if more >= _LEAST else "hardly more arithmetic a step"

    def _apart(self) -> None:
        """Compute without copies of the adapter, where layers were to be computed together."""
        if self.config.training.fast != "auto":
            return
        changes = {"training.fast": APART}
        plan = self._planner(_changed(self.config, changes))
        if plan.peak < _WORTH * self.plan.peak:
            self._take(changes, plan, "q, k and v one by one: more and smaller products, as much arithmetic")

    def _offload(self) -> None:
        """Leave blocks in main memory, as many as are needed."""
        if self.config.training.offload_blocks is not None or not self.plan.block_sizes:
            return
        if self.config.adapter.kind != "lora" or "joint" in self.config.training.fast:
            return  # contradictions
        sizes = sorted(self.plan.block_sizes, reverse=True)
        for count in range(3, len(sizes) + 1):
            if self._main_memory is not None and sum(sizes[:count]) > self._main_memory:
                return
            plan = self.plan.with_offloaded(count)
            if self._fits(plan) or (count == len(sizes) and plan.peak < self.plan.peak):
                cost = f"{size_text(plan.copied)} copied to the device a step"
                self._take({"training.offload_blocks": count}, plan, cost)
                return

    def _eight_bit(self) -> None:
        """Keep the optimizer's moments in 8 bits, where no optimizer was named."""
        if "name" not in self.config.optimizer.model_fields_set and self.config.optimizer.name == "adamw":
            changes = {"optimizer.name": "adamw8bit"}
            plan = self._planner(_changed(self.config, changes))
            self._take(changes, plan, "moments rounded to 8 bits; no more work")

    def _formats(self) -> None:
        """Keep the base in fewer bits."""
        for name, bits in (("fp8", 8), ("nf4", 4)):
            if self._fits() or self.config.training.base_format not in (None, "fp8"):
                return
            changes = {"training.base_format": name}
            plan = self._planner(_changed(self.config, changes))
            self._take(changes, plan, f"the base rounded to {bits} bits, which changes results a little")


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return settings with others in their place; not validated, as each is one of those that there are."""
    for key, value in changes.items():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def next_rung(config: Config, possible: Sequence[str] = RECOMPUTE) -> dict[str, Any] | None:
    """Return the settings of the next rung for a run under way: one that leaves its numbers as they are.

    Args:
        config: of the run.
        possible: rungs of recomputation.
    """
    now = config.training.recompute or "nothing"
    if config.training.recompute_blocks is not None and now != "nothing":
        return {"training.recompute": now, "training.recompute_blocks": None}
    later = possible[possible.index(now) + 1 :] if now in possible else ()
    return {"training.recompute": later[0], "training.recompute_blocks": None} if later else None


def told(climbed: Climbed) -> Iterator[str]:
    """Yield the rungs that were taken, a line each, for people."""
    if not climbed.taken:
        yield "no rung is needed"
    for rung in climbed.taken:
        yield rung.render()
