"""How many streams are open, in all, from each address, and in each worker. No I/O.

The counts are in memory that the parent shares with its workers. Each process writes to a row of its own and reads
those of all, so there is no lock; the parent empties the row of a worker that has ended, however it did.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import mmap
import os
import resource
import secrets
from collections.abc import Collection
from typing import NamedTuple

# Counters for addresses in a row. An address has two of them, shared with others, and its count is the smaller one: it
# is never less than the true one, and seldom more (a count-min sketch).
CELLS = 65_536
_ROW = 1 + 2 * CELLS
# The secret of the addresses' hashes: nobody can choose addresses that collide.
_KEY_BYTES = 16
# Of each worker's place. While one is replaced there are two, and of each some may take long to end.
ROWS = 4
LAYOUT = f"{ROWS} rows, {CELLS} cells, {_KEY_BYTES} bytes"
"""What tells this memory from that of another version."""

# A worker's own descriptors: its sockets, the broker's connections, those to the application.
OWN_DESCRIPTORS = 64
# Connections whose request has not come; each may have as much of one as a request's limits allow.
MAX_WAITING = 4096
# More than a server takes in at once: it looks at none of them before it has taken all of these.
MIN_SHARE = 64
# PostgreSQL searches a list for the channel of each notification: 80 microseconds with 50,000 channels.
MIN_CHANNELS = 50_000
# So many streams more than the others have on average is no reason to leave the next one to them.
SLACK = 8


class Tally:
    """
    The counts of all workers.

    Args:
        rows: How many processes may count at a time.
        descriptor: The memory of another one with as many rows and the same `LAYOUT`, to go on with.
        taken: The rows that are taken there.

    """

    def __init__(self, rows: int, descriptor: int | None = None, taken: Collection[int] = ()) -> None:
        size = _KEY_BYTES + rows * _ROW * 4
        if descriptor is None:
            self.descriptor = os.memfd_create("tally", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.write(self.descriptor, secrets.token_bytes(_KEY_BYTES))
            os.ftruncate(self.descriptor, size)
            # A process that cut it off would end all others that look at it (SIGBUS).
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        else:
            self.descriptor = descriptor
        memory = memoryview(mmap.mmap(self.descriptor, size))
        self.key = bytes(memory[:_KEY_BYTES])
        self.counters = memory[_KEY_BYTES:].cast("I")
        self.rows = rows
        self._free = [row for row in range(rows) if row not in taken]

    def take_row(self) -> int:
        """
        Return a row for a process.

        Raises:
            OSError: If there is none.

        """
        if not self._free:
            raise OSError("too many workers are ending")
        return self._free.pop()

    def free_row(self, row: int) -> None:
        """Forget what the process of ``row`` counted, which has ended."""
        start = row * _ROW
        self.counters[start : start + _ROW] = memoryview(bytes(_ROW * 4)).cast("I")
        self._free.append(row)


class Full(NamedTuple):
    """Why there is no room for a stream."""

    reason: str
    """As `counts.REFUSED` has it."""
    text: str


class Seats:
    """
    The streams of one worker, as far as there is room for them.

    Args:
        tally: The counts of all workers.
        row: Where this one counts.
        limit: Streams in all; 0 is no limit.
        limit_per_client: Streams of one address; 0 is no limit.
        limit_here: Streams of this worker; 0 is no limit.

    """

    def __init__(self, tally: Tally, row: int, limit: int, limit_per_client: int, limit_here: int = 0) -> None:
        self._counters = tally.counters
        self._key = tally.key
        self._starts = range(0, tally.rows * _ROW, _ROW)
        self._own = row * _ROW
        self._limit = limit
        self._limit_per_client = limit_per_client
        self._limit_here = limit_here

    def take(self, client: str) -> Full | None:
        """
        Count a stream from the address ``client``, and return None; or return why there is no room for it.

        An empty ``client`` is nobody's address, and counts for the limit in all only. Pair it with `release`.
        """
        # First counted, then looked at: of two that come at once to two workers none may slip in over the limit.
        self._add(client, 1)
        if self._limit and self._sum(0) > self._limit:
            self._add(client, -1)
            return Full("full", f"all {self._limit} streams are taken (RELAY_MAX_CONNECTIONS)")
        if self._limit_here and self._counters[self._own] > self._limit_here:
            self._add(client, -1)
            text = f"the worker has descriptors for {self._limit_here} streams (LimitNOFILE, ulimit -n)"
            return Full("descriptors", text)
        if self._limit_per_client and client:
            first, second = self._cells(client)
            if min(self._sum(first), self._sum(second)) > self._limit_per_client:
                self._add(client, -1)
                return Full("address", f"{client} has {self._limit_per_client} streams (RELAY_MAX_CONNECTIONS_PER_IP)")
        return None

    def release(self, client: str) -> None:
        """End what `take` counted."""
        self._add(client, -1)

    def ahead(self, workers: int) -> bool:
        """Return whether this worker has more streams than its share, where there are so many workers."""
        return self._counters[self._own] > self._sum(0) / workers + SLACK

    def _add(self, client: str, number: int) -> None:
        self._counters[self._own] += number
        if self._limit_per_client and client:
            for cell in self._cells(client):
                self._counters[self._own + cell] += number

    def _sum(self, cell: int) -> int:
        return sum(self._counters[start + cell] for start in self._starts)

    def _cells(self, client: str) -> tuple[int, int]:
        digest = int.from_bytes(hashlib.blake2b(client.encode(), digest_size=8, key=self._key).digest(), "little")
        return 1 + digest % CELLS, 1 + CELLS + (digest >> 16) % CELLS


def descriptor_limit() -> int:
    """Return how many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 2**20


def shares(descriptors: int) -> tuple[int, int]:
    """Return how many streams a process with so many descriptors may have, and how many connections without one."""
    waiting = max(MIN_SHARE, min(descriptors // 8, MAX_WAITING))
    return max(MIN_SHARE, descriptors - waiting - OWN_DESCRIPTORS), waiting


def channels_of(descriptors: int) -> int:
    """
    Return how many channels a process with so many descriptors may have the broker send.

    With one channel for each user, and its lower-case twin on PostgreSQL, each stream brings two.
    """
    streams, _ = shares(descriptors)
    return max(MIN_CHANNELS, 2 * streams)


def network_of(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 of an IPv6 one, which a household has to itself."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network(f"{address}/64", strict=False))
