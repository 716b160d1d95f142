"""The history that ``init-db`` sets up, read on a worker's one connection.

On that connection a notification comes before or after a result, never in between, and a commit that the
result does not see is notified behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import BrokerRefused
from ..replay import Page, Row
from .spans import Cursor, Spans

# Bytes of one page, but for its last event.
PAGE_BYTES = 131_072
# Events that one call deletes.
PRUNE_BATCH = 500

_SPANS = "SELECT token, first_id FROM sse_relay.span ORDER BY n"
_FIND = "SELECT id FROM sse_relay.event WHERE channel = ANY(%s) AND own_id = %s ORDER BY id DESC LIMIT 2"
# One statement, so all of it is of one snapshot. A channel without events gives a row all the same.
_READ = """
SELECT w.n, greatest(s.pruned_through, p.through), h.token, h.id, e.id, e.token, e.payload
FROM sse_relay.head() h CROSS JOIN sse_relay.state s
LEFT JOIN unnest(%(channels)s::text[], %(after)s::bigint[]) WITH ORDINALITY w (channel, after, n) ON true
LEFT JOIN sse_relay.pruned p ON p.channel = w.channel
LEFT JOIN LATERAL (
    SELECT * FROM (
        SELECT e.id, e.token, e.payload, sum(octet_length(e.payload)) OVER (ORDER BY e.id) - octet_length(e.payload) AS before
        FROM sse_relay.event e WHERE e.channel = w.channel AND e.id > w.after ORDER BY e.id LIMIT %(limit)s
    ) page WHERE page.before < %(bytes)s
) e ON true
ORDER BY w.n, e.id
"""


class PostgresHistory:
    """
    A `replay.History`.

    Args:
        query: Runs a statement with arguments and returns its rows, or raises `BrokerError`.
        keep: Events that are kept of each channel.
        seconds: How long they are kept.

    """

    hint = "run sse-relay-server init-db"

    def __init__(
        self, query: Callable[[str, Any], Awaitable[list[tuple[Any, ...]]]], keep: int, seconds: float
    ) -> None:
        self._query = query
        self._keep = keep
        self._seconds = seconds

    async def open(self) -> tuple[Cursor, Spans] | None:
        """See `replay.History`."""
        found = await self._query("SELECT count(*) FROM pg_catalog.pg_namespace WHERE nspname = 'sse_relay'", ())
        if not found[0][0]:
            return None
        try:
            ((token, seq),) = await self._query("SELECT token, id FROM sse_relay.open()", ())
            return Cursor(token, seq), Spans(await self._query(_SPANS, ()))
        except BrokerRefused as exc:
            raise BrokerRefused(f"{exc}; run the GRANTs for the relay that sse-relay-server init-db prints") from exc

    async def find(self, own_id: str, channels: tuple[str, ...]) -> int | None:
        """See `replay.History`."""
        rows = await self._query(_FIND, (list(channels), own_id)) if "\0" not in own_id else []
        return rows[0][0] if len(rows) == 1 else None

    async def read(self, places: list[tuple[str, int]], limit: int) -> tuple[list[Page], Cursor | None]:
        """See `replay.History`."""
        channels, after = [channel for channel, _ in places], [seq for _, seq in places]
        arguments = {"channels": channels, "after": after, "limit": limit, "bytes": PAGE_BYTES}
        found = await self._query(_READ, arguments)
        rows: list[list[Row]] = [[] for _ in places]
        through = [0] * len(places)
        for n, pruned, _, _, seq, token, payload in found:
            if n is not None:
                through[n - 1] = pruned
                if seq is not None:
                    rows[n - 1].append(Row(seq, str(Cursor(token, seq)), payload))
        pages = [
            Page(page, len(page) < limit and sum(len(row.payload.encode()) for row in page) < PAGE_BYTES, gap)
            for page, gap in zip(rows, through, strict=True)
        ]
        return pages, Cursor(*found[0][2:4])

    async def prune(self) -> bool:
        """See `replay.History`."""
        rows = await self._query("SELECT sse_relay.prune(%s, %s, %s)", (self._keep, self._seconds, PRUNE_BATCH))
        return bool(rows[0][0])
