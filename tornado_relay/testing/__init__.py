"""
For a team's own tests: what a block of code notified, and a relay that runs for as long as a test does.

``tornado_relay.testing.fixtures`` has the same as fixtures for pytest.
"""

from .capture import Captured, Notified, capture_events
from .live import LiveRelay, Stream, live_relay

__all__ = ["Captured", "LiveRelay", "Notified", "Stream", "capture_events", "live_relay"]
