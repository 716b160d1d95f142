"""Numbered events while something disturbs relays and brokers, and what streams got of them."""

import json
import threading
import time
from contextlib import ExitStack, contextmanager

from fleet import Fleet, Numbers
from relay import Relay

EVENTS = 5000
CHANNELS = [f"channel-{number}" for number in range(20)]


@contextmanager
def storming(broker, tmp_path, disturb, each, environment=None):
    """
    Publish at least 5,000 events while ``disturb(relays, fleets)`` does its worst.

    There are two relays, one with a history and one without, and ``each`` streams on every channel of both. Yields
    the two fleets, the publisher, and what reads on until a condition holds.
    """
    with ExitStack() as stack:
        relays = [
            stack.enter_context(
                Relay(tmp_path, "--workers", "2", "--history", history, **(environment or broker.environment))
            )
            for history in ("100000", "0")
        ]
        ports = [relay.port for relay in relays]
        paths = [f"/channel={channel}" for channel in CHANNELS for _ in range(each)]
        fleets = [stack.enter_context(Fleet(paths, port)) for port in ports]
        numbers = Numbers(broker, CHANNELS, EVENTS)
        done = threading.Event()
        errors = []

        def work():
            try:
                disturb(relays, fleets)
            except BaseException as exc:
                errors.append(exc)
            finally:
                done.set()

        numbers.start()
        threading.Thread(target=work, daemon=True).start()

        def step(condition, what, seconds):
            end = time.monotonic() + seconds
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
    Compare what 200 streams with history and 200 without got with what the broker keeps.

    ``untouched`` says of a stream without history whether it could miss anything at all.
    """
    with storming(broker, tmp_path, disturb, 10, environment) as (fleets, numbers, step):
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
        for channel in CHANNELS:
            broker.publish(channel, "end")
        step(lambda: all(stream.got[-1:] == ["end"] for stream, _ in without), "the end", 60)
        for stream, kept in without:
            got = stream.got[:-1]
            assert is_part(got, kept), f"out of order or doubled: {difference(stream, kept)}"
            assert stream.resets or got == kept, f"missed without a word: {difference(stream, kept)}"
            if untouched and untouched(stream):
                assert (stream.resets, got) == ([], kept)
        return fleets


def drill(broker, tmp_path, disturb):
    """
    Hold 60 streams with a history and 60 without to this: events come in order and once, what is missing is told in its place.

    Returns how many those with a history lack of what the broker has taken, and both fleets' streams.
    """
    with storming(broker, tmp_path, lambda *_: disturb(), 3) as (fleets, numbers, step):
        kept, live = (fleet.streams for fleet in fleets)
        for channel in CHANNELS:
            numbers.publish(channel, "end")
        step(lambda: all(stream.got[-1:] == ["end"] for stream in [*kept, *live]), "the end", 60)
        taken = {stream: numbers.taken[stream.path.removeprefix("/channel=")] for stream in [*kept, *live]}
        for stream, sent in taken.items():
            got = list(map(int, stream.got[:-1]))
            assert got == sorted(set(got)), f"out of order or doubled: {stream.path}"
            assert not stream.untold(sent), f"{stream.path}: missed without a word: {stream.untold(sent)[:20]}"
        print(f"{sum(map(len, numbers.taken.values()))} taken, {numbers.unsure} unsure")
        return sum(len({*taken[stream]} - {*stream.got}) for stream in kept), kept, live


def kept_events(broker, channel):
    if broker.kind == "postgres":
        rows = broker.execute(
            "SELECT payload::jsonb ->> 'data' FROM sse_relay.event WHERE channel = %s ORDER BY id", channel
        )
        return [data for (data,) in rows]
    found = broker.client.xrange(f"sse-relay:events:{channel}")
    return [json.loads(fields[b"payload"])["data"] for _, fields in found]


def is_part(some, whole):
    """Whether ``some`` are in ``whole``, in its order, each once."""
    rest = iter(whole)
    return all(item in rest for item in some)


def difference(stream, kept):
    lost = [item for item in kept if item not in set(stream.got)]
    return f"{stream.path}: {stream.connections} connections, {len(stream.got)} of {len(kept)}, lost {lost[:20]}"
