"""A relay over a long time: streams come and go, events come in bursts, the broker starts again; nothing is lost, nothing grows."""

import os
import random
import statistics
import threading
from collections import Counter
from pathlib import Path

import pytest
from fleet import Fleet, Numbers
from pages import Page, Pages
from relay import run, watched
from servers import PATIENCE, PostgresServer, RedisServer, patience, until

# On each broker; `make soak` takes more. Memory has its size after two restarts of the broker, in the eighth round.
ROUNDS = int(os.environ.get("SSE_RELAY_SOAK_ROUNDS", "18"))
CHANNELS = [f"soak-{number}" for number in range(20)]
STEADY, CHURNING, BURST = 60, 150, 1500
# A restart comes after so many rounds, and what it takes until all have come back may last so long.
RESTART_EVERY, BACK_SECONDS = 4, 60
# Python's own heap breathes; some hundred thousand events, or some thousand streams, that left 20 bytes each show.
MAX_GROWTH = 3 << 20


class Broker:
    """A server of its own, which keeps events over a restart."""

    def __init__(self, kind, home):
        home.mkdir(mode=0o755)
        self.kind = kind
        self.server = (
            PostgresServer(home, log_statement="none") if kind == "postgres" else RedisServer(home, persistent=True)
        )
        self.url = self.server.url
        # So few that most are pruned meanwhile, and enough for who was away.
        self.environment = self.server.environment | {"RELAY_HISTORY": "3000"}
        if kind == "postgres":
            done = run("init-db", cwd=home, **self.environment)
            assert done.returncode == 0, done.stderr

    def restart(self):
        self.server.stop()
        self.server.start()


@pytest.fixture(params=["postgres", "redis"])
def kept_here(request, home, channel):
    broker = Broker(request.param, home / f"soak-{channel}")
    yield broker
    broker.server.stop("immediate")


class Reading(threading.Thread):
    """Reads for a fleet while others work."""

    def __init__(self, fleet):
        super().__init__(daemon=True)
        self.fleet = fleet
        self.enough = threading.Event()

    def __enter__(self):
        self.start()
        return self.fleet

    def __exit__(self, *_):
        self.enough.set()
        self.join(PATIENCE)

    def run(self):
        while not self.enough.is_set():
            self.fleet.step()


def footprint(pids):
    """Return bytes of memory that are these processes' own, and their descriptors."""
    memory = descriptors = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        memory += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        descriptors += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return memory, descriptors


def growth(footprints):
    """Return by how many bytes and descriptors the last third is above the one before it, in the median."""
    third = len(footprints) // 3
    assert third >= 2, f"{len(footprints)} rounds are too few to compare"
    before, after = footprints[-2 * third : -third], footprints[-third:]
    return [
        statistics.median(each[n] for each in after) - statistics.median(each[n] for each in before) for n in (0, 1)
    ]


def churn(relay, broker, number):
    """Let streams come, some from where the history begins, and some go while a burst is under way; return the burst."""
    names = random.choices(CHANNELS, k=CHURNING)
    paths = [f"/channel={name}{'?last_event_id=earliest' if n % 5 == 0 else ''}" for n, name in enumerate(names)]
    paths += [f"/events?channel={name}&channel=only-{number}-{n}" for n, name in enumerate(names[:30])]
    burst = Numbers(broker, CHANNELS, BURST, rate=1e6, first=number * 1_000_000)
    burst.enough.set()
    with Pages() as pages:
        opened = pages.open(relay.relay.port, paths)
        unread = [pages.add(Page(relay.relay.port, "/channel=soak-0")) for _ in range(3)]
        burst.start()
        assert not any(page.closed for page in opened)
        for page in opened[::3]:
            pages.close(page)
        left = [page for n, page in enumerate(opened) if n % 3]
        pages.until(lambda: all(page.events for page in left), "events for all", BACK_SECONDS)
        burst.join(patience(BACK_SECONDS))
        assert unread
    return burst


def broker_up(relay):
    return [value for (name, *_), value in relay.metrics().items() if name == "sse_relay_broker_up"]


def test_nothing_is_lost_and_nothing_grows(kept_here, tmp_path):
    """Streams that stay get each event once and in order; memory and descriptors are after an hour what they were before."""
    footprints = []
    with watched(tmp_path, workers=2, **kept_here.environment) as relay:
        workers = relay.relay.workers()
        paths = [f"/channel={CHANNELS[n % len(CHANNELS)]}" for n in range(STEADY)]
        with Fleet(paths, relay.relay.port) as fleet:
            published = [Numbers(kept_here, CHANNELS, 0, rate=100.0)]
            published[0].start()
            with Reading(fleet):
                for _ in range(ROUNDS):
                    published.append(churn(relay, kept_here, len(published)))
                    if len(published) % RESTART_EVERY == 0:
                        kept_here.restart()
                        until(lambda: set(broker_up(relay)) == {1}, "all workers are connected again", BACK_SECONDS)
                    until(lambda: relay.status()["streams"] == STEADY, "those that came have gone", BACK_SECONDS)
                    assert relay.relay.workers() == workers
                    footprints.append(footprint([relay.relay.process.pid, *workers]))
                    print(f"{kept_here.kind}: {footprints[-1][0] / 2**20:.2f} MiB, {footprints[-1][1]} descriptors")
                published[0].enough.set()
                published[0].join(PATIENCE)
                wanted = {
                    channel: Counter(n for each in published for n in each.taken[channel]) for channel in CHANNELS
                }
                unsure = sum(each.unsure for each in published)

                def missing(stream):
                    return wanted[stream.path.partition("=")[2]] - Counter(stream.got)

                until(lambda: not any(map(missing, fleet.streams)), "all that was published", BACK_SECONDS)
            for stream in fleet.streams:
                assert stream.resets == []
                extra = Counter(stream.got) - wanted[stream.path.partition("=")[2]]
                # What a broker took whose answer was lost may be there, once.
                assert max(extra.values(), default=0) <= 1
                assert extra.total() <= unsure
                for first in range(0, len(published) * 1_000_000, 1_000_000):
                    own = [int(n) for n in stream.got if first <= int(n) < first + 1_000_000]
                    assert own == sorted(own)
        assert "Traceback" not in relay.relay.log
    memory, descriptors = growth(footprints)
    assert memory < MAX_GROWTH, footprints
    assert descriptors <= 0, footprints


@pytest.mark.parametrize("broker", ["postgres", "redis"], indirect=True)
def test_reading_leaves_nothing_in_memory(broker, tmp_path, pages, channel):
    """Of a flood of events none stays, as was reported of hiredis (redis-py#4339)."""
    payload, batch = "x" * 500, 20_000

    def flood():
        if broker.kind == "redis":
            pipeline = broker.client.pipeline(transaction=False)
            for number in range(batch):
                pipeline.publish(channel, f"{number} {payload}")
            pipeline.execute()
        else:
            broker.execute(
                "SELECT pg_notify(%s, n || %s) FROM generate_series(0, %s) n", channel, f" {payload}", batch - 1
            )

    with watched(tmp_path, "--client-buffer", str(1 << 28), workers=1, **broker.environment) as relay:
        (page,) = pages.open(relay.relay.port, [f"/channel={channel}"])
        footprints = []
        for _ in range(9):
            flood()
            pages.until(lambda: len(page.events) == batch, "all of them", BACK_SECONDS)
            assert [event.data.split()[0] for event in page.events] == [str(n) for n in range(batch)]
            page.events.clear()
            page.body = b""
            footprints.append(footprint(relay.relay.workers()))
    memory, descriptors = growth(footprints)
    # 60,000 events lie between the thirds: that is 16 bytes each.
    assert memory < 1 << 20, footprints
    assert descriptors <= 0
