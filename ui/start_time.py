"""The time at which a job may start, as it is typed: of this machine's clock."""

from __future__ import annotations

from datetime import datetime, timedelta

from sdlora.errors import ConfigError

_FORMS = ("%H:%M", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M")


def start_time(text: str, now: datetime | None = None) -> float | None:
    """Return the time that a text such as ``22:30`` or ``2026-12-24 06:00`` means, in seconds since 1970.

    A time without a date is the next one; an empty text is no time, None.

    Raises:
        ConfigError: for a text that is no time, or one that has passed.
    """
    text, now = text.strip(), now or datetime.now()
    if not text:
        return None
    for form in _FORMS:
        try:
            moment = datetime.strptime(text, form)
        except ValueError:
            continue
        if form == "%H:%M":
            moment = moment.replace(year=now.year, month=now.month, day=now.day)
            moment += timedelta(days=1 if moment < now else 0)
        if moment < now:
            raise ConfigError(f"start `{text}`: has passed; leave it empty to start as soon as possible")
        try:
            return moment.timestamp()
        except (OverflowError, OSError):
            break
    raise ConfigError(f"start `{text[:40]}`: give a time as 22:30, or a date and a time as 2026-12-24 06:00")
