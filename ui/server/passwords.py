"""Passwords: long enough, compared in constant time, guessed slowly.

A guess counts when its text has arrived, not when its connection opened: nothing is awaited between reading
the count and raising it, so a thousand simultaneous connections get no more guesses than successive ones. An
address that guesses wrongly must wait, each time twice as long; and all unknown addresses together have a
budget, so that using many addresses does not help either. Neither affects those who have logged in: a
session is not asked again, and an address that has logged in before does not wait for the unknown ones.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from sdlora.errors import ConfigError

LEAST_CHARACTERS = 8
FREE_GUESSES = 3
"""Wrong guesses that an address may make before it has to wait."""
FIRST_WAIT, LONGEST_WAIT = 2.0, 900.0  # seconds
STRANGERS, STRANGERS_WINDOW = 30, 60.0
"""Wrong guesses that all unknown addresses together may make, and in how many seconds."""
MOST_ADDRESSES = 10_000
_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"  # no characters that look alike


def check_password(password: str) -> None:
    """Refuse a password that is soon guessed.

    Raises:
        ConfigError: when it is too short.
    """
    if len(password) < LEAST_CHARACTERS:
        raise ConfigError(
            f"--password: has {len(password)} characters, at least {LEAST_CHARACTERS} are needed; leave it "
            "out and a passphrase is made for you"
        )


def new_passphrase() -> str:
    """Return four groups of five random characters, about 99 bits."""
    groups = ("".join(secrets.choice(_ALPHABET) for _ in range(5)) for _ in range(4))
    return "-".join(groups)


def same_password(given: str, password: str) -> bool:
    """Compare two passwords in a time that depends on neither."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, password)]
    return hmac.compare_digest(*digests)


def network_of(address: str) -> str:
    """Return the network that counts as one address: one IPv6 customer has a whole /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class Guesses:
    """Wrong passwords so far, and who has to wait for them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # count, when the next may come
        self._strangers: deque[float] = deque()
        self._known: OrderedDict[str, None] = OrderedDict()

    def wait_for(self, address: str) -> float:
        """Return how many seconds an address has to wait before its next guess; 0 if none."""
        address, now = network_of(address), self._clock()
        _, free_at = self._wrong.get(address, (0, 0.0))
        if free_at > now:
            return free_at - now
        if address in self._known:
            return 0.0
        while self._strangers and self._strangers[0] <= now - STRANGERS_WINDOW:
            self._strangers.popleft()
        if len(self._strangers) >= STRANGERS:
            return self._strangers[0] + STRANGERS_WINDOW - now
        return 0.0

    def wrong(self, address: str) -> None:
        """Count a wrong guess."""
        address, now = network_of(address), self._clock()
        count = self._wrong.pop(address, (0, 0.0))[0] + 1
        late = count - FREE_GUESSES
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(late, 30)) if late >= 0 else 0.0
        self._wrong[address] = count, now + wait
        while len(self._wrong) > MOST_ADDRESSES:
            self._wrong.popitem(last=False)
        if address not in self._known:
            self._strangers.append(now)

    def right(self, address: str) -> None:
        """Forget the wrong guesses of an address that logged in, and count it as known from now on."""
        address = network_of(address)
        self._wrong.pop(address, None)
        self._known.pop(address, None)
        self._known[address] = None
        while len(self._known) > MOST_ADDRESSES:
            self._known.popitem(last=False)
