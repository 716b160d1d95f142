"""Many streams that reconnect as browsers do, and a publisher that numbers its events, for tests of losses."""

import heapq
import itertools
import json
import random
import selectors
import threading
import time

from pages import Page
from servers import patience

from tornado_relay.errors import BrokerError
from tornado_relay.publish import open_publisher

# Events that only tell a page where it is.
POSITIONS = ("stream-open", "stream-position")
# Browsers wait for the seconds of `retry:`; coming back sooner is harder on the relay, and shorter for the test.
RECONNECT = (0.05, 0.4)


class Stream:
    """What one page got, over all its connections."""

    def __init__(self, path, ports):
        self.path = path
        self.ports = itertools.cycle(ports)
        self.page = None
        self.got = []
        self.resets = []
        # How many events it had at each of them.
        self.reset_at = []
        self.connections = 0
        self.last_event_id = ""

    def connect(self):
        headers = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        self.page = Page(next(self.ports), self.path, headers)

    def take(self):
        """Take in what its connection has brought."""
        was_open = self.page.status is not None
        self.page.read()
        if self.page.status is not None and not was_open:
            self.connections += 1
        events, self.page.events = self.page.events, []
        for event in events:
            if event.event == "stream-reset":
                self.resets.append(json.loads(event.data))
                self.reset_at.append(len(self.got))
            elif event.event not in POSITIONS:
                self.got.append(event.data)
        self.last_event_id = self.page.parser.last_event_id or self.last_event_id

    def untold(self, sent):
        """What of ``sent`` it has not got and was not told of: by a reset behind what was before it."""
        places = {data: place for place, data in enumerate(self.got)}
        told, missing, place = set(self.reset_at), [], 0
        for data in sent:
            if data in places:
                place = places[data] + 1
            elif place not in told:
                missing.append(data)
        return missing


class Fleet:
    """Streams on one thread; ``with`` closes them."""

    def __init__(self, paths, *ports):
        self.selector = selectors.DefaultSelector()
        self.streams = [Stream(path, ports) for path in paths]
        self.due = [(0.0, number) for number in range(len(self.streams))]
        self.until(lambda: all(stream.connections for stream in self.streams), "all streams are open")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in self.streams:
            if stream.page:
                stream.page.close()
        self.selector.close()

    def step(self, timeout=0.02):
        """Reconnect who is due, and read what is there."""
        while self.due and self.due[0][0] <= time.monotonic():
            _, number = heapq.heappop(self.due)
            stream = self.streams[number]
            try:
                stream.connect()
            except OSError:
                self.later(number)
            else:
                self.selector.register(stream.page, selectors.EVENT_READ, number)
        for key, _ in self.selector.select(timeout):
            stream = self.streams[key.data]
            fileno = key.fd
            stream.take()
            if stream.page.closed:
                self.selector.unregister(fileno)
                self.later(key.data)

    def later(self, number):
        heapq.heappush(self.due, (time.monotonic() + random.uniform(*RECONNECT), number))

    def until(self, condition, what, seconds=60.0):
        end = time.monotonic() + patience(seconds)
        while not condition():
            assert time.monotonic() < end, f"not within {patience(seconds)} s: {what}"
            self.step()


class Numbers(threading.Thread):
    """Publishes numbered events to channels in turn, at least ``count`` and until told to stop, from ``first`` on."""

    def __init__(self, broker, channels, count, rate=1500.0, first=0):
        super().__init__(daemon=True)
        self.publisher = open_publisher(broker.kind, broker.url)
        self.channels = channels
        self.count = count
        self.first = first
        self.pause = 1 / rate
        self.enough = threading.Event()
        # The numbers of each channel that the broker has taken, and those of which that is not known.
        self.taken = {channel: [] for channel in channels}
        self.unsure = 0

    def run(self):
        for number in itertools.count():
            if number >= self.count and self.enough.is_set():
                break
            channel, text = self.channels[number % len(self.channels)], str(self.first + number)
            if not self.publish(channel, text):
                time.sleep(0.02)
            time.sleep(self.pause)
        self.publisher.close()

    def publish(self, channel, data):
        """Return whether the broker has taken it."""
        try:
            self.publisher.publish(channel, json.dumps({"data": data}))
        except BrokerError:
            self.unsure += 1
            return False
        self.taken[channel].append(data)
        return True
