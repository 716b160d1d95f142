"""One thing that ``check`` has looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OK, WARNING, FAILURE = "ok", "warning", "failure"

# Seconds that an event or an answer may take.
TIMEOUT = 5.0

# Seconds by which two clocks may differ before anybody notices: tokens end, and events grow old, by another one.
MAX_SKEW = 2.0


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do about it."""

    level: str
    """`OK`; `WARNING` for what may go wrong; `FAILURE` for what does not work."""
    name: str
    """What it is about, for programs, such as ``postgres.connections``."""
    text: str
    advice: str = ""
    """What to do, unless it is `OK`."""


def of_clock(name: str, skew: float) -> Iterator[Finding]:
    """Yield whether the clock of a server is ours; ``skew`` is by how many seconds it is ahead."""
    if abs(skew) <= MAX_SKEW:
        yield Finding(OK, f"{name}.clock", f"its clock differs by {abs(skew) * 1000:.0f} ms")
    else:
        yield Finding(
            WARNING,
            f"{name}.clock",
            f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's",
            "synchronise both, as by NTP: tokens end by this clock, and events grow old by that one",
        )


def of_room(name: str, limit: str, room: int, needed: int, advice: str) -> Iterator[Finding]:
    """Yield whether a server has room for the connections of this relay."""
    text = f"{limit} leaves room for {room} more connections; this relay takes {needed} while it is reloaded"
    if room >= needed:
        yield Finding(OK, f"{name}.connections", text)
    else:
        yield Finding(WARNING, f"{name}.connections", text, advice)
