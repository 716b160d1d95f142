"""Two PostgreSQL servers in one URL, of which the standby takes the primary's place."""

import pytest
from pair import Pair
from relay import run
from servers import until
from test_history import listeners, storm


@pytest.fixture
def pair(home, channel, tmp_path):
    """Two servers of the test's own, with a history."""
    folder = home / f"pair-{channel}"
    folder.mkdir(mode=0o755)
    pair = Pair(folder)
    try:
        assert run("init-db", cwd=tmp_path, **pair.environment).returncode == 0
        yield pair
    finally:
        pair.stop()


def test_synchronous_standby_takes_over(pair, tmp_path):
    """A crash, and a planned change back: nothing lost, doubled or out of order with a history, and no gap unsaid without."""

    def disturb(relays, fleets):
        for mode in ("immediate", "fast"):
            pair.synchronise()
            begun = newest(pair)
            until(lambda begun=begun: newest(pair) >= begun + 1000, "a thousand events")
            pair.primary.stop(mode)
            pair.promote()
            until(lambda: len(listeners(pair)) == 4, "all workers are back", 40)
            if mode == "immediate":
                pair.rejoin()

    storm(pair, tmp_path, disturb)


def newest(pair):
    return pair.execute("SELECT coalesce(max(id), 0) FROM sse_relay.event")[0][0]
