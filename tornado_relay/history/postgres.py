"""The history that ``init-db`` sets up, read on a worker's one connection.

On that connection a notification comes before or after a result, never in between, and a commit that the
result does not see is notified behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import BrokerRefused
from .page import Page, Row
from .spans import Cursor, Spans

# Events that one call deletes.
PRUNE_BATCH = 500

_SPANS = "SELECT token, first_id FROM sse_relay.span ORDER BY n"
_FIND = "SELECT id, own_id_again FROM sse_relay.event WHERE channel = ANY(%s) AND own_id = %s ORDER BY id DESC LIMIT 2"
# One statement, so all of it is of one snapshot. A channel without events gives a row all the same.
_READ = """
SELECT w.n, greatest(s.pruned_through, p.through), h.token, h.id, e.found, e.id, e.token,
    CASE WHEN sum(e.bytes) OVER (ORDER BY e.id, w.n) - e.bytes < %(total)s THEN e.payload END
FROM sse_relay.head() h CROSS JOIN sse_relay.state s
LEFT JOIN unnest(%(channels)s::text[], %(after)s::bigint[]) WITH ORDINALITY w (channel, after, n) ON true
LEFT JOIN sse_relay.pruned p ON p.channel = w.channel
LEFT JOIN LATERAL (
    SELECT * FROM (
        SELECT e.*, count(*) OVER () AS found, sum(e.bytes) OVER (ORDER BY e.id) - e.bytes AS before FROM (
            SELECT e.id, e.token, e.payload, octet_length(e.payload) AS bytes
            FROM sse_relay.event e WHERE e.channel = w.channel AND e.id > w.after ORDER BY e.id LIMIT %(limit)s
        ) e
    ) page WHERE page.before < %(bytes)s
) e ON true
ORDER BY w.n, e.id
"""


class PostgresHistory:
    """
    A `History`.

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
        """See `History`."""
        found = await self._query("SELECT count(*) FROM pg_catalog.pg_namespace WHERE nspname = 'sse_relay'", ())
        if not found[0][0]:
            return None
        try:
            ((token, seq),) = await self._query("SELECT token, id FROM sse_relay.open()", ())
            return Cursor(token, seq), Spans(await self._query(_SPANS, ()))
        except BrokerRefused as exc:
            raise BrokerRefused(f"{exc}; run the GRANTs for the relay that sse-relay-server init-db prints") from exc

    async def find(self, own_id: str, channels: tuple[str, ...]) -> int | None:
        """See `History`."""
        rows = await self._query(_FIND, (list(channels), own_id)) if "\0" not in own_id else []
        return rows[0][0] if len(rows) == 1 and not rows[0][1] else None

    async def read(
        self, places: list[tuple[str, int]], limit: int, size: int, total: int
    ) -> tuple[list[Page], Cursor | None]:
        """See `History`."""
        channels, after = [channel for channel, _ in places], [seq for _, seq in places]
        arguments = {"channels": channels, "after": after, "limit": limit, "bytes": size, "total": total}
        answer = await self._query(_READ, arguments)
        rows: list[list[Row]] = [[] for _ in places]
        through, found = [0] * len(places), [0] * len(places)
        # The first events for whose payload there was no room.
        left: dict[int, int] = {}
        for n, pruned, _, _, number, seq, token, payload in answer:
            if n is not None:
                through[n - 1] = pruned
            if payload is not None:
                rows[n - 1].append(Row(seq, str(Cursor(token, seq)), payload))
                found[n - 1] = number
            elif seq is not None:
                left.setdefault(n - 1, seq)
        pages = []
        for n, page in enumerate(rows):
            end = left[n] - 1 if n in left else None
            if end is None and not len(page) == found[n] < limit:
                end = page[-1].seq
            pages.append(Page(page, end, through[n]))
        return pages, Cursor(*answer[0][2:4])

    async def prune(self) -> bool:
        """See `History`."""
        rows = await self._query("SELECT sse_relay.prune(%s, %s, %s)", (self._keep, self._seconds, PRUNE_BATCH))
        return bool(rows[0][0])
