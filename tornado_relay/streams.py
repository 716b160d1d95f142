"""The addresses of channels: GET opens a stream, POST publishes an event."""

from __future__ import annotations

import logging
import random
import socket
import time
from typing import cast

from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.web import HTTPError

from . import access, channels, events
from .access import EVERYBODY, UNIX, Grant
from .authority import REFUSALS, Question
from .errors import (
    AuthorityUnavailable,
    BrokerError,
    BrokerUnavailable,
    ChannelError,
    EventError,
    PayloadTooLarge,
    TokenError,
)
from .handlers import Relay, RelayHandler
from .intake import Intake
from .limits import network_of
from .subscriber import Subscriber

log = logging.getLogger(__name__)

MAX_CHANNELS = 100
"""Channels of one stream."""

# A page whose stream ends reconnects after a time drawn from this range of milliseconds, so that all
# pages of a worker that died do not come in the same instant.
RETRY = (2_000, 5_000)

# The id of streams that no history can bring up to date: one that comes back with it is told so.
NO_HISTORY = "none"


class StreamHandler(RelayHandler):
    """Opens a stream and hands its socket to a `Subscriber`; takes an event for its channel."""

    def initialize(self, relay: Relay) -> None:
        super().initialize(relay)
        self.gone = False

    def on_connection_close(self) -> None:
        self.gone = True

    async def get(self, path_channel: str | None = None) -> None:
        relay = self.relay
        wanted = self._channels(path_channel)
        if trouble := relay.trouble:
            await self._refuse_softly(trouble)
            return
        address = self._address
        if full := relay.seats.take(_client(address)):
            await self._refuse_softly(full)
            return
        opened = False
        try:
            opened = await self._open(wanted, await self._admit(wanted, address), address)
        except AuthorityUnavailable as exc:
            await self._refuse_softly(str(exc))
        finally:
            if not opened:
                relay.seats.release(_client(address))

    async def _open(self, wanted: tuple[str, ...], grant: Grant, address: str) -> bool:
        """Open the stream; return False where it was refused, or the client has gone."""
        relay, last_event_id = self.relay, self._last_event_id  # which may be no text: before anything is held
        subscriber = Subscriber(
            wanted,
            tuple(name for name in relay.reader.audible(wanted) if name in wanted or grant.allows(name)),
            address=address,
            ends_at=self._end(grant),
            on_close=self._closed,
        )
        try:
            known = await relay.reader.subscribe(subscriber.audible)
        except BrokerUnavailable as exc:
            await self._refuse_softly(f"{relay.reader.name}: {exc}")
            return False
        try:
            last = await self._last_position(last_event_id, subscriber.audible, known)
        except BrokerError as exc:
            relay.reader.release(subscriber.audible)
            await self._refuse_softly(f"{relay.reader.name}: {exc}")
            return False
        if self.gone or relay.draining:
            relay.reader.release(subscriber.audible)
            if not self.gone:
                await self._refuse_softly(str(relay.trouble))
            return False
        # Nothing may await from here on: an event that comes after the head must find the stream in the hub.
        begin = b": sse-relay-server\nretry: %d\n" % random.randint(*RETRY)
        if last is None:
            newest = relay.replay.newest if relay.replay else None
            subscriber.position = newest.seq if newest else 0
            begin += events.position(str(newest or NO_HISTORY))
            if last_event_id:
                begin += events.stream_reset("unknown-id", wanted)
        else:
            subscriber.position = last
            begin += b"\n"
        head, now = relay.head(self.origin) + begin, IOLoop.current().time()
        if not subscriber.open(self.detach(), head, relay.settings.client_buffer, now):
            relay.reader.release(subscriber.audible)
            return False
        log.info("stream opened: %s", subscriber)
        if relay.replay:
            relay.replay.admit(subscriber, behind=last is not None)
        else:
            relay.hub.add(subscriber)
        return True

    @property
    def _address(self) -> str:
        context = self.request.connection.context  # type: ignore[union-attr]
        peer = UNIX if context.address_family == socket.AF_UNIX else context.remote_ip
        return self.relay.proxies.client(peer, self.request.headers.get_list("X-Forwarded-For"))

    async def _admit(self, wanted: tuple[str, ...], address: str) -> Grant:
        """Return what the client may listen to, if that is all that it asks for."""
        grant = self._grant(wanted)
        if self.relay.authority is None:
            return grant
        headers = self.request.headers
        question = Question(
            wanted, headers.get("Cookie", ""), headers.get("Authorization", ""), "" if address == UNIX else address
        )
        status = await self.relay.authority.ask(question)
        if status in REFUSALS:
            raise HTTPError(status, log_message="the application does not let this client listen here")
        # It was not asked for the twins of these channels.
        return Grant([], grant.expires_at)

    def _grant(self, wanted: tuple[str, ...]) -> Grant:
        """Return what the client's token lets it listen to."""
        if not self.relay.keys:
            return EVERYBODY
        # The first that is there counts, and no other is tried in its place.
        token = self.get_cookie("relay_token") or bearer(self.request) or self.get_query_argument("token", "")
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

    async def _last_position(self, last_event_id: str, audible: tuple[str, ...], known: bool) -> int | None:
        """Return where in the history the stream comes back to, or None if it begins now."""
        replay = self.relay.replay
        if replay is None:
            return None
        last = await replay.find(last_event_id, audible) if last_event_id else None
        if last is None and not (known and replay.newest):
            await replay.refresh()
        return last

    async def head(self, path_channel: str | None = None) -> None:
        wanted = self._channels(path_channel)
        try:
            await self._admit(wanted, self._address)
        except AuthorityUnavailable as exc:
            await self._refuse_softly(str(exc))
            return
        if trouble := self.relay.trouble:
            await self._refuse_softly(trouble)
            return
        await self.answer_and_close(self.relay.head(self.origin))

    def options(self, path_channel: str | None = None) -> None:
        for name, value in access.preflight().items():
            self.set_header(name, value)
        self.clear_header("Content-Type")
        self.set_status(204)

    async def post(self, path_channel: str | None = None) -> None:
        if refusal := publisher_refusal(self.relay, self.request):
            raise refusal
        names = self._channels(path_channel)
        if len(names) > 1:
            raise HTTPError(400, "%d channels; an event goes to one", len(names))
        try:
            await cast(Intake, self.relay.intake).publish(names[0], self.request.body)
        except EventError as exc:
            self.field = exc.field
            raise HTTPError(413 if isinstance(exc, PayloadTooLarge) else 400, "%s", exc) from exc
        except BrokerError as exc:
            raise HTTPError(503, "%s", exc) from exc
        self.clear_header("Content-Type")
        self.set_status(202)

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

    async def _refuse_softly(self, why: str) -> None:
        # EventSource gives up for good on any status but 200 (HTML standard, "fail the connection"),
        # so it is told to come back by a stream that ends at once.
        log.debug("stream refused: %s", why)
        retry = random.randint(*RETRY)
        if "text/event-stream" in self.request.headers.get("Accept", ""):
            body = b": not now\nretry: %d\n\n" % retry if self.request.method == "GET" else b""
            await self.answer_and_close(self.relay.head(self.origin) + body)
        else:
            self.set_status(503)
            self.set_header("Retry-After", str(-(-retry // 1000)))
            self.finish(f"{why}\n")

    def _closed(self, subscriber: Subscriber) -> None:
        if self.relay.hub.remove(subscriber):
            self.relay.reader.release(subscriber.audible)
            self.relay.seats.release(_client(subscriber.address))
            seconds = IOLoop.current().time() - subscriber.opened_at
            log.info("stream ended after %.1f s: %s: %s", seconds, subscriber, subscriber.reason)


def publisher_refusal(relay: Relay, request: HTTPServerRequest) -> HTTPError | None:
    """Return why the sender of ``request`` may not publish, or None if it may."""
    if relay.intake is None:
        return HTTPError(404, log_message="publishing over HTTP is not enabled; see RELAY_PUBLISH_TOKEN")
    if not relay.intake.admits(bearer(request)):
        return HTTPError(401, log_message="publishing takes Authorization: Bearer with the publish token")
    return None


def bearer(request: HTTPServerRequest) -> str:
    """Return the token of the ``Authorization`` header (RFC 6750, section 2.1), or an empty text."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _client(address: str) -> str:
    """Return what `Seats` count by address; whoever comes by the Unix socket has none."""
    return "" if address == UNIX else network_of(address)
