"""What all requests to one worker share."""

from __future__ import annotations

import asyncio
import email.utils
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from tornado.httputil import HTTPServerRequest

from . import __version__, access
from .access_log import AccessLog
from .authority import Authority
from .brokers.reader import Reader
from .hub import Hub
from .intake import Intake
from .limits import Seats, descriptor_limit, shares
from .packing import Packer, accepts_gzip
from .poller import Poller
from .refusal import NotNow
from .replay import Replay
from .settings import Settings
from .tokens import keys_of
from .waiting import Waiting

# A page whose stream ends reconnects after a time drawn from this range of milliseconds, so that all
# pages of a worker that died do not come in the same instant.
RETRY = (2_000, 5_000)

# What a worker that stops gives to requests that are under way.
SETTLE_SECONDS = 3.0


class Relay:
    """The parts of a worker that its requests need."""

    def __init__(
        self,
        settings: Settings,
        hub: Hub,
        reader: Reader,
        seats: Seats,
        *,
        replay: Replay | None = None,
        intake: Intake | None = None,
    ) -> None:
        self.settings = settings
        self.hub = hub
        self.reader = reader
        self.seats = seats
        # None where no history is to be used.
        self.replay = replay
        # None where nobody may publish over HTTP.
        self.intake = intake
        self.origins = access.Origins(settings.allowed_origins)
        self.proxies = access.Proxies(settings.trusted_proxies)
        # None unless it is asked for.
        self.access_log = AccessLog(self.proxies) if settings.log_access else None
        # Without any key and authority, the relay is open to all; with both, both must let a client in.
        self.keys = keys_of(settings)
        self.authority = Authority(settings.auth_url) if settings.auth_url else None
        # Set at the start of a drain: no stream is opened from then on.
        self.draining = False
        _, waiting = shares(descriptor_limit())
        self.waiting = Waiting(waiting)
        self.poller = Poller()
        self._opening: set[asyncio.Task[Any]] = set()
        self._publishing: set[asyncio.Task[Any]] = set()
        self._chunked = Packer(gzip=False)
        self._gzipped = Packer(gzip=True) if settings.compression == "gzip" else None
        self._heads: dict[tuple[str | None, Packer | None], bytes] = {}

    @property
    def trouble(self) -> str | None:
        """Why no stream can be opened now, or None if one can."""
        if self.draining:
            return "the worker is draining"
        return f"{self.reader.name}: {self.reader.trouble}" if self.reader.trouble else None

    def check(self) -> None:
        """
        Do nothing if a stream can be opened now.

        Raises:
            NotNow: If not.

        """
        if trouble := self.trouble:
            raise NotNow("draining" if self.draining else "broker", trouble)

    def packer(self, request: HTTPServerRequest) -> Packer | None:
        """Return how a stream for ``request`` is put on the wire; None where the end of the connection must end it."""
        if request.version == "HTTP/1.0":
            return None
        return (
            self._gzipped
            if self._gzipped and accepts_gzip(request.headers.get("Accept-Encoding", ""))
            else self._chunked
        )

    def head(self, origin: str | None, packer: Packer | None = None) -> bytes:
        """Return status line and headers of a stream; without ``packer`` the end of the connection ends it."""
        origin = None if self.origins.any else origin
        head = self._heads.get((origin, packer))
        if head is None:
            headers = {
                "Server": f"sse-relay-server/{__version__}",
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store, no-transform",
                "X-Accel-Buffering": "no",
                "Connection": "close",
                **self.origins.headers(origin),
            }
            if packer:
                headers |= packer.headers
            if self._gzipped:
                headers["Vary"] = ", ".join(filter(None, [headers.get("Vary"), "Accept-Encoding"]))
            lines = ["HTTP/1.1 200 OK", *(f"{name}: {value}" for name, value in headers.items())]
            head = self._heads[origin, packer] = "\r\n".join(lines).encode("latin-1")
        return b"%b\r\nDate: %b\r\n\r\n" % (head, email.utils.formatdate(usegmt=True).encode())

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Let a drain cancel the current task meanwhile: whoever waits for a stream is to come back to another worker."""
        with _listed(self._opening):
            yield

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Let a drain wait for the current task meanwhile."""
        with _listed(self._publishing):
            yield

    def drain(self) -> None:
        """Open no stream from now on."""
        self.draining = True
        for task in self._opening:
            task.cancel()

    async def settle(self) -> None:
        """Return when all requests that a drain has found are answered, or that would take too long."""
        if tasks := self._opening | self._publishing:
            await asyncio.wait(tasks, timeout=SETTLE_SECONDS)

    def come_back(self, origin: str | None) -> bytes:
        """Return a stream that ends at once, and says when its page is to come back."""
        return self.head(origin) + b": not now\nretry: %d\n\n" % random.randint(*RETRY)


@contextmanager
def _listed(tasks: set[asyncio.Task[Any]]) -> Iterator[None]:
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    tasks.add(task)
    try:
        yield
    finally:
        tasks.discard(task)
