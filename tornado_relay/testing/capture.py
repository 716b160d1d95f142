"""What a block of code notified."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from .. import project, publish


class Notified(NamedTuple):
    """One call of ``notify()``; it equals the tuple ``(channel, event)``."""

    channel: str
    event: dict[str, Any]
    """What was given as ``sse_payload``, as JSON has it."""


class Captured(Sequence[Notified]):
    """
    What has been notified so far, in order; it equals a list of the same.

    An event counts once the transaction that it was sent in, or a savepoint of it, has not been rolled back. That
    of a ``TestCase`` itself, in which nothing commits, does not matter.
    """

    def __init__(self) -> None:
        # By the order of the calls; what a rollback takes away is not confirmed.
        self._sent: list[_Sent] = []
        self._final: list[Notified] | None = None

    def _now(self) -> list[Notified]:
        if self._final is not None:
            return self._final
        waiting = _waiting()
        return [each.notified for each in self._sent if each.committed or each in waiting]

    def _freeze(self) -> None:
        self._final = self._now()

    def _add(self, notified: Notified, connection: Any) -> None:
        self._sent.append(_Sent(notified))
        if connection is None:
            self._sent[-1]()
        else:
            connection.on_commit(self._sent[-1])

    def __len__(self) -> int:
        return len(self._now())

    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __eq__(self, other: object) -> bool:
        return self._now() == (other._now() if isinstance(other, Captured) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._now())


class _Sent:
    """What Django calls at the commit, and forgets at a rollback."""

    def __init__(self, notified: Notified) -> None:
        self.notified = notified
        self.committed = False

    def __call__(self) -> None:
        self.committed = True


@contextmanager
def capture_events() -> Iterator[Captured]:
    """
    Capture what ``notify()``, and all that calls it, sends in a block.

    Calls are checked as ever, and raise what they would. With Redis nothing is sent, and none need run; on Django's
    own PostgreSQL they go into the test's transaction. Other drivers of the test database, such as SQLite, will do.

    Yields:
        The events, also while the block still runs.

    """
    captured, send = Captured(), publish.send

    def capture(channel: str, payload: str, own_id: str | None, using: str | None) -> None:
        connection = publish.django_connection(using)
        if connection is not None and connection.vendor == "postgresql" and publish.target(using)[0] is None:
            send(channel, payload, own_id, using)
        captured._add(Notified(channel, json.loads(payload)), connection)  # noqa: SLF001

    with mock.patch.object(publish, "send", capture):
        try:
            yield captured
        finally:
            captured._freeze()  # noqa: SLF001


def _waiting() -> set[Any]:
    """Return what Django is to call once the open transactions have committed."""
    if project.conf() is None:
        return set()
    from django.db import connections  # noqa: PLC0415

    return {
        call
        for connection in connections.all(initialized_only=True)
        for _, call, *_ in connection.run_on_commit
        if isinstance(call, _Sent)
    }
