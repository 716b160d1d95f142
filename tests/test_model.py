"""Whatever happens in whatever order, streams get what a list would give them: hypothesis against a real relay."""

import itertools
import json
import signal
import time

import psycopg2
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from outages import end_listeners
from pages import Pages
from relay import Relay, run
from servers import until

from tornado_relay.brokers.reader import GOOD_SECONDS
from tornado_relay.publish import open_publisher

KEEP = 5
_numbers = itertools.count()


class Reference:
    """What is committed, in order, and which of it is kept."""

    def __init__(self):
        self.log = []
        self.pruned = set()

    def prune(self):
        for channel in {channel for channel, _ in self.log}:
            self.pruned |= {number for name, number in self.log if name == channel} - {
                number for name, number in [each for each in self.log if each[0] == channel][-KEEP:]
            }

    def behind(self, place, channels):
        """Return what a stream on ``channels`` that has all up to ``place`` gets, and the channels on which it gets less."""
        missed = [(channel, number) for channel, number in self.log[place:] if channel in channels]
        gaps = {channel for channel, number in missed if number in self.pruned}
        return [number for _, number in missed if number not in self.pruned], gaps


class Stream:
    """One page: what it is due, what it got, and the place in the log up to which it is."""

    def __init__(self, channels):
        self.channels = channels
        self.path = "/events?" + "&".join(f"channel={channel}" for channel in channels)
        self.page = None
        self.last_event_id = None
        self.place = 0
        self.due = []


class Machine(RuleBasedStateMachine):
    """Three writers, three channels, four streams."""

    relay = server = url = publisher = None
    lost_at = 0.0

    def __init__(self):
        super().__init__()
        self.reference = Reference()
        self.pages = Pages()
        self.names = [f"model-{next(_numbers)}-{letter}" for letter in "abc"]
        self.writers = [psycopg2.connect(self.url) for _ in range(3)]
        self.pending = [[] for _ in self.writers]
        a, b, c = self.names
        self.streams = [Stream(channels) for channels in ((a,), (a,), (b, c), (a, b, c))]
        self.count = itertools.count()

    @rule(writer=st.integers(0, 2), channel=st.integers(0, 2), large=st.booleans())
    def publish(self, writer, channel, large):
        number = next(self.count)
        payload = json.dumps({"data": str(number), "comment": "x" * 9000 if large else ""})
        with self.writers[writer].cursor() as cursor:
            cursor.execute("SELECT sse_relay.publish(%s, %s, NULL)", (self.names[channel], payload))
        self.pending[writer].append((self.names[channel], number))

    @rule(writer=st.integers(0, 2))
    def commit(self, writer):
        self.writers[writer].commit()
        self.reference.log += self.pending[writer]
        self.pending[writer] = []

    @rule(writer=st.integers(0, 2))
    def roll_back(self, writer):
        self.writers[writer].rollback()
        self.pending[writer] = []

    @rule(which=st.integers(0, 3))
    def connect(self, which):
        stream = self.streams[which]
        if stream.page:
            return
        if stream.last_event_id is None:  # its page was rendered just now
            stream.last_event_id, stream.place = self.publisher.newest(), len(self.reference.log)
        headers = {"Last-Event-ID": stream.last_event_id}
        stream.due, gaps = self.reference.behind(stream.place, stream.channels)
        stream.place = len(self.reference.log)
        while stream.page is None:
            (page,) = self.pages.open(self.relay.port, [stream.path], headers)
            self.pages.until(lambda: page.body or page.closed, "the first bytes")
            if page.body.startswith(b": sse-relay-server"):
                stream.page = page  # or else it was told to come back
        if gaps:
            self.pages.until(lambda: stream.page.events, "an answer")
            first = stream.page.events.pop(0)
            assert (first.event, set(json.loads(first.data)["channels"])) == ("stream-reset", gaps)

    @rule(which=st.integers(0, 3))
    def drop(self, which):
        stream = self.streams[which]
        if stream.page:
            self.settle([stream])
            stream.last_event_id = stream.page.parser.last_event_id or stream.last_event_id
            self.pages.close(stream.page)
            stream.page = None

    @rule()
    def prune(self):
        self.settle()
        with psycopg2.connect(self.url) as connection, connection.cursor() as cursor:
            more = True
            while more:
                cursor.execute("SELECT sse_relay.prune(%s, 86400, 500)", (KEEP,))
                ((more,),) = cursor.fetchall()
        connection.close()
        self.reference.prune()

    @rule()
    def lose_the_broker(self):
        # Losses in quick succession are what the back-off makes the relay wait for.
        if time.monotonic() - Machine.lost_at > GOOD_SECONDS + 1:
            self.settle()
            end_listeners(self.server)
            Machine.lost_at = time.monotonic()

    @rule()
    def restart_the_workers(self):
        self.settle()
        reloads = self.relay.log.count(" reloaded")
        self.relay.signal(signal.SIGHUP)
        until(lambda: self.relay.log.count(" reloaded") > reloads, "reloaded")
        for stream in self.streams:
            if stream.page:
                self.pages.until(lambda stream=stream: stream.page.closed, "the old workers' streams end")
                stream.last_event_id = stream.page.parser.last_event_id or stream.last_event_id
                stream.page = None

    def settle(self, streams=None):
        """Wait until streams have what they are due, and no more."""
        for stream in streams or self.streams:
            if stream.page:
                due, _ = self.reference.behind(stream.place, stream.channels)
                stream.due += due
                stream.place = len(self.reference.log)
                try:
                    self.pages.until(lambda stream=stream: len(stream.page.events) >= len(stream.due), "what is due")
                except AssertionError as exc:
                    raise AssertionError(f"{vars(stream)}, {vars(stream.page)}: {self.relay.log[-5000:]}") from exc
                assert [event.data for event in stream.page.events] == [str(number) for number in stream.due]

    def teardown(self):
        try:
            self.settle()
        finally:
            for writer in self.writers:
                writer.close()
            self.pages.__exit__()


def test_streams_get_what_a_list_would_give_them(postgres_server, tmp_path):
    """Publish, commit, roll back, connect, drop, prune, lose the broker, restart the workers."""
    postgres_server.execute("CREATE DATABASE model")
    url = postgres_server.url.removesuffix("relay") + "model"
    assert run("init-db", cwd=tmp_path, DATABASE_URL=url).returncode == 0
    # Events are pruned by the test alone.
    flags = ("--workers", "2", "--history", "10000", "--heartbeat", "3600")
    with Relay(tmp_path, *flags, drain="0", DATABASE_URL=url) as relay:
        Machine.relay, Machine.server, Machine.url = relay, postgres_server, url
        Machine.publisher = open_publisher("postgres", url)
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=30,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            ),
        )
