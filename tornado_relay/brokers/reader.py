"""What a worker reads from its broker: which channels, through which losses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from ..counts import BROKER_UP, RECONNECTS, Counts
from ..errors import BrokerError, BrokerRefused, BrokerUnavailable, NoRoom
from ..logs import Throttle
from .backoff import Backoff
from .subscriptions import Subscriptions

log = logging.getLogger(__name__)

CONFIRM_TIMEOUT = 5.0
"""Seconds, and up to a `Reader.sweep` more."""
# A connection that held for this long was a good one: the next loss is mended from the shortest delay on.
GOOD_SECONDS = 5.0


class Listener(Protocol):
    """One connection to a broker, at a time."""

    name: str
    subscriptions: Subscriptions

    @property
    def latency(self) -> float | None:
        """Seconds that the last round trip to the broker took, or None before the first."""

    def audible(self, channels: Iterable[str]) -> tuple[str, ...]:
        """Return the channels whose events a stream on ``channels`` hears."""

    def target(self, channel: str) -> str:
        """Return the broker's own channel on which events of ``channel`` travel."""

    def flush(self) -> None:
        """Send soon what `subscriptions` has to add and to drop."""

    async def session(self, on_up: Callable[[], None]) -> None:
        """
        Connect, call ``on_up`` once all that is held has been confirmed, and read until that ends.

        Raises:
            BrokerError: When the connection is lost, or cannot be made.

        """


class Reader:
    """
    Keeps a `Listener` connected, for ever, and lets streams subscribe to it.

    ``on_lost`` is called when the connection is lost, and ``on_up`` when there is one and all channels are
    listened to: with True if it is not the first.
    """

    def __init__(
        self, listener: Listener, counts: Counts, on_up: Callable[[bool], None], on_lost: Callable[[], None]
    ) -> None:
        self.name = listener.name
        # Why streams cannot be served now, or None while the connection is up.
        self.trouble: str | None = "not connected yet"

        self._listener = listener
        self._counts = counts
        self._subscriptions = listener.subscriptions
        self._on_up = on_up
        self._on_lost = on_lost
        self._backoff = Backoff()
        self._no_room_log, self._refusals_log = Throttle(log), Throttle(log)
        self._subscriptions.on_refused = self._refused
        self._now = asyncio.get_running_loop().time
        # The loop's time at which the connection came up; None before the first.
        self._up_since: float | None = None
        # What to call after the first try, and then no more.
        self._on_first: Callable[[BrokerRefused | None], None] | None = None

    @property
    def channels(self) -> int:
        """How many channels of its own the broker is to send."""
        return len(self._subscriptions)

    @property
    def latency(self) -> float | None:
        """See `Listener`."""
        return self._listener.latency

    def audible(self, channels: Iterable[str]) -> tuple[str, ...]:
        """Return the channels whose events a stream on ``channels`` hears."""
        return self._listener.audible(channels)

    async def subscribe(self, channels: Iterable[str], client: str = "") -> bool:
        """
        Return once the broker has confirmed that it will send ``channels``; pair it with `release`.

        The result says whether it had confirmed all of them before. For ``client`` see `Subscriptions`.

        Raises:
            BrokerUnavailable: If there is no connection, or no answer in time. Nothing is held then.
            NoRoom: If there are too many channels. Nothing is held then.

        """
        if self.trouble:
            raise BrokerUnavailable(self.trouble)
        targets = [self._listener.target(channel) for channel in channels]
        try:
            confirmed = self._subscriptions.acquire(targets, self._now(), client)
        except NoRoom as exc:
            self._no_room_log.write(logging.WARNING, "streams are told to come back: %s", exc)
            raise
        if confirmed is None:
            return True
        self._listener.flush()
        try:
            await confirmed
        except BaseException as exc:
            self._subscriptions.release(targets, self._now())
            if isinstance(exc, BrokerUnavailable):
                raise BrokerUnavailable(f"the subscription was not confirmed: {exc}") from exc
            raise
        return False

    def release(self, channels: Iterable[str]) -> None:
        """End a stream's subscription; the broker is told some seconds after a channel's last stream."""
        self._subscriptions.release([self._listener.target(channel) for channel in channels], self._now())

    def sweep(self) -> None:
        """Drop what has been idle for long enough, and let nobody wait for ever; called every second or so."""
        self._subscriptions.overdue(self._now() - CONFIRM_TIMEOUT, BrokerUnavailable("no answer in time"))
        if self._subscriptions.sweep(self._now()) and not self.trouble:
            self._listener.flush()

    async def run(self, on_first: Callable[[BrokerRefused | None], None]) -> None:
        """
        Stay connected. Cancel it to end.

        ``on_first`` is called once, after the first try to connect: with an error if the broker refused
        in a way that trying again cannot mend.
        """
        self._on_first = on_first
        while True:
            try:
                await self._listener.session(self._up)
            except BrokerError as exc:
                if self.trouble is None:
                    self._on_lost()
                    if self._now() - (self._up_since or 0.0) >= GOOD_SECONDS:
                        self._backoff.reset()
                self.trouble = str(exc)
                self._counts.set(BROKER_UP, 0)
                self._subscriptions.lost(BrokerUnavailable(self.trouble))
                self._first_done(exc if isinstance(exc, BrokerRefused) else None)
            delay = self._backoff.next()
            log.warning("%s is not reachable, next try in %.1f s: %s", self.name, delay, self.trouble)
            await asyncio.sleep(delay)

    def _up(self) -> None:
        self.trouble = None
        self._counts.set(BROKER_UP, 1)
        if self._up_since is not None:
            self._counts.add(RECONNECTS)
        log.info("%s connected, listening to %d channels", self.name, len(self._subscriptions))
        self._on_up(self._up_since is not None)
        self._up_since = self._now()
        self._first_done(None)

    def _refused(self, name: str, error: Exception) -> None:
        text = "%s refused the channel %s: %s"
        self._refusals_log.write(logging.ERROR, text, self.name, name, error)

    def _first_done(self, refused: BrokerRefused | None) -> None:
        if self._on_first:
            on_first, self._on_first = self._on_first, None
            on_first(refused)
