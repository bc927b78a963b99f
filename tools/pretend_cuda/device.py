"""The pretended cards, and what torch's CUDA functions answer for them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .build import GUARD
from .cards import CONTEXT_BYTES, GIB, Card
from .ledger import CardMemory, Ledger


class Cards:
    """The cards of a pretended machine.

    Args:
        cards: from ``cuda:0`` on.
        libraries: folder of :func:`tools.pretend_cuda.build.built`.
        ledger: notes what is asked of them.
    """

    def __init__(self, cards: Sequence[Card], libraries: Path, ledger: Ledger) -> None:
        self.cards, self.ledger = tuple(cards), ledger
        self.lock = threading.RLock()
        self._library = ctypes.CDLL(str(libraries / GUARD))
        self._library.pretend_cuda(len(self.cards))

    @property
    def current(self) -> int:
        """The calling thread's current card."""
        return int(self._library.pretended_current_device())

    def exchange(self, index: int) -> int:
        """Make a card current, unless ``index`` is negative; return the one before."""
        before = int(self._library.pretended_exchange_device(index))
        if index >= 0 and index != before:
            self.ledger.touch(index)
        return before

    def index_of(self, device: Any = None) -> int:
        """Return the card that torch means by a device, its name, a number, or None."""
        if device is None:
            return self.current
        if isinstance(device, int):
            return self.current if device < 0 else self._checked(device)
        index = torch.device(device).index
        return self.current if index is None else self._checked(index)

    def allocate(self, index: int, storage: Any) -> None:
        """Count a tensor's memory on a card.

        Raises:
            torch.OutOfMemoryError: if the card has not so much.
        """
        size = storage.nbytes()
        self.ledger.allocate(self._checked(index), storage, size)
        card = self.cards[index]
        if self.ledger.alive(index) > card.bytes - card.taken - CONTEXT_BYTES:
            free = card.bytes - card.taken - CONTEXT_BYTES - self.ledger.alive(index) + size
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / GIB:.2f} GiB. GPU {index} has a total "
                f"capacity of {card.bytes / GIB:.2f} GiB of which {max(0, free) / GIB:.2f} GiB is free."
            )

    def free(self, index: int) -> int:
        """Return a card's free bytes as the driver tells them, the context being open."""
        card = self.cards[index]
        return max(0, card.bytes - card.taken - CONTEXT_BYTES - self.ledger.alive(index))

    def install(self) -> None:
        """Put the answers in the place of ``torch.cuda``'s functions, for the rest of this process."""
        for name, answer in (self._facts() | self._actions() | self._memory()).items():
            assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
            setattr(torch.cuda, name, answer)
        torch.version.cuda = "12.8"
        if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # bitsandbytes asks when it is imported
            torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]

    def _facts(self) -> dict[str, Callable[..., Any]]:
        def properties(device: Any = None) -> Any:
            card = self.cards[self.index_of(device)]
            return _Properties(card.name, *card.capability, card.bytes)

        def bf16(including_emulation: bool = True) -> bool:
            return including_emulation or self.cards[self.current].capability >= (8, 0)

        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: len(self.cards),
            "current_device": lambda: self.current,
            "is_bf16_supported": bf16,
            "get_device_name": lambda device=None: self.cards[self.index_of(device)].name,
            "get_device_capability": lambda device=None: self.cards[self.index_of(device)].capability,
            "get_device_properties": properties,
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        }

    def _actions(self) -> dict[str, Callable[..., Any]]:
        state = torch.zeros(16, dtype=torch.uint8)

        def synchronize(device: Any = None) -> None:
            self._asked("synchronize", device)
            self.ledger.wait("torch.cuda.synchronize")

        def nothing(name: str, result: Any = None) -> Callable[..., Any]:
            def call(*_: Any, **__: Any) -> Any:
                self.ledger.calls[name] += 1
                return result

            return call

        stream = type("Stream", (_Stream,), {"ledger": self.ledger})

        def rng_state(device: Any = "cuda") -> Any:
            self._asked("get_rng_state", device)
            return state.clone()

        def set_rng_state(_: Any, device: Any = "cuda") -> None:
            self._asked("set_rng_state", device)

        return {
            "Event": type("Event", (_Event,), {"ledger": self.ledger}),
            "Stream": stream,
            "current_stream": stream,
            "stream": lambda stream: nullcontext(stream),
            "_lazy_init": lambda: None,
            "_exchange_device": self.exchange,
            "_maybe_exchange_device": self.exchange,
            "set_device": lambda device: self.exchange(self._asked("set_device", device)),
            "synchronize": synchronize,
            "empty_cache": nothing("empty_cache"),
            "manual_seed": nothing("manual_seed"),
            "manual_seed_all": nothing("manual_seed_all"),
            "get_rng_state": rng_state,
            "set_rng_state": set_rng_state,
            "get_rng_state_all": lambda: [rng_state(index) for index in range(len(self.cards))],
            "set_rng_state_all": lambda states: [set_rng_state(s, i) for i, s in enumerate(states)],
            "ipc_collect": nothing("ipc_collect"),
        }

    def _memory(self) -> dict[str, Callable[..., Any]]:
        def memory(device: Any = None) -> CardMemory:
            return self.ledger.memory.setdefault(self.index_of(device), CardMemory())

        def information(device: Any = None) -> tuple[int, int]:
            index = self._asked("mem_get_info", device)
            return self.free(index), self.cards[index].bytes

        def reset(device: Any = None) -> None:
            self._asked("reset_peak_memory_stats", device)
            memory(device).peak_since_reset = memory(device).alive

        return {
            "mem_get_info": information,
            "memory_allocated": lambda device=None: memory(device).alive,
            "memory_reserved": lambda device=None: memory(device).alive,
            "max_memory_allocated": lambda device=None: memory(device).peak_since_reset,
            "max_memory_reserved": lambda device=None: memory(device).peak_since_reset,
            "reset_peak_memory_stats": reset,
        }

    def _asked(self, name: str, device: Any) -> int:
        """Note a call that needs a card's context; return the card."""
        self.ledger.calls[name] += 1
        index = self.index_of(device)
        self.ledger.touch(index)
        return index

    def _checked(self, index: int) -> int:
        if index >= len(self.cards):
            raise RuntimeError(
                f"CUDA error: invalid device ordinal (cuda:{index} of {len(self.cards)} pretended cards)"
            )
        return index


class _Event:
    """A mark in a stream: all work is done when it is asked for, but waiting for it is waiting."""

    ledger: ClassVar[Ledger]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.ledger.calls["Event"] += 1

    def record(self, stream: Any = None) -> None:
        """See torch."""

    def query(self) -> bool:
        """See torch."""
        return True

    def synchronize(self) -> None:
        """See torch."""
        self.ledger.wait("torch.cuda.Event.synchronize")


class _Stream:
    """A queue of work; which work is in which is not followed."""

    ledger: ClassVar[Ledger]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.ledger.calls["Stream"] += 1

    def wait_event(self, event: _Event) -> None:
        """See torch."""

    def synchronize(self) -> None:
        """See torch."""
        self.ledger.wait("torch.cuda.Stream.synchronize")


@dataclass(frozen=True)
class _Properties:
    """As ``torch.cuda.get_device_properties`` gives them."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int = 128
