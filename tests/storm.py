"""Numbered events while something disturbs relays and brokers, and what streams got of them."""

import json
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import pairwise

from fleet import Fleet, Numbers
from relay import Relay
from servers import patience, until

EVENTS = 5000
CHANNELS = [f"channel-{number}" for number in range(20)]
END = "end"


@contextmanager
def two_relays(tmp_path, environment, histories=("100000", "0")):
    """One with a history, and one without."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(Relay(tmp_path, "--workers", "2", "--history", history, **environment))
            for history in histories
        ]


@contextmanager
def storming(broker, relays, disturb, each, ports=None, rate=1500.0):
    """
    Publish at least 5,000 events, so many a second, while ``disturb(relays, fleets)`` does its worst.

    ``each`` is how many streams there are on every channel with a history, and how many without; ``ports`` where they
    connect, if not to two relays. Yields the two fleets, the publisher, and what reads on until a condition holds.
    """
    with ExitStack() as stack:
        fleets = [
            stack.enter_context(Fleet([f"/channel={channel}" for channel in CHANNELS for _ in range(number)], port))
            for number, port in zip(each, ports or [relay.port for relay in relays], strict=True)
        ]
        numbers = Numbers(broker, CHANNELS, EVENTS, rate)
        done = threading.Event()
        errors = []

        def work():
            try:
                until(lambda: min(map(len, numbers.taken.values())) > 10, "events are under way")
                disturb(relays, fleets)
            except BaseException as exc:
                errors.append(exc)
            finally:
                done.set()

        numbers.start()
        threading.Thread(target=work, daemon=True).start()

        def step(condition, what, seconds):
            end = time.monotonic() + patience(seconds)
            while not condition():
                assert time.monotonic() < end, f"{what}: {[relay.log[-3000:] for relay in relays]}"
                for fleet in fleets:
                    fleet.step(0.01)

        step(done.is_set, "the disturbance ends", 120)
        numbers.enough.set()
        step(lambda: not numbers.is_alive(), "all are published", 60)
        assert not errors, errors
        yield fleets, numbers, step


def storm(broker, tmp_path, disturb, *, untouched=None, environment=None):
    """
    Let `compare` look at 200 streams with a history and 200 without.

    ``untouched`` says of a stream without history whether it could miss anything at all.
    """
    with (
        two_relays(tmp_path, environment or broker.environment) as relays,
        storming(broker, relays, disturb, (10, 10)) as (fleets, numbers, step),
    ):
        compare(broker, fleets, numbers, step, untouched)
        return fleets


def compare(broker, fleets, numbers, step, untouched=None):
    """Hold what streams got against what the broker keeps."""
    truth = {channel: kept_events(broker, channel) for channel in CHANNELS}
    for channel in CHANNELS:
        assert is_part(numbers.taken[channel], truth[channel]), "an event that the broker took is not kept"
    with_history, without = (
        [(stream, truth[stream.path.removeprefix("/channel=")]) for stream in fleet.streams] for fleet in fleets
    )
    step(lambda: all(stream.got[-1:] == kept[-1:] for stream, kept in with_history), "the last event", 60)
    for stream, kept in with_history:
        assert stream.got == kept, difference(stream, kept)
        assert not stream.resets
    publish_the_end(numbers, fleets, step)
    for stream, kept in without:
        assert all(is_part(part, kept) for part in parts(stream)), f"out of order: {difference(stream, kept)}"
        assert stream.resets or stream.got == kept, f"missed without a word: {difference(stream, kept)}"
        if untouched and untouched(stream):
            assert (stream.resets, stream.got) == ([], kept)


def drill(broker, tmp_path, disturb):
    """
    Hold 60 streams with a history and 60 without to this: events come in order and once, what is missing is told in its place.

    Returns how many those with a history lack of what the broker has taken, and both fleets' streams.
    """
    with (
        two_relays(tmp_path, broker.environment) as relays,
        storming(broker, relays, lambda *_: disturb(), (3, 3)) as (fleets, numbers, step),
    ):
        kept, live = (fleet.streams for fleet in fleets)
        taken = {stream: [*numbers.taken[stream.path.removeprefix("/channel=")]] for stream in [*kept, *live]}
        publish_the_end(numbers, fleets, step)
        hold_to_the_order(taken, kept)
        print(f"{sum(map(len, numbers.taken.values()))} taken, {numbers.unsure} unsure")
        return sum(len({*taken[stream]} - {*stream.got}) for stream in kept), kept, live


def drill_live(broker, tmp_path, disturb):
    """The same with no history at all, as events then travel in another way on a Cluster; returns all streams."""
    with (
        two_relays(tmp_path, broker.environment, ("0", "0")) as relays,
        storming(broker, relays, lambda *_: disturb(), (3, 3)) as (fleets, numbers, step),
    ):
        streams = [stream for fleet in fleets for stream in fleet.streams]
        taken = {stream: [*numbers.taken[stream.path.removeprefix("/channel=")]] for stream in streams}
        publish_the_end(numbers, fleets, step)
        hold_to_the_order(taken, ())
        return streams


def hold_to_the_order(taken, kept):
    """What streams got came in order and once, up to resets where they are not ``kept``, and what is missing was told."""
    for stream, sent in taken.items():
        for part in [stream.got] if stream in kept else parts(stream):
            got = list(map(int, part))
            assert got == sorted(set(got)), f"out of order or doubled: {stream.path}"
        assert not stream.untold(sent), f"{stream.path}: missed without a word: {stream.untold(sent)[:20]}"


def publish_the_end(numbers, fleets, step):
    """Publish an event until all have had it: without a history one that is just coming back has not."""
    streams = [stream for fleet in fleets for stream in fleet.streams]
    due = 0.0

    def ended():
        nonlocal due
        late = {stream.path.removeprefix("/channel=") for stream in streams if stream.got[-1:] != [END]}
        if late and time.monotonic() > due:
            assert all(numbers.publish(channel, END) for channel in late)
            due = time.monotonic() + 2
        return not late

    step(ended, "the end", 60)
    for stream in streams:
        stream.got = stream.got[: stream.got.index(END)]


def parts(stream):
    """What it got at each worker, without a history: the one that it comes back to may be a moment behind the one before."""
    returns = [at for at, reset in zip(stream.reset_at, stream.resets, strict=True) if reset["reason"] == "unknown-id"]
    return [stream.got[first:last] for first, last in pairwise([0, *returns, len(stream.got)])]


def kept_events(broker, channel):
    if broker.kind == "postgres":
        rows = broker.execute(
            "SELECT payload::jsonb ->> 'data' FROM sse_relay.event WHERE channel = %s ORDER BY id", channel
        )
        return [data for (data,) in rows]
    found = broker.client.xrange(f"{broker.tag}:events:{channel}")
    return [json.loads(fields[b"payload"])["data"] for _, fields in found]


def is_part(some, whole):
    """Whether ``some`` are in ``whole``, in its order, each once."""
    rest = iter(whole)
    return all(item in rest for item in some)


def difference(stream, kept):
    lost = [item for item in kept if item not in set(stream.got)]
    return f"{stream.path}: {stream.connections} connections, {len(stream.got)} of {len(kept)}, lost {lost[:20]}"
