"""The addresses of channels: GET opens a stream, POST publishes an event."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Callable, Coroutine
from typing import Any, cast

from tornado.httputil import HTTPServerRequest
from tornado.web import HTTPError

from . import access
from .counts import PUBLISHES, REFUSED
from .errors import BrokerError, EventError, PayloadTooLarge
from .handlers import RelayHandler
from .intake import Intake
from .refusal import NotNow
from .relay import RETRY, Relay
from .visit import Visit, bearer, channels_of

log = logging.getLogger(__name__)


class StreamHandler(RelayHandler):
    """Opens a stream, which has the connection to itself from then on; takes an event for its channel."""

    def initialize(self, relay: Relay) -> None:
        super().initialize(relay)
        self.gone = False
        self._opening: asyncio.Task[Any] | None = None

    def on_connection_close(self) -> None:
        self.gone = True
        if self._opening:
            self._opening.cancel()

    async def get(self, path_channel: str | None = None) -> None:
        visit = self._visit(path_channel)

        async def open_stream() -> bool:
            return await visit.open(await visit.admit(), self._take)

        await self._seated(visit, open_stream)

    async def head(self, path_channel: str | None = None) -> None:
        visit = self._visit(path_channel)

        async def answer() -> bool:
            await visit.admit()
            self.answer_and_close(self.relay.head(self.origin))
            return False

        await self._seated(visit, answer)

    async def _seated(self, visit: Visit, answer: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        """Call ``answer``, which returns whether it has opened a stream, if there is room for one, and until a drain."""
        relay, opened = self.relay, False
        try:
            relay.check()
            visit.take_seat()
        except NotNow as exc:
            self._refuse_softly(exc)
            return
        relay.waiting.discard(self.request.server_connection)
        self._opening = asyncio.current_task()
        try:
            with relay.opening():
                opened = await answer()
        except NotNow as exc:
            self._refuse_softly(exc)
        except asyncio.CancelledError:
            if not self.gone:
                self._refuse_softly(NotNow("draining", str(relay.trouble)))
        finally:
            self._opening = None
            if not opened:
                visit.leave()

    def options(self, path_channel: str | None = None) -> None:
        for name, value in access.preflight().items():
            self.set_header(name, value)
        self.clear_header("Content-Type")
        self.set_status(204)

    async def post(self, path_channel: str | None = None) -> None:
        if refusal := publisher_refusal(self.relay, self.request):
            raise refusal
        names = channels_of(self.request, path_channel)
        if len(names) > 1:
            raise HTTPError(400, "%d channels; an event goes to one", len(names))
        self.relay.waiting.discard(self.request.server_connection)
        try:
            with self.relay.publishing():
                await cast(Intake, self.relay.intake).publish(names[0], self.request.body)
        except EventError as exc:
            self.field = exc.field
            raise HTTPError(413 if isinstance(exc, PayloadTooLarge) else 400, "%s", exc) from exc
        except BrokerError as exc:
            raise HTTPError(503, "%s", exc) from exc
        except asyncio.CancelledError as exc:
            raise HTTPError(
                503, log_message="the worker is stopping; the event may have been published or not"
            ) from exc
        self.relay.hub.counts.add(PUBLISHES, "accepted")
        self.clear_header("Content-Type")
        self.set_status(202)

    def _visit(self, path_channel: str | None) -> Visit:
        return Visit(self.relay, self.request, path_channel, self.peer)

    def _take(self) -> socket.socket | None:
        """Return the connection, which Tornado has no more to do with; None if the client has gone."""
        if self.gone:
            return None
        stream = self.detach()
        connection = None if stream.closed() else stream.socket.dup()
        stream.close()
        return connection

    def _refuse_softly(self, why: NotNow) -> None:
        # EventSource gives up for good on any status but 200 (HTML standard, "fail the connection"),
        # so it is told to come back by a stream that ends at once.
        log.debug("stream refused: %s", why)
        self.relay.hub.counts.add(REFUSED, why.reason)
        if "text/event-stream" in self.request.headers.get("Accept", ""):
            whole = self.request.method == "GET"
            self.answer_and_close(self.relay.come_back(self.origin) if whole else self.relay.head(self.origin))
        else:
            self.set_status(503)
            self.set_header("Retry-After", str(-(-random.randint(*RETRY) // 1000)))
            self.finish(f"{why}\n")


def publisher_refusal(relay: Relay, request: HTTPServerRequest) -> HTTPError | None:
    """Return why the sender of ``request`` may not publish, or None if it may."""
    if relay.intake is None:
        return HTTPError(404, log_message="publishing over HTTP is not enabled; see RELAY_PUBLISH_TOKEN")
    if not relay.intake.admits(bearer(request)):
        return HTTPError(401, log_message="publishing takes Authorization: Bearer with the publish token")
    return None
