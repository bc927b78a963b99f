"""Guesses are slow, for one address and for many, and never in the way of those who are in."""

from __future__ import annotations

import pytest
from sdlora_ui.server.passwords import (
    FREE_GUESSES,
    LONGEST_WAIT,
    STRANGERS,
    STRANGERS_WINDOW,
    Guesses,
    check_password,
    network_of,
    new_passphrase,
    same_password,
)

from sdlora.errors import ConfigError


class Clock:
    """A time that goes on when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_wrong_guess_doubles_the_wait_up_to_a_limit(clock: Clock) -> None:
    guesses, waits = Guesses(clock), []
    for _ in range(16):
        assert guesses.wait_for("10.0.0.1") == 0.0
        guesses.wrong("10.0.0.1")
        waits.append(guesses.wait_for("10.0.0.1"))
        clock.now += waits[-1] + STRANGERS_WINDOW
    free = FREE_GUESSES - 1
    assert waits[:free] == [0.0] * free
    assert waits[free : free + 4] == [2.0, 4.0, 8.0, 16.0]
    assert waits[-1] == LONGEST_WAIT


def test_many_addresses_share_one_budget(clock: Clock) -> None:
    guesses, looked_at = Guesses(clock), 0
    for number in range(5000):
        address = f"10.{number // 256}.{number % 256}.1"
        if guesses.wait_for(address) == 0.0:
            looked_at += 1
            guesses.wrong(address)
    assert looked_at == STRANGERS
    clock.now += STRANGERS_WINDOW
    assert guesses.wait_for("10.99.99.1") == 0.0


def test_who_logged_in_before_does_not_wait_for_strangers(clock: Clock) -> None:
    guesses = Guesses(clock)
    guesses.right("192.168.1.2")
    for number in range(200):
        guesses.wrong(f"10.0.{number}.1")
    assert guesses.wait_for("10.0.250.1") > 0 and guesses.wait_for("192.168.1.2") == 0.0


def test_a_right_password_forgets_the_wrong_ones(clock: Clock) -> None:
    guesses = Guesses(clock)
    for _ in range(FREE_GUESSES - 1):
        guesses.wrong("10.0.0.1")
    guesses.right("10.0.0.1")
    guesses.wrong("10.0.0.1")
    assert guesses.wait_for("10.0.0.1") == 0.0


def test_a_network_of_ipv6_addresses_is_one() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1")
    assert network_of("fe80::1%eth0") == network_of("fe80::2")


def test_addresses_are_forgotten_from_the_oldest_on_so_that_memory_is_bounded(clock: Clock) -> None:
    guesses = Guesses(clock)
    for _ in range(20):
        guesses.wrong("oldest")
    for number in range(9_999):
        guesses.wrong(f"a{number}")
    clock.now += 1_000.0  # past every wait
    guesses.wrong("a9998")
    guesses.wrong("oldest")  # the 10,000 addresses that are kept include it: it waits at once
    assert guesses.wait_for("oldest") > 800
    for number in range(10_000):
        guesses.wrong(f"b{number}")
    clock.now += 1_000.0
    guesses.wrong("oldest")
    assert guesses.wait_for("oldest") == 0, "it starts again, as it was forgotten"


def test_passwords_are_long_or_made_up() -> None:
    with pytest.raises(ConfigError, match="has 7 characters"):
        check_password("1234567")
    check_password("12345678")
    phrases = {new_passphrase() for _ in range(100)}
    assert len(phrases) == 100 and all(len(phrase) == 23 for phrase in phrases)
    check_password(phrases.pop())


@pytest.mark.parametrize(("given", "same"), [("p\u00e4sswort", True), ("passwort", False), ("", False)])
def test_comparison_takes_any_text(given: str, same: bool) -> None:
    assert same_password(given, "p\u00e4sswort") is same
