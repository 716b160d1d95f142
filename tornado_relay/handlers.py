"""The HTTP surface of a worker: streams, health, and the inspector page of debug mode."""

from __future__ import annotations

import email.utils
import logging
import random
import time
from pathlib import Path
from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.iostream import StreamClosedError
from tornado.web import Application, HTTPError, RequestHandler

from . import __version__, access, channels, events
from .access import EVERYBODY, Grant
from .brokers.reader import Reader
from .errors import BrokerError, BrokerUnavailable, ChannelError, TokenError
from .hub import Hub
from .replay import Replay
from .settings import Settings
from .subscriber import Subscriber
from .tokens import keys_of

log = logging.getLogger(__name__)

MAX_CHANNELS = 100
"""Channels of one stream."""

# A page whose stream ends reconnects after a time drawn from this range of milliseconds, so that all
# pages of a worker that died do not come in the same instant.
RETRY = (2_000, 5_000)

# The id of streams that no history can bring up to date: one that comes back with it is told so.
NO_HISTORY = "none"

_STATIC = Path(__file__).parent / "static"


class Relay:
    """What the handlers of one worker share."""

    def __init__(self, settings: Settings, hub: Hub, reader: Reader, replay: Replay | None) -> None:
        self.settings = settings
        self.hub = hub
        self.reader = reader
        # None where no history is to be used.
        self.replay = replay
        self.origins = access.Origins(settings.allowed_origins)
        # Without any, the relay is open to all.
        self.keys = keys_of(settings)
        # Set at the start of a drain: no stream is opened from then on.
        self.draining = False
        self._heads: dict[str | None, bytes] = {}

    def head(self, origin: str | None) -> bytes:
        """Return status line and headers of a stream. The end of the connection ends it, so every client can read it."""
        origin = None if self.origins.any else origin
        head = self._heads.get(origin)
        if head is None:
            headers = {
                "Server": f"sse-relay-server/{__version__}",
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store, no-transform",
                "X-Accel-Buffering": "no",
                "Connection": "close",
                **self.origins.headers(origin),
            }
            lines = ["HTTP/1.1 200 OK", *(f"{name}: {value}" for name, value in headers.items())]
            head = self._heads[origin] = "\r\n".join(lines).encode("latin-1")
        return b"%b\r\nDate: %b\r\n\r\n" % (head, email.utils.formatdate(usegmt=True).encode())

    def application(self) -> Application:
        """Return the Tornado application."""
        shared = {"relay": self}
        return Application(
            [
                (r"/", InspectorHandler, shared),
                (r"/healthz", HealthHandler, shared),
                (r"/readyz", ReadyHandler, shared),
                (r"/relay\.js", NotFoundHandler, shared),
                (r"/events", StreamHandler, shared),
                (r"/channel=(.*)", StreamHandler, shared),
                (r"/([^/]+)", StreamHandler, shared),
            ],
            default_handler_class=NotFoundHandler,
            default_handler_args=shared,
            log_function=_log_nothing,
        )


class RelayHandler(RequestHandler):
    """Base of all handlers: short errors in plain text, and no page that is not allowed."""

    def initialize(self, relay: Relay) -> None:
        self.relay = relay
        self.origin = self.request.headers.get("Origin")

    def set_default_headers(self) -> None:
        self.set_header("Server", f"sse-relay-server/{__version__}")
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        if not self.relay.origins.admits(self.origin):
            raise HTTPError(
                403, reason="Forbidden", log_message="pages of this origin may not connect; see ALLOWED_ORIGINS"
            )
        for name, value in self.relay.origins.headers(self.origin).items():
            self.set_header(name, value)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        told = error.log_message % error.args if isinstance(error, HTTPError) and error.log_message else self._reason
        if status_code == 405:
            self.set_header("Allow", access.ALLOWED_METHODS)
        elif status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        self.finish(f"{told}\n")

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, HTTPError):
            # Tornado would log the whole address, with the token in it.
            log.error("%s %s failed", self.request.method, self.request.path, exc_info=(typ, value, tb))
        else:
            log.debug("%d %s %s: %s", value.status_code, self.request.method, self.request.path, value.log_message)


class NotFoundHandler(RelayHandler):
    """Whatever has no address of its own."""

    def prepare(self) -> None:
        super().prepare()
        raise HTTPError(404, log_message="nothing here; streams are at /channel=NAME and /events?channel=A&channel=B")


class HealthHandler(RelayHandler):
    """Whether this worker's loop turns."""

    def get(self) -> None:
        self.finish("ok\n")

    head = get


class ReadyHandler(RelayHandler):
    """Whether streams can be opened now."""

    def get(self) -> None:
        trouble = "the worker is draining" if self.relay.draining else self.relay.reader.trouble
        if trouble:
            self.set_status(503)
            self.finish(f"{self.relay.reader.name}: {trouble}\n")
        else:
            self.finish("ok\n")

    head = get


class InspectorHandler(RelayHandler):
    """A page to try the relay with, in debug mode only."""

    def get(self) -> None:
        if not self.relay.settings.debug:
            raise HTTPError(404, log_message="nothing here; RELAY_SERVER_DEBUG=true shows a page to try the relay with")
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.finish((_STATIC / "inspector.html").read_bytes())

    head = get


class StreamHandler(RelayHandler):
    """Opens a stream and hands its socket to a `Subscriber`."""

    def initialize(self, relay: Relay) -> None:
        super().initialize(relay)
        self.gone = False

    def on_connection_close(self) -> None:
        self.gone = True

    async def get(self, path_channel: str | None = None) -> None:
        relay, loop = self.relay, IOLoop.current()
        wanted = self._channels(path_channel)
        grant = self._grant(wanted)
        if relay.draining or relay.reader.trouble:
            await self._refuse_softly(relay.reader.trouble or "the worker is draining")
            return
        subscriber = Subscriber(
            wanted,
            tuple(name for name in relay.reader.audible(wanted) if name in wanted or grant.allows(name)),
            address=self.request.remote_ip or "unix socket",
            ends_at=self._end(grant),
            on_close=self._closed,
        )
        try:
            known = await relay.reader.subscribe(subscriber.audible)
        except BrokerUnavailable as exc:
            await self._refuse_softly(str(exc))
            return
        try:
            last = await self._last_position(subscriber.audible, known)
        except BrokerError as exc:
            relay.reader.release(subscriber.audible)
            await self._refuse_softly(str(exc))
            return
        if self.gone or relay.draining:
            relay.reader.release(subscriber.audible)
            if not self.gone:
                await self._refuse_softly("the worker is draining")
            return
        # Nothing may await from here on: an event that comes after the head must find the stream in the hub.
        begin = b": sse-relay-server\nretry: %d\n" % random.randint(*RETRY)
        if last is None:
            newest = relay.replay.newest if relay.replay else None
            subscriber.position = newest.seq if newest else 0
            begin += events.position(str(newest or NO_HISTORY))
            if self._last_event_id:
                begin += events.stream_reset("unknown-id", wanted)
        else:
            subscriber.position = last
            begin += b"\n"
        if not subscriber.open(
            self.detach(), relay.head(self.origin) + begin, relay.settings.client_buffer, loop.time()
        ):
            relay.reader.release(subscriber.audible)
            return
        log.info("stream opened: %s", subscriber)
        if relay.replay:
            relay.replay.admit(subscriber, behind=last is not None)
        else:
            relay.hub.add(subscriber)

    def _grant(self, wanted: tuple[str, ...]) -> Grant:
        """Return what the client may listen to, if that is all that it asks for."""
        if not self.relay.keys:
            return EVERYBODY
        kind, _, bearer = self.request.headers.get("Authorization", "").partition(" ")
        bearer = bearer.strip() if kind.lower() == "bearer" else ""
        # The first that is there counts, and no other is tried in its place.
        token = self.get_cookie("relay_token") or bearer or self.get_query_argument("token", "")
        if not token:
            raise HTTPError(
                401, log_message="no token; send one as cookie relay_token, Authorization: Bearer, or ?token="
            )
        try:
            grant = self.relay.keys.grant(token)
        except TokenError as exc:
            raise HTTPError(401, "%s", exc) from exc
        for name in wanted:
            if not grant.allows(name):
                raise HTTPError(403, "the token does not cover the channel %s", name)
        return grant

    def _end(self, grant: Grant) -> float | None:
        """Return the loop's time at which the stream is to end, if it has to."""
        now, lifetime = IOLoop.current().time(), self.relay.settings.max_stream_seconds
        ends = [now + lifetime * random.uniform(0.8, 1.0)] if lifetime else []
        if grant.expires_at is not None:
            ends.append(now + grant.expires_at - time.time())
        return min(ends, default=None)

    @property
    def _last_event_id(self) -> str:
        """What the browser had last: the header, which it sends when it reconnects, is newer than the address."""
        header = self.request.headers.get("Last-Event-ID", "")
        try:
            sent = header.encode("latin-1").decode()  # browsers send UTF-8
        except UnicodeError:
            sent = header
        return sent or self.get_query_argument("last_event_id", "")

    async def _last_position(self, audible: tuple[str, ...], known: bool) -> int | None:
        """Return where in the history the stream comes back to, or None if it begins now."""
        replay = self.relay.replay
        if replay is None:
            return None
        last = await replay.find(self._last_event_id, audible) if self._last_event_id else None
        if last is None and not (known and replay.newest):
            await replay.refresh()
        return last

    async def head(self, path_channel: str | None = None) -> None:
        self._grant(self._channels(path_channel))
        if trouble := self.relay.reader.trouble:
            await self._refuse_softly(trouble)
            return
        await self._answer_and_close(self.relay.head(self.origin))

    def options(self, path_channel: str | None = None) -> None:
        for name, value in access.preflight().items():
            self.set_header(name, value)
        self.clear_header("Content-Type")
        self.set_status(204)

    def post(self, path_channel: str | None = None) -> None:
        raise HTTPError(404, log_message="publishing over HTTP is not enabled")

    def _channels(self, path_channel: str | None) -> tuple[str, ...]:
        if path_channel is not None:
            names = [path_channel]
        else:  # not get_query_arguments(), which turns control characters into blanks
            names = [self.decode_argument(name) for name in self.request.query_arguments.get("channel", [])]
        if not names:
            raise HTTPError(400, log_message="no channel; ask for /channel=NAME or /events?channel=A&channel=B")
        if len(names) > MAX_CHANNELS:
            raise HTTPError(400, log_message=f"{len(names)} channels asked for; a stream takes at most {MAX_CHANNELS}")
        try:
            return tuple(dict.fromkeys(channels.check(name) for name in names))
        except ChannelError as exc:
            raise HTTPError(400, log_message=str(exc)) from exc

    async def _answer_and_close(self, data: bytes) -> None:
        stream = self.detach()
        try:
            await stream.write(data)
        except StreamClosedError:
            pass  # the client did not wait
        stream.close()

    async def _refuse_softly(self, why: str) -> None:
        # EventSource gives up for good on any status but 200 (HTML standard, "fail the connection"),
        # so it is told to come back by a stream that ends at once.
        log.debug("stream refused: %s", why)
        retry = random.randint(*RETRY)
        if "text/event-stream" in self.request.headers.get("Accept", ""):
            body = b": not now\nretry: %d\n\n" % retry if self.request.method == "GET" else b""
            await self._answer_and_close(self.relay.head(self.origin) + body)
        else:
            self.set_status(503)
            self.set_header("Retry-After", str(-(-retry // 1000)))
            self.finish(f"{self.relay.reader.name}: {why}\n")

    def _closed(self, subscriber: Subscriber) -> None:
        if self.relay.hub.remove(subscriber):
            self.relay.reader.release(subscriber.audible)
            seconds = IOLoop.current().time() - subscriber.opened_at
            log.info("stream ended after %.1f s: %s: %s", seconds, subscriber, subscriber.reason)


def _log_nothing(handler: HTTPServerRequest | RequestHandler) -> None:
    """Streams are logged where they open and end; nothing else is worth a line."""
