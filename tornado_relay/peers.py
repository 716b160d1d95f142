"""What the workers of a relay ask each other: each answers on a Unix socket, in a folder that nobody else can enter."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .sockets import Admin, identity
from .status import Account, whole

log = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0
"""A worker that takes longer to tell of itself is not waited for."""
CHECK_SECONDS = 1.0
# Of the longest line of an account, with channels that have the longest names.
MAX_LINE = 1 << 20


class Peers:
    """
    This worker among the others.

    Args:
        admin: What the relay has for them.
        tell: Returns the lines of this worker's account, see `status.tell`.

    """

    def __init__(self, admin: Admin, tell: Callable[[], Iterator[bytes]]) -> None:
        self._admin = admin
        self._tell = tell
        self._path = admin.path(admin.number, os.getpid())
        self._server: asyncio.Server | None = None
        # What tells our socket from whatever else is at its path.
        self._identity: tuple[int, int] | None = None

    @property
    def workers(self) -> int:
        """How many there should be."""
        return self._admin.workers

    async def start(self) -> None:
        """
        Answer the others from now on.

        Raises:
            OSError: If there can be no socket in the folder.

        """
        if self._server:
            self._server.close()
        self._admin.make_folder()
        self._server = await asyncio.start_unix_server(self._answer, self._path)
        self._identity = identity(str(self._path))

    async def stay(self) -> None:
        """Answer the others although somebody cleans up the folder. Cancel it to end."""
        trouble = ""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            # The others look for it as `present` does: it has to be in a folder that is still private.
            here = (self._admin.number, os.getpid()) in self._admin.present()
            if here and self._identity and identity(str(self._path)) == self._identity:
                continue
            try:
                await self.start()
                log.info("the worker has its socket in %s again", self._admin.folder)
            except OSError as exc:
                self._identity = None
                if trouble != (trouble := str(exc)):
                    log.error(
                        "the worker cannot have its socket in %s, and the admin listener shows it as one that does not "
                        "answer: %s",
                        self._admin.folder,
                        exc,
                    )

    async def status(self) -> dict[str, Any]:
        """Ask all workers, and return the state of the relay; see `status.whole`."""
        channels: Counter[str] = Counter()
        own = Account(self._admin.number, os.getpid(), channels)
        others = [Account(number, pid, channels) for number, pid in self._admin.present() if pid != os.getpid()]
        asking = {asyncio.create_task(self._hear(other)) for other in others}
        for line in self._tell():
            own.take(line)
            await asyncio.sleep(0)
        if asking:
            _, late = await asyncio.wait(asking, timeout=ANSWER_SECONDS)
            for task in late:
                task.cancel()
        accounts = [own, *others]
        # Their processes have ended, and the next ones have not begun to serve.
        missing = set(range(self._admin.workers)) - {account.worker["number"] for account in accounts}
        accounts += [Account(number, None, channels) for number in missing]
        return whole(accounts, channels, time.monotonic() - self._admin.since)

    async def _hear(self, other: Account) -> None:
        path = self._admin.path(other.worker["number"], other.worker["pid"])
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)
        except OSError:
            return  # it has ended
        try:
            while line := await reader.readline():
                other.take(line)
                await asyncio.sleep(0)
        except (OSError, ValueError):
            pass  # it has ended in the middle of it
        finally:
            writer.close()

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for line in self._tell():
                writer.write(line)
                await writer.drain()
                await asyncio.sleep(0)
        except OSError:
            pass  # nobody waits for it any more
        finally:
            writer.close()
