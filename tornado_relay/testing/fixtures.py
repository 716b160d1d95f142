"""Fixtures for pytest: ``pytest_plugins = ["tornado_relay.testing.fixtures"]`` in a ``conftest.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .capture import Captured, capture_events
from .live import LiveRelay, live_relay


@pytest.fixture
def sse_events() -> Iterator[Captured]:
    """What the test has notified so far."""
    with capture_events() as captured:
        yield captured


@pytest.fixture
def sse_relay() -> Iterator[LiveRelay]:
    """A relay on the test's broker; with pytest-django ask for ``transactional_db`` as well, and before it."""
    with live_relay() as relay:
        yield relay
