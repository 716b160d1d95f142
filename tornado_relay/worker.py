"""A worker process: one loop, one broker connection, and the streams of one listening socket."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from tornado.ioloop import IOLoop
from tornado.web import Application

from . import logs, status
from .admin import AdminApplication
from .application import MAX_BODY, RelayApplication
from .brokers.message import Message
from .brokers.reader import Reader
from .counts import CAPACITY, CHANNELS, NUMBER, PROBE, SERVING, WAITING, Counts, Ledger
from .entry import Entry
from .errors import BrokerRefused, SettingsError
from .hub import Hub
from .intake import Intake
from .limits import Seats, Tally, descriptor_limit, shares
from .peers import Peers
from .publish import open_publisher
from .relay import RETRY, Relay
from .replay import Replay
from .server import Server
from .settings import TRACE, Settings
from .sockets import Admin
from .subscriber import Subscriber
from .tokens import keys_of
from .upkeep import Upkeep

log = logging.getLogger(__name__)

# Exit statuses that the supervisor tells apart.
STOPPED, FAILED, CANNOT_START = 0, 1, 3

TICK = 1.0
REQUEST_SECONDS = 30.0
"""How long a client may take to send its request, and how long a connection may be kept between two."""
MAX_HEADER = 65_536
# A request comes so soon after its connection: who has just been accepted is to be answered, also by a worker that stops.
ARRIVAL_SECONDS = 1.0
_DRAIN_STEP = 0.02


def run(
    settings: Settings,
    sockets: list[socket.socket],
    seats: Seats,
    beat: Callable[[], None],
    report: Callable[[str], None],
    *,
    counts: Counts,
    admin: Admin | None,
) -> int:
    """
    Serve until SIGTERM, or SIGINT for at once, and return the exit status.

    Args:
        settings: What to serve.
        sockets: The bound sockets to accept on.
        seats: The room for streams.
        beat: Called by the loop every second: the proof that it turns.
        report: Called with an empty text once connections are accepted, or else with the reason why not.
        counts: Where it counts.
        admin: What it shares with the other workers to show how the relay is; None if that is not asked for.

    """
    logs.of_worker(int(counts.get(NUMBER)))
    worker = Worker(settings, sockets, seats, beat, report, counts=counts, admin=admin)
    return asyncio.run(_to_its_end(worker))


def rehearse(settings: Settings, report: Callable[[str], None]) -> bool:
    """
    Start as `run` does, with no sockets, and end once it would serve; ``report`` is called only if it cannot.

    Returns:
        Whether it would serve.

    """
    served = False

    def started(trouble: str) -> None:
        nonlocal served
        # Without its broker a worker serves, but no streams; the workers that are there have some.
        if not trouble and worker.reader.trouble:
            trouble = f"{worker.reader.name} is not reachable: {worker.reader.trouble}"
        served = not trouble
        if trouble:
            report(trouble)
        os.kill(os.getpid(), signal.SIGTERM)

    seats, counts = Seats(Tally(1), 0, 0, 0), Counts(Ledger(1), 0)
    worker = Worker(settings, [], seats, lambda: None, started, counts=counts, admin=None)
    return asyncio.run(_to_its_end(worker)) == STOPPED and served


async def _to_its_end(worker: Worker) -> int:
    """Run ``worker``. A signal that comes after that, to any of its threads, must not be handed to a loop that closes."""
    try:
        return await worker.main()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


class Worker:
    """What one process holds, from its start to its drain."""

    def __init__(
        self,
        settings: Settings,
        sockets: list[socket.socket],
        seats: Seats,
        beat: Callable[[], None],
        report: Callable[[str], None],
        *,
        counts: Counts,
        admin: Admin | None,
    ) -> None:
        self.settings = settings
        self.sockets = sockets
        self.seats = seats
        self.admin = admin
        self.beat = beat
        self.report = report
        self.counts = counts
        self.hub = Hub(history=settings.history > 0, later=self._later, counts=counts)
        self._parent = os.getppid()
        # Set when the worker is to end; `_hurry` when it is to end without spreading.
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._beat = 0
        self._began = time.monotonic()
        self.server: Server | None = None
        # What serves the admin listener.
        self.desk: Server | None = None

    async def main(self) -> int:
        """Start, serve, drain; return the exit status."""
        self.loop = IOLoop.current()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._stop_now)
        # A terminal that goes away sends it to the whole group; for the supervisor it means to reload.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        listener_class, url = _listener(self.settings)
        listener = listener_class(url, self._trace if log.isEnabledFor(TRACE) else self.hub.deliver)
        replay, working = None, set[asyncio.Task[None]]()
        if self.hub.history:
            seconds = self.settings.history_seconds
            history = listener.history(self.settings.history, seconds)
            replay = Replay(self.hub, history)
            upkeep = Upkeep(self.hub, history, replay, seconds)
            self.reader = Reader(listener, self.counts, replay.back, replay.lost)
            working |= {asyncio.create_task(replay.run()), asyncio.create_task(upkeep.run())}
        else:
            self.reader = Reader(listener, self.counts, self._back, lambda: None)
        self.relay = Relay(
            self.settings, self.hub, self.reader, self.seats, replay=replay, intake=_intake(self.settings)
        )
        first: asyncio.Future[BrokerRefused | None] = asyncio.get_running_loop().create_future()
        reading = asyncio.create_task(self.reader.run(first.set_result))
        working.add(reading)
        working.add(asyncio.create_task(self._run_ticks()))
        stopping = asyncio.create_task(self._stop.wait())
        awaited: set[asyncio.Future[Any]] = {first, reading, stopping}
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if self._stop.is_set():
            await _cancel(working)
            return STOPPED
        refused = first.result() if first.done() else reading.exception()
        if refused:
            self.report(f"{self.reader.name} refused the connection: {refused}")
            return CANNOT_START

        self.server = self._server(RelayApplication(self.relay), Entry(self.relay))
        self.relay.poller.start()
        if self.admin:
            peers = Peers(self.admin, partial(status.tell, self.relay, self.admin.number, self._began))
            try:
                await peers.start()
            except OSError as exc:
                if self.admin.required:
                    self.report(f"a worker cannot have its socket in {self.admin.folder} (TMPDIR): {exc}")
                    return CANNOT_START
            working.add(asyncio.create_task(peers.stay()))
            # A page that asks again comes to whichever worker is free then.
            self.desk = self._server(AdminApplication(self.relay, peers), None, no_keep_alive=True)
            self.desk.listen_on(self.admin.listeners)
        self.server.listen_on(self.sockets, partial(self.seats.ahead, self.settings.worker_count))
        self._served()
        await asyncio.wait({*working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in working:
            if task.done():
                log.critical("a part of the worker ended by itself: a bug", exc_info=task.exception())
                return FAILED
        await self._drain()
        await _cancel(working)
        return STOPPED

    def _served(self) -> None:
        capacity, _ = shares(descriptor_limit())
        self.counts.set(CAPACITY, capacity)
        self.counts.set(SERVING, 1)
        self.report("")

    def _server(self, application: Application, entry: Entry | None, **options: Any) -> Server:
        return Server(
            application,
            self.relay.waiting,
            self.relay.poller,
            entry,
            idle_connection_timeout=REQUEST_SECONDS,
            body_timeout=REQUEST_SECONDS,
            max_header_size=MAX_HEADER,
            max_body_size=MAX_BODY,
            max_buffer_size=2 * MAX_BODY,
            **options,
        )

    def _later(self, call: Callable[[], None]) -> None:
        self.loop.add_callback(call)

    def _trace(self, messages: list[Message], arrived: float) -> None:
        for message in messages:
            log.log(TRACE, "event %s on %s: %s", message.id or "without an id", message.channel, message.payload)
        self.hub.deliver(messages, arrived)

    def _back(self, again: bool) -> None:
        if again:
            self.hub.reset("broker-reconnect")

    def _stop_now(self) -> None:
        self._hurry.set()
        self._stop.set()

    async def _run_ticks(self) -> None:
        # By the clock that nobody sets: Tornado's PeriodicCallback, when the time is put back by an hour, rests for one.
        due = time.monotonic() + TICK
        while True:
            await asyncio.sleep(due - time.monotonic())
            late = max(0.0, time.monotonic() - due)
            self._tick(late)
            # At whole ticks since the start, however late one was.
            due += (late // TICK + 1) * TICK

    def _tick(self, late: float) -> None:
        self.beat()
        self.counts.tick(late)
        self.counts.set(CHANNELS, self.reader.channels)
        self.counts.set(PROBE, self.reader.latency or 0)
        self.counts.set(WAITING, len(self.relay.waiting))
        if os.getppid() != self._parent and not self._stop.is_set():
            log.warning("the supervisor is gone, this worker ends too")
            self._stop.set()
        self.reader.sweep()
        if self.server:
            self.server.expire(time.monotonic() - REQUEST_SECONDS)
        if self.settings.max_stream_seconds or self.relay.keys:
            now = time.monotonic()
            for subscriber in self._subscribers():
                if subscriber.ends_at is not None and now >= subscriber.ends_at:
                    self.hub.flush(subscriber)
                    subscriber.end("expired", random.randint(*RETRY))
        parts = max(1, round(self.settings.heartbeat / TICK))
        self._beat = (self._beat + 1) % parts
        self.hub.heartbeat(self._beat, parts)

    async def _drain(self) -> None:
        """Accept nothing more, and close the streams one by one over ``drain_seconds``."""
        self.relay.drain()
        if self.server:
            self.server.stop()
        subscribers = self._subscribers()
        random.shuffle(subscribers)
        log.info("closing %d streams over %.1f s", len(subscribers), self.settings.drain_seconds)
        begin = time.monotonic()
        for number, subscriber in enumerate(subscribers):
            due = begin + self.settings.drain_seconds * number / len(subscribers)
            while not self._hurry.is_set() and due - time.monotonic() > _DRAIN_STEP:
                try:
                    await asyncio.wait_for(self._hurry.wait(), due - time.monotonic())
                except asyncio.TimeoutError:
                    pass
            self.hub.flush(subscriber)
            subscriber.end("drain", random.randint(*RETRY))
        if self.desk:
            self.desk.stop()
        while (
            not self._hurry.is_set()
            and time.monotonic() - begin < ARRIVAL_SECONDS
            and self.relay.waiting.any_since(begin - ARRIVAL_SECONDS)
        ):
            await asyncio.sleep(_DRAIN_STEP)
        await self.relay.settle()
        await asyncio.sleep(0)  # the streams' close callbacks

    def _subscribers(self) -> list[Subscriber]:
        return cast("list[Subscriber]", list(self.hub))


def _intake(settings: Settings) -> Intake | None:
    if not settings.publish_token or settings.broker is None:
        return None
    return Intake(open_publisher(*settings.broker), settings.publish_token)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=1)


def check_settings(settings: Settings) -> None:
    """
    Load the broker's driver and let it read the URL, and read the keys of tokens; nothing is connected.

    Called before the fork, so that the workers share what is loaded, and what is wrong is said once.

    Raises:
        SettingsError: If no broker is set, its driver is not installed, or it cannot read the URL; or a key.

    """
    listener, url = _listener(settings)
    listener.check(url)
    keys_of(settings)


def _listener(settings: Settings) -> tuple[Any, str]:
    """Return the `Listener` class of the broker that ``settings`` name, and its URL."""
    if settings.broker is None:
        raise SettingsError("no broker is set")
    kind, url = settings.broker
    try:
        if kind == "redis":
            from .brokers.redis.listener import RedisListener  # noqa: PLC0415

            return RedisListener, url
        from .brokers.postgres.listener import PostgresListener  # noqa: PLC0415

        return PostgresListener, settings.listen_url
    except ModuleNotFoundError as exc:
        raise SettingsError(f"{exc.name} is not installed; install sse-relay-server[{kind}]") from exc
