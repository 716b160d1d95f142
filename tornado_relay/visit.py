"""One client's way from its request to its stream."""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Callable

from tornado.httputil import HTTPServerRequest

from . import channels, events
from .access import EVERYBODY, UNIX, Grant, joined
from .access_log import id_of, new_id
from .authority import REFUSALS, Question
from .counts import CLOSED, OPENED, REPLAYS, RESETS, STREAMS
from .errors import AuthorityUnavailable, BrokerError, ChannelError, NoRoom, TokenError
from .limits import network_of
from .refusal import NotNow, Refusal
from .relay import RETRY, Relay
from .subscriber import Subscriber

log = logging.getLogger(__name__)

MAX_CHANNELS = 100
"""Channels of one stream."""

# For the log.
ENDS = {
    "client": "closed by the client",
    "cut": "cut: it read too slowly",
    "expired": "its time was up",
    "drain": "the worker is stopping",
}

# The id of streams that no history can bring up to date: one that comes back with it is told so.
NO_HISTORY = "none"

# Names of the last id in an address. Client libraries add the first three when they reconnect, so
# those are newer than `last_event_id`, with which a page begins.
LAST_IDS = ("lastEventId", "lastEventID", "Last-Event-ID", "last_event_id")


class Visit:
    """
    What a client asks for, and who it is.

    Args:
        relay: What the worker has.
        request: The client's, which is a GET or HEAD of channels.
        path_channel: The channel that its path names, if it does.
        peer: The address that the connection is from, or `access.UNIX`.

    Raises:
        Refusal: 400, if it does not ask for channels that there can be.

    """

    __slots__ = ("_client", "_peer", "_relay", "_request", "address", "channels", "labels", "last_event_id")

    def __init__(self, relay: Relay, request: HTTPServerRequest, path_channel: str | None, peer: str) -> None:
        self._relay = relay
        self._request = request
        self._peer = peer
        self.channels = channels_of(request, path_channel)
        # Before anything is held, since it may be no text.
        self.last_event_id = _last_event_id(request)
        self.labels = _query(request, "labels") == "1"
        self.address = relay.proxies.client(peer, request.headers.get_list("X-Forwarded-For"))
        # What limits count by; whoever comes by the Unix socket has no address.
        self._client = "" if self.address == UNIX else network_of(self.address)

    def grant(self) -> Grant:
        """
        Return what the client's token, or its tokens together, let it listen to.

        Raises:
            Refusal: 401 without a token, or with one that does not count; 403 if they do not cover all that is asked
                for.

        """
        if not self._relay.keys:
            return EVERYBODY
        # The first place where there is one counts, and no other is looked at.
        cookie = self._request.cookies.get("relay_token")
        single = (cookie and cookie.value) or bearer(self._request)
        tokens = {single} if single else {token for token in _queried(self._request, "token") if token}
        if not tokens:
            raise Refusal(401, "token", "no token; send one as cookie relay_token, Authorization: Bearer, or ?token=")
        if len(tokens) > MAX_CHANNELS:
            raise Refusal(400, "request", "%d tokens; a stream takes at most %d", len(tokens), MAX_CHANNELS)
        try:
            grant = joined([self._relay.keys.grant(token) for token in tokens])
        except TokenError as exc:
            raise Refusal(401, "token", "%s", exc) from exc
        for name in self.channels:
            if not grant.allows(name):
                raise Refusal(403, "channel", "the token does not cover the channel %s", name)
        return grant

    async def admit(self) -> Grant:
        """
        Return what the client may listen to beside what it asks for; ask the application, if that has a say.

        Raises:
            Refusal: 401 or 403, if it may not have what it asks for.
            NotNow: If the application does not say.

        """
        grant = self.grant()
        if self._relay.authority is None:
            return grant
        headers = self._request.headers
        address = "" if self.address == UNIX else self.address
        question = Question(
            self.channels, "; ".join(headers.get_list("Cookie")), headers.get("Authorization", ""), address
        )
        try:
            status = await self._relay.authority.ask(question)
        except AuthorityUnavailable as exc:
            raise NotNow("authority", str(exc)) from exc
        if status in REFUSALS:
            raise Refusal(status, "application", "the application does not let this client listen here")
        # It was not asked for the twins of these channels.
        return Grant([], grant.expires_at)

    def take_seat(self) -> None:
        """
        Count a stream of this client; pair it with `leave`.

        Raises:
            NotNow: If there is no room for one.

        """
        if full := self._relay.seats.take(self._client):
            raise NotNow(*full)

    def leave(self) -> None:
        """End what `take_seat` counted."""
        self._relay.seats.release(self._client)

    async def open(self, grant: Grant, take: Callable[[], socket.socket | None]) -> bool:
        """
        Open the stream on the socket that ``take`` gives; return False where it gives none, as the client has gone.

        Raises:
            NotNow: If it cannot be opened. Nothing is held then.

        """
        relay, reader = self._relay, self._relay.reader
        subscriber = Subscriber(
            self.channels,
            tuple(name for name in reader.audible(self.channels) if name in self.channels or grant.allows(name)),
            address=self.address,
            request_id=id_of(self._request) or new_id(),
            labels=self.labels,
            ends_at=self._end(grant),
            on_close=self._closed,
        )
        try:
            known = await reader.subscribe(subscriber.audible, self._client)
        except NoRoom as exc:
            raise NotNow(exc.reason, str(exc)) from exc
        except BrokerError as exc:
            raise NotNow("broker", f"{reader.name}: {exc}") from exc
        opened = False
        try:
            last = await self._last_position(subscriber.audible, known)
            if relay.draining:
                raise NotNow("draining", str(relay.trouble))
            connection = take()
            if connection is None:
                return False
            # Nothing may await from here on: an event that comes after the head must find the stream in the hub.
            opened = True
        except BrokerError as exc:
            raise NotNow("broker", f"{reader.name}: {exc}") from exc
        finally:
            if not opened:
                reader.release(subscriber.audible)
        self._begin(subscriber, connection, last)
        return True

    def _begin(self, subscriber: Subscriber, connection: socket.socket, last: int | None) -> None:
        """Send the head and the first block, and deliver from now on."""
        relay, replay, counts = self._relay, self._relay.replay, self._relay.hub.counts
        begin = b": sse-relay-server\nretry: %d\n" % random.randint(*RETRY)
        if last is None:
            newest = replay.newest if replay else None
            subscriber.position, place = newest.seq if newest else 0, str(newest or NO_HISTORY)
            if self.last_event_id:
                # Before the new position: a page that is cut between the two is told when it comes back.
                begin += events.stream_reset("unknown-id", self.channels)
                counts.add(RESETS, "unknown-id")
        else:
            counts.add(REPLAYS)
            subscriber.position, place = last, self.last_event_id
        if subscriber.labels:
            # How long silence may last, and whether events of "a" are for a page on "A" too.
            folds = len(relay.reader.audible(("A",))) > 1
            begin += b"heartbeat: %g\nfolds: %d\n" % (relay.settings.heartbeat, folds)
        begin += events.stream_open(place, resumed=last is not None)
        origin, now = self._request.headers.get("Origin"), time.monotonic()
        packer = relay.packer(self._request)
        head = relay.head(origin, packer) + (packer.begin(begin) if packer else begin)
        subscriber.open(connection, relay.poller, head, relay.settings.client_buffer, now)
        subscriber.packer = packer
        counts.add(OPENED)
        counts.add(STREAMS)
        log.info("stream opened: %s", subscriber, extra={"fields": subscriber.fields()})
        if relay.access_log:
            relay.access_log.answered(self._request, self._peer, 200, subscriber.request_id)
        if replay:
            replay.admit(subscriber, behind=last is not None)
        else:
            relay.hub.add(subscriber)

    def _end(self, grant: Grant) -> float | None:
        """Return when the stream is to end, by `time.monotonic`, if it has to."""
        lifetime = self._relay.settings.max_stream_seconds
        if not lifetime and grant.expires_at is None:
            return None
        now = time.monotonic()
        ends = [now + lifetime * random.uniform(0.8, 1.0)] if lifetime else []
        if grant.expires_at is not None:
            ends.append(now + grant.expires_at - time.time())
        return min(ends)

    async def _last_position(self, audible: tuple[str, ...], known: bool) -> int | None:
        """Return where in the history the stream comes back to, or None if it begins now."""
        replay = self._relay.replay
        if replay is None:
            return None
        last = await replay.find(self.last_event_id, audible) if self.last_event_id else None
        if last is None and not (known and replay.newest):
            await replay.refresh()
        return last

    def _closed(self, subscriber: Subscriber) -> None:
        if self._relay.hub.remove(subscriber):
            self._relay.reader.release(subscriber.audible)
            self.leave()
            self._relay.hub.counts.add(STREAMS, number=-1)
            self._relay.hub.counts.add(CLOSED, subscriber.reason)
            seconds = time.monotonic() - subscriber.opened_at
            fields = subscriber.fields() | {"seconds": round(seconds, 1), "reason": subscriber.reason}
            log.info(
                "stream ended after %.1f s: %s: %s",
                *(seconds, subscriber, ENDS[subscriber.reason]),
                extra={"fields": fields},
            )


def channels_of(request: HTTPServerRequest, path_channel: str | None) -> tuple[str, ...]:
    """
    Return the channels that a request is for: the one of its path, or else all of its query.

    Raises:
        Refusal: 400, if there are none, too many, or one that there cannot be.

    """
    if path_channel is not None:
        names = [path_channel]
    else:
        try:
            names = [name.decode() for name in request.query_arguments.get("channel", [])]
        except UnicodeDecodeError as exc:
            raise Refusal(400, "request", "a channel's name is not UTF-8") from exc
    if not names:
        raise Refusal(400, "request", "no channel; ask for /channel=NAME or /events?channel=A&channel=B")
    if len(names) > MAX_CHANNELS:
        raise Refusal(400, "request", "%d channels asked for; a stream takes at most %d", len(names), MAX_CHANNELS)
    try:
        return tuple(dict.fromkeys(channels.check(name) for name in names))
    except ChannelError as exc:
        raise Refusal(400, "request", "%s", exc) from exc


def bearer(request: HTTPServerRequest) -> str:
    """Return the token of the ``Authorization`` header (RFC 6750, section 2.1), or an empty text."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _last_event_id(request: HTTPServerRequest) -> str:
    """What the browser had last: the header, which it sends when it reconnects, is newer than the address."""
    header = request.headers.get("Last-Event-ID", "")
    try:
        sent = header.encode("latin-1").decode()  # browsers send UTF-8
    except UnicodeError:
        sent = header
    in_address = (_query(request, name) for name in LAST_IDS if name in request.query_arguments)
    return sent or next(filter(None, in_address), "")


def _query(request: HTTPServerRequest, name: str) -> str:
    return _queried(request, name)[-1]


def _queried(request: HTTPServerRequest, name: str) -> list[str]:
    """Return all values of ``name``, or an empty one."""
    try:
        return [value.decode() for value in request.query_arguments.get(name, [b""])]
    except UnicodeDecodeError as exc:
        raise Refusal(400, "request", "the query's %s is not UTF-8", name) from exc
