"""The processes of one run: which one this is, the messages between them, gradients added in a fixed order.

Launchers (torchrun, ``accelerate launch``, MPI, ``sdlora train --processes``) say in the environment which
process this is; accelerate connects them. They exchange messages with :meth:`Processes.exchange`, which
waits as long as necessary, but not for a process that has ended. A process that fails sends its error as its
next message, wherever the others wait, so that all end at once and the run says once what was wrong.

Gradients are added in the order of the ranks, not in whatever order a ring brings them. So the sum equals,
bit for bit, that of one process which computes the same micro-batches one after the other.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as distributed
from torch import Tensor

from ..devices import choose_device, is_out_of_memory
from ..errors import ConfigError, OtherProcessError, SdloraError, TrainingError

_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_AS_LONG_AS_IT_TAKES = timedelta(days=7)
_TO_JOIN = timedelta(minutes=10)
_LAST_WORDS = timedelta(seconds=20)  # how long a failing process tries to tell the others why
_PIECE = 2**24  # values sent at once: 64 MiB in fp32, so that no second copy of all gradients is held
_FRAME = 1024  # bytes; messages up to this length are sent in one go
_LENGTH = 8  # bytes that say how long a message is
_LEAST_PATIENCE = 120.0  # seconds


@dataclass
class Processes:
    """One process and its relation to the others; by default it is alone.

    Attributes:
        rank: number of this process, from 0; process 0 writes and speaks.
        count: of the processes.
        device: where this process computes, if a launcher decides that.
        patience: seconds to wait for the others' next step before they count as unreachable.
        one_machine: all processes are on this machine.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    patience: float = _LEAST_PATIENCE
    one_machine: bool = True
    _messages: Any = field(default=None, repr=False)  # a gloo group: on the CPU, with time-outs of its own
    _gradients: Any = field(default=None, repr=False)  # for what all begin at once, so with a short time-out

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @classmethod
    def join(cls, device: str | None) -> Processes:
        """Return this process as one of those that a launcher started; without a launcher it is alone.

        Args:
            device: as in ``training.device``.

        Raises:
            ConfigError: if the environment is not that of a launcher, or there are not enough cards.
        """
        count = world_size(os.environ)
        if count == 1:
            return cls()
        _check_environment(count)
        on_cpu = _choose_kind(device) == "cpu"
        _choose_interface()
        from accelerate import PartialState  # takes several seconds, and one process does not need it

        state = PartialState(cpu=on_cpu, timeout=_TO_JOIN)
        if state.num_processes != count:
            raise ConfigError(
                f"{count} processes were started, but accelerate sees {state.num_processes}; start them with "
                "`sdlora train --processes N`, torchrun or accelerate launch"
            )
        messages = distributed.new_group(backend="gloo", timeout=_AS_LONG_AS_IT_TAKES)
        gradients = distributed.new_group(timeout=timedelta(seconds=_patience()))
        # accelerate says cpu:0, which torch takes for another device than cpu: moving a tensor would copy it
        place = torch.device("cpu") if on_cpu else state.device
        return cls(state.process_index, count, place, _patience(), _one_machine(), messages, gradients)

    def leave(self) -> None:
        """Disconnect from the others; nothing can be exchanged afterwards."""
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def exchange(self, message: Any = None, *, at_once: bool = False) -> list[Any]:
        """Return what every process gave at this point, by rank.

        Args:
            message: anything JSON can hold; floats arrive exactly.
            at_once: all processes are about to get here, so wait no longer than :attr:`patience`.

        Raises:
            OtherProcessError: if another process failed, which says so itself.
            TrainingError: if another process failed, in the main process; or if one has ended.
        """
        if self.count == 1:
            return [message]
        frames = self.exchange_bytes(json.dumps(message).encode(), at_once=at_once)
        return [json.loads(frame) for frame in frames]

    def exchange_bytes(self, message: bytes, *, at_once: bool = False) -> list[bytes]:
        """Return the bytes that every process gave at this point; see :meth:`exchange`."""
        if self.count == 1:
            return [message]
        frames = self._gathered(b"+" + message, timedelta(seconds=self.patience) if at_once else None)
        self._heed(frames)
        return [frame[1:] for frame in frames]

    def together(self, make: Callable[[], bytes]) -> list[bytes]:
        """Return the shares that the processes make, by rank.

        Raises:
            torch.OutOfMemoryError: in all processes, if one of them lacks memory.
            TrainingError: in all processes, if one of them fails in another way.
        """
        if self.count == 1:
            return [make()]
        try:
            message = b"1" + make()
        except Exception as error:
            told = b"2" + (str(error) or type(error).__name__).encode()
            message = b"0" if is_out_of_memory(error) else told
        shares = self.exchange_bytes(message)
        if b"0" in shares:
            raise torch.OutOfMemoryError("a process lacks memory")
        for rank, share in enumerate(shares, start=1):
            if share.startswith(b"2"):
                raise TrainingError(f"in process {rank} of {self.count}: {share[1:].decode()}")
        return [share[1:] for share in shares]

    def from_main(self, make: Callable[[], bytes]) -> bytes:
        """Return in every process the bytes that the main one makes."""
        content = make() if self.is_main else b""
        if self.count == 1:
            return content
        length = self.exchange(len(content))[0]
        whole = torch.zeros(length, dtype=torch.uint8)
        if self.is_main:
            whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for piece in whole.split(_PIECE):
            distributed.broadcast(piece, 0, group=self._messages)
        return whole.numpy().tobytes()

    def is_end(self, error: BaseException) -> bool:
        """Return whether an error says that another process ended the run, or cannot be reached."""
        if self.count == 1:
            return False
        return isinstance(error, OtherProcessError | _Heard) or _is_of_the_connection(error)

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends; raise instead where this one is not to say it.

        All processes may fail at once, for the same reason: then only the first one reports it.

        Raises:
            OtherProcessError: if another process reports the error.
            TrainingError: if a process has ended.
        """
        if self.count == 1 or isinstance(error, OtherProcessError | _Heard):
            return
        if not isinstance(error, SdloraError) and _is_of_the_connection(error):
            raise self._gone(error) from None
        try:
            frames = self._gathered(b"-" + (str(error) or type(error).__name__).encode(), _LAST_WORDS)
        except _Heard:  # the others have ended; this process reports its own error all the same
            return
        first = next(rank for rank, frame in enumerate(frames) if frame.startswith(b"-"))
        if first != self.rank:
            self._heed(frames)

    def add_in_order(self, total: Tensor, part: Tensor) -> None:
        """Add the parts of all processes to ``total``, that of process 0 first; all get the same.

        Args:
            total: (N,) float32, equal in all processes.
            part: (N,) of any float format.
        """
        if self.count == 1:
            total.add_(part)
            return
        for sums, piece in zip(total.split(_PIECE), part.split(_PIECE), strict=True):
            self._add_piece(sums, piece)

    def _add_piece(self, sums: Tensor, piece: Tensor) -> None:
        """Add one piece: each process sums its share of the values and then sends the sums to the others."""
        share = -(-piece.numel() // self.count)
        sent = piece.new_zeros(share * self.count)
        sent[: piece.numel()] = piece
        received = torch.empty_like(sent)
        # as bytes: not every backend can send every number format this way
        distributed.all_to_all_single(
            received.view(torch.uint8), sent.view(torch.uint8), group=self._gradients
        )
        whole = sums.new_zeros(share * self.count)
        whole[: sums.numel()] = sums
        shares = list(whole.view(self.count, share).unbind())
        summed = shares[self.rank].clone()
        for row in received.view(self.count, share):
            summed.add_(row)
        distributed.all_gather(shares, summed, group=self._gradients)
        sums.copy_(whole[: sums.numel()])

    def _gathered(self, frame: bytes, wait: timedelta | None) -> list[bytes]:
        """Return all frames by rank; two rounds if one is long."""
        head = len(frame).to_bytes(_LENGTH, "big") + frame[: _FRAME - _LENGTH]
        heads = self._all_gather(head, _FRAME, wait)
        lengths = [int.from_bytes(head[:_LENGTH], "big") for head in heads]
        longest = max(lengths)
        if longest <= _FRAME - _LENGTH:
            frames = [head[_LENGTH:] for head in heads]
        else:
            frames = self._all_gather(frame, longest, wait)
        return [frame[:length] for frame, length in zip(frames, lengths, strict=True)]

    def _all_gather(self, content: bytes, size: int, wait: timedelta | None) -> list[bytes]:
        sent = torch.zeros(size, dtype=torch.uint8)
        sent[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.count)]
        try:
            work = distributed.all_gather(received, sent, group=self._messages, async_op=True)
            work.wait(wait or _AS_LONG_AS_IT_TAKES)
        except RuntimeError as error:
            raise self._gone(error) from None
        return [part.numpy().tobytes() for part in received]

    def _heed(self, frames: list[bytes]) -> None:
        """Raise if another process sent an error instead of a message."""
        for rank, frame in enumerate(frames):
            if frame.startswith(b"-"):
                if (
                    self.is_main and not self.one_machine
                ):  # whoever started this sees only this machine's output
                    raise _Heard(f"process {rank + 1} of {self.count}: {frame[1:].decode()}")
                raise OtherProcessError(
                    f"process {rank + 1} of {self.count} ended the run: {frame[1:].decode()}"
                )

    def _gone(self, error: BaseException) -> TrainingError:
        # gloo keeps a thread waiting for a message without an answer, which would delay this process's end
        atexit.register(_end_at_once)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return _Heard(
            f"process {self.rank + 1} of {self.count}: another process ended without a word, or its machine "
            f"cannot be reached ({reason[:160]}); look at its output, then continue with --resume"
        )


def _end_at_once() -> None:
    """End this process with the exit code of any error that was reported."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


class _Heard(TrainingError):
    """An error that the others know about, or can no longer be told about."""


def world_size(environment: Mapping[str, str]) -> int:
    """Return how many processes a launcher says there are; 1 without a launcher.

    Raises:
        ConfigError: if that is not a number.
    """
    for name in _WORLD:
        if text := environment.get(name):
            if not text.isdigit() or int(text) < 1:
                raise ConfigError(f"environment variable {name}={text}: must be a number of processes")
            return int(text)
    return 1


def _check_environment(count: int) -> None:
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing and os.environ.get("WORLD_SIZE"):
        raise ConfigError(
            f"WORLD_SIZE={count} is set, but not {', '.join(missing)}: that is half a launcher's "
            "environment: this process cannot find the others; use `sdlora train --processes N`, torchrun or "
            "accelerate launch, or unset WORLD_SIZE"
        )


def _choose_kind(setting: str | None) -> str:
    """Return cuda or cpu for all processes.

    Raises:
        ConfigError: for a device that several processes cannot share.
    """
    if setting is not None and ":" in setting:
        raise ConfigError(
            f"`training.device={setting}`: with several processes each takes a card of its own; leave it "
            "out, and choose the cards with the environment variable CUDA_VISIBLE_DEVICES"
        )
    if setting == "mps":
        raise ConfigError("`training.device=mps`: an Apple GPU serves one process; use cpu, or one process")
    if setting is not None:
        kind = choose_device(setting).type
    else:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "cuda" and local > torch.cuda.device_count():
        raise ConfigError(
            f"{local} processes were started on this machine, which has {torch.cuda.device_count()} GPU(s) "
            "that torch can use; start one process for each card, or use training.device=cpu"
        )
    return kind


def _choose_interface() -> None:
    """Tell gloo through which network interface to reach the others, unless the user has.

    By default it takes the address of the host's name, which on Debian and Ubuntu is 127.0.1.1: no other
    machine can connect to that. On one machine the loopback works, with or without a network.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or os.name == "nt":
        return
    address = "127.0.0.1" if _one_machine() else _address_towards(os.environ.get("MASTER_ADDR", ""))
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _address_towards(host: str) -> str | None:
    """Return this machine's address as another one sees it, without sending anything."""
    for target in (host, "192.0.2.1"):  # the second belongs to nobody (RFC 5737): it gives the default route
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            address = str(probe.getsockname()[0])
            if not address.startswith("127."):
                return address
    return None


def _patience() -> float:
    text = os.environ.get("SDLORA_PATIENCE_SECONDS", "")
    return float(text) if text.replace(".", "", 1).isdigit() else _LEAST_PATIENCE


def _is_of_the_connection(error: BaseException) -> bool:
    """Tell whether torch could not reach another process."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset")
    )
