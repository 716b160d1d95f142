"""The history in Redis: a capped stream per channel, written by the script that publishes.

Read on a connection beside the one that is subscribed, which takes no other commands, by a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import redis

from ..brokers.redis import cluster, scripts
from ..brokers.redis import url as urls
from ..errors import BrokerRefused, BrokerUnavailable
from .page import Page, Row
from .spans import Cursor, Spans

log = logging.getLogger(__name__)

# Seconds after which publishers stop to keep events, when no relay asks for it any more.
LAPSE_SECONDS = 7 * 86_400
# So many tokens of spans are shown to a server that is connected to next.
SEEN = 20
# In a Cluster also a server that has the history no more; the reader finds the one that has.
_AWAY = (redis.ConnectionError, redis.TimeoutError, *cluster.CHANGING)


class RedisHistory:
    """
    A `History`.

    Args:
        url: The Redis URL.
        keep: Events that are kept of each channel.
        seconds: How long a channel without new events is kept.
        server: Which server of a group events are read from now, as `url.server_of` has it: what is kept has to be
            of the same one.
        agrees: Says whether events are read from the server process with this run_id.

    """

    hint = "it was asked for one, and has forgotten that"

    def __init__(
        self,
        url: str,
        keep: int,
        seconds: float,
        server: Callable[[], str],
        agrees: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._url = url
        self._keys = scripts.Keys(urls.prefix(url))
        self._server = server
        self._agrees = agrees
        self._connect("")
        # The tokens of the spans that were there at the last open, the newest first.
        self._seen: list[str] = []
        self._warned = False
        self._keep = keep
        self._seconds = seconds
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redis-history")
        self._open_script, self._read_script = scripts.text("open"), scripts.text("read")
        self._open_digest = scripts.digest(self._open_script)

    async def open(self) -> tuple[Cursor, Spans] | None:
        """See `History`."""
        server = self._server()
        if not server and urls.names_group(self._url):
            raise BrokerUnavailable("no server of the group is connected")
        await self._reconnect(server)
        if not self._process and not self._warned:
            self._warned = True
            log.warning(
                "this Redis user may not use INFO: if the server restarts or is replaced, lost events may not be "
                "announced; allow it by ACL SETUSER NAME +info"
            )
        await self._check_memory()
        token, last, spans = await self._call(self._open)
        names = [name.decode() for name in spans[::2]]
        self._seen = names[: -SEEN - 1 : -1]
        return Cursor(token.decode(), int(last)), Spans(zip(names, map(int, spans[1::2]), strict=True))

    async def find(self, own_id: str, channels: tuple[str, ...]) -> int | None:
        """See `History`."""
        found = []
        for first, again in await self._call(self._scores, own_id, channels):
            if first is not None:
                found += [int(first)] if again is None else [0, 0]
        return found[0] if len(found) == 1 else None

    async def read(
        self, places: list[tuple[str, int]], limit: int, size: int, total: int
    ) -> tuple[list[Page], Cursor | None]:
        """See `History`."""
        keys = [self._keys.state, *(self._keys.events(channel) for channel, _ in places)]
        arguments = (limit, size, total, *(max(0, seq) for _, seq in places))
        reply = await self._call(self._client.eval, self._read_script, len(keys), *keys, *arguments)
        if not reply:
            return [], None
        token, last, found = reply
        pages = [
            Page(
                [Row(int(seq), f"{tag.decode()}-{seq.decode()}", _text(payload)) for seq, tag, payload in rows],
                int(end) if end else None,
                int(gone),
            )
            for end, gone, rows in found
        ]
        return pages, Cursor(token.decode(), int(last))

    async def prune(self) -> bool:
        """See `History`; Redis deletes by itself, as long as it is known that a relay is there."""
        await self._lapse()
        return False

    async def _reconnect(self, server: str) -> None:
        await self._call(self._connect_anew, server)
        if not self._agrees(self._process):
            raise BrokerUnavailable("the address leads to another server now")

    async def _lapse(self) -> None:
        seconds = max(LAPSE_SECONDS, round(self._seconds))
        for key in (self._keys.state, self._keys.spans):
            await self._call(self._client.expire, key, seconds)

    async def _check_memory(self) -> None:
        try:
            info = await self._call(self._client.info, "memory")
        except BrokerRefused:
            return  # it is only for a warning
        if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
            log.warning(
                "Redis deletes keys when it is full (maxmemory-policy %s): events may go without a word; use noeviction",
                info["maxmemory_policy"],
            )

    def _connect(self, server: str) -> None:
        self._connected_to = server
        self._process = ""
        pool = urls.pool(self._url, "sse-relay-history", server)
        pool.connection_kwargs["redis_connect_func"] = self._introduce
        self._client = redis.Redis(connection_pool=pool)

    def _connect_anew(self, server: str) -> None:
        self._client.connection_pool.disconnect()
        self._connect(server)
        self._client.connection_pool.release(self._client.connection_pool.get_connection())

    def _introduce(self, connection: Any) -> None:
        """Let redis-py reconnect to no other server process than the one that `open` has asked."""
        urls.introduce(connection)
        if self._process not in ("", connection.process):
            raise redis.ConnectionError("the address leads to another server now")
        self._process = connection.process

    def _open(self) -> Any:
        keys_and_arguments = (2, self._keys.state, self._keys.spans, self._keep, self._seconds)
        identity = (self._connected_to, self._process, ",".join(self._seen))
        try:
            return self._client.evalsha(self._open_digest, *keys_and_arguments, "", *identity)
        except redis.exceptions.NoScriptError:
            return self._client.eval(self._open_script, *keys_and_arguments, "1", *identity)

    def _scores(self, own_id: str, channels: tuple[str, ...]) -> list[list[float | None]]:
        pipeline = self._client.pipeline(transaction=False)
        for channel in channels:
            pipeline.zmscore(self._keys.own_ids(channel), [own_id, f"\0{own_id}"])
        return pipeline.execute()

    async def _call(self, command: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, partial(command, *arguments))
        except _AWAY as exc:
            raise BrokerUnavailable(str(exc) or type(exc).__name__) from exc
        except redis.exceptions.ReadOnlyError as exc:
            # The server has become a replica. A new connection may lead to the one that took over.
            await self._reconnect(self._connected_to)
            raise BrokerUnavailable(str(exc)) from exc
        except redis.RedisError as exc:
            raise BrokerRefused(str(exc)) from exc


def _text(payload: bytes) -> str:
    return payload.decode(errors="replace")
