"""
The Django app: ``INSTALLED_APPS = [..., "tornado_relay.django"]``.

With it ``migrate`` sets up the history of events, ``check`` looks at what the relay needs, and ``manage.py`` has
commands. ``notify()`` works without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..publish import notify


async def anotify(channel: str, sse_payload: Mapping[str, Any], *, using: str | None = None) -> None:
    """
    Do what `notify` does, for an asynchronous view.

    It runs where Django's ``sync_to_async`` runs all that uses the database, on that thread's connection. Django has no
    transactions in asynchronous code: to send within one, put it and ``notify`` into one function, and call that by
    ``sync_to_async``.
    """
    from asgiref.sync import sync_to_async  # noqa: PLC0415  (comes with Django)

    await sync_to_async(notify)(channel, sse_payload, using=using)
