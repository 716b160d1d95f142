"""A drill: numbered events while a broker's servers take over from each other, and what streams got of them."""

import threading
import time
from contextlib import ExitStack

from fleet import Fleet, Numbers
from relay import Relay

EVENTS = 5000
CHANNELS = [f"channel-{number}" for number in range(20)]

# A program of a Django project, for a channel.
NOTIFY = """
import django
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
django.setup()
from django.db import transaction
from tornado_relay import notify
with transaction.atomic():
    notify(%r, {"data": "committed"})
"""


def drill(broker, tmp_path, disturb):
    """
    Publish at least 5,000 events while ``disturb()`` does its worst, to 60 streams with a history and 60 without.

    Returns what those with a history lack of what the broker has taken, and all streams. Events come in order and once,
    and what is missing is told in its place.
    """
    with ExitStack() as stack:
        relays = [
            stack.enter_context(Relay(tmp_path, "--workers", "2", "--history", history, **broker.environment))
            for history in ("100000", "0")
        ]
        paths = [f"/channel={channel}" for channel in CHANNELS for _ in range(3)]
        kept, live = fleets = [stack.enter_context(Fleet(paths, relay.port)) for relay in relays]
        numbers = Numbers(broker, CHANNELS, EVENTS)
        done = threading.Event()
        errors = []

        def work():
            try:
                disturb()
            except BaseException as exc:
                errors.append(exc)
            finally:
                done.set()

        threading.Thread(target=work, daemon=True).start()
        numbers.start()

        def step(condition, what, seconds=60):
            end = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < end, f"{what}: {[relay.log[-3000:] for relay in relays]}"
                for fleet in fleets:
                    fleet.step(0.01)

        step(done.is_set, "the disturbance ends")
        assert not errors, errors
        numbers.enough.set()
        step(lambda: not numbers.is_alive(), "all are published")
        streams = [*kept.streams, *live.streams]
        for channel in CHANNELS:
            numbers.publish(channel, "end")
        step(lambda: all(stream.got[-1:] == ["end"] for stream in streams), "the end")
        for stream in streams:
            got = list(map(int, stream.got[:-1]))
            assert got == sorted(set(got)), f"out of order or doubled: {stream.path}"
            taken = numbers.taken[stream.path.removeprefix("/channel=")]
            assert not stream.untold(taken), f"{stream.path}: missed without a word: {stream.untold(taken)[:20]}"
        lacking = sum(
            len({*numbers.taken[stream.path.removeprefix("/channel=")]} - {*stream.got}) for stream in kept.streams
        )
        print(f"{sum(map(len, numbers.taken.values()))} taken, {numbers.unsure} unsure")
        return lacking, kept.streams, live.streams
