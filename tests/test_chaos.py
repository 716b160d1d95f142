"""Overlapping random faults over relays and their broker: nothing is lost, doubled or out of order, and each gap is told."""

import json
import os
import random
import re
import time
from contextlib import ExitStack, contextmanager

import pytest
from chaos import Chaos, plan, read_until
from fleet import Fleet, Numbers
from outages import Proxy
from relay import run, troubles
from servers import PostgresServer, RedisServer
from storm import parts

# `make chaos` takes another seed each time, and more seconds; half of them are for each broker.
SEED = int(os.environ.get("SSE_RELAY_CHAOS_SEED", "17"))
SECONDS = float(os.environ.get("SSE_RELAY_CHAOS_SECONDS", "40"))
CHANNELS = [f"chaos-{number}" for number in range(8)]
RATE = 150.0
# Two relays with a history and two without, with these flags.
HISTORIES = ("1000000", "1000000", "0", "0")
FLAGS = [("--workers", "2", "--history", history) for history in HISTORIES]


@pytest.fixture(params=["postgres", "redis"])
def server(request, home, channel, tmp_path):
    """A broker of the test's own, which keeps a history over its restarts."""
    folder = home / f"chaos-{channel}"
    folder.mkdir(mode=0o755)
    made = PostgresServer(folder, log_statement="none") if request.param == "postgres" else None
    with made or RedisServer(folder, persistent=True) as server:
        if made:
            done = run("init-db", cwd=tmp_path, **server.environment)
            assert done.returncode == 0, done.stderr
        yield server


def paths(dice):
    """Four streams on each channel, two of them on another one as well."""
    for channel in CHANNELS:
        yield from [f"/events?channel={channel}"] * 2
        for _ in range(2):
            other = dice.choice([each for each in CHANNELS if each != channel])
            yield f"/events?channel={channel}&channel={other}"


def channels_of(stream):
    return [part.partition("=")[2] for part in stream.path.partition("?")[2].split("&")]


@contextmanager
def streaming(chaos, dice):
    """Yield two fleets, on the relays with a history and on those without; some connections go through proxies."""
    with ExitStack() as stack:
        for relays in (chaos.relays[:2], chaos.relays[2:]):
            proxies = [stack.enter_context(Proxy(relay.port)) for relay in relays]
            ports = [*(relay.port for relay in relays), *(proxy.port for proxy in proxies)]
            dice.shuffle(ports)
            chaos.fleets.append(stack.enter_context(Fleet(list(paths(dice)), *ports)))
            chaos.proxies += proxies
        yield chaos.fleets


def history_of(broker):
    """Return the events that the broker keeps, by channel and in their order over all channels."""
    if broker.kind == "postgres":
        query = "SELECT channel, payload::jsonb ->> 'data' FROM sse_relay.event ORDER BY id"
        return broker.execute(query)
    found = []
    for channel in CHANNELS:
        for number, fields in broker.client.xrange(f"{broker.tag}:events:{channel}"):
            found.append((int(number.partition(b"-")[0]), channel, json.loads(fields[b"payload"])["data"]))
    return [(channel, data) for _, channel, data in sorted(found)]


def untold(stream, sent):
    """Return what of ``sent``, by channel, the stream has neither got nor been told of by a reset for that channel."""
    at = {data: place for place, data in enumerate(stream.got)}
    missing = []
    for channel, events in sent.items():
        told = [
            place for place, reset in zip(stream.reset_at, stream.resets, strict=True) if channel in reset["channels"]
        ]
        # A reset tells of what lies between the events before and behind it.
        before, waiting = 0, []
        for data in events:
            if data not in at:
                waiting.append(data)
                continue
            if waiting and not any(before <= place <= at[data] for place in told):
                missing += waiting
            before, waiting = at[data] + 1, []
        assert not waiting, "the last event of each channel is waited for"
    return missing


def test_nothing_is_lost_in_chaos(server, tmp_path):
    """With a history each event comes once, in order over all channels, without a reset; without one each gap is told."""
    print(f"To repeat this: make chaos SEED={SEED} SECONDS={SECONDS:g}")
    dice = random.Random(SEED)
    with Chaos(server, tmp_path, FLAGS) as chaos, streaming(chaos, dice) as (kept, live):
        fleets = (kept, live)
        numbers = Numbers(server, CHANNELS, 0, RATE)
        numbers.start()
        everybody = [*kept.streams, *live.streams]
        read_until(fleets, lambda: all(len(stream.got) > 2 for stream in everybody), "events come", 20)
        chaos.begin(plan(SEED, SECONDS / 2))
        read_until(fleets, chaos.done.is_set, "the faults end", SECONDS * 2 + 120)
        numbers.enough.set()
        read_until(fleets, lambda: not numbers.is_alive(), "all are published", 60)
        assert not chaos.errors, chaos.errors

        history = history_of(server)
        for channel in CHANNELS:
            own = [data for name, data in history if name == channel]
            assert set(numbers.taken[channel]) <= set(own), "an event that the broker took is not kept"
        due = {stream: [data for name, data in history if name in channels_of(stream)] for stream in everybody}

        def late():
            return [stream for stream in kept.streams if stream.got[-1:] != due[stream][-1:]]

        read_until(fleets, lambda: not late(), "the last event", 120, lambda: trouble(chaos, late()))
        for stream in kept.streams:
            assert stream.got == due[stream], difference(stream, due[stream])
            assert not stream.resets, (stream.path, stream.resets)
        ends = publish_the_ends(numbers, fleets, live.streams, chaos)
        rank = {data: place for place, (_, data) in enumerate(history)}
        for stream in live.streams:
            for part in parts(stream):
                places = [rank[data] for data in part if data not in ends.values()]
                assert places == sorted(set(places)), f"out of order or doubled: {stream.path}: {part}"
            sent = {name: [*numbers.taken[name], ends[name]] for name in channels_of(stream)}
            assert not (missing := untold(stream, sent)), (
                f"missed without a word: {stream.path}: {missing[:20]}; got {stream.got}, "
                f"resets {[*zip(stream.reset_at, stream.resets, strict=True)]}"
            )
    for relay in chaos.all_relays:
        assert not troubles(relay.log), relay.log
    print(f"{server.kind}: {len(history)} events, {sum(len(each.got) for each in everybody)} deliveries")
    print(f"{sum(each.connections for each in everybody)} connections, {numbers.unsure} events unsure")


def publish_the_ends(numbers, fleets, streams, chaos):
    """Publish a last event on each channel until all streams have had it, and return them by channel."""
    ends = {channel: f"end of {channel}" for channel in CHANNELS}
    taken = {channel: [*numbers.taken[channel]] for channel in CHANNELS}
    due = 0.0

    def unended():
        return [stream for stream in streams if any(ends[name] not in stream.got for name in channels_of(stream))]

    def ended():
        nonlocal due
        late = {name for stream in unended() for name in channels_of(stream) if ends[name] not in stream.got}
        if late and time.monotonic() > due:
            for channel in late:
                numbers.publish(channel, ends[channel])
            due = time.monotonic() + 2
        return not late

    read_until(fleets, ended, "the end", 120, lambda: trouble(chaos, unended()))
    numbers.taken = taken
    return ends


def trouble(chaos, late):
    """Return where the streams are that are late, and of what the relays have warned."""
    said = [f"{each.path} on port {each.page.port}: {each.page.status}, closed {each.page.closed}" for each in late]
    for relay in chaos.relays:
        warnings = [line for line in relay.log.splitlines() if not re.search(" (INFO|DEBUG) ", line)]
        said += [f"at port {relay.port}, with workers {relay.workers()}:", *warnings[-10:]]
    return "\n".join(said)


def difference(stream, due):
    """Return what is wrong with what a stream got."""
    got, wanted = set(stream.got), set(due)
    place = next((n for n, pair in enumerate(zip(stream.got, due, strict=False)) if len(set(pair)) > 1), None)
    return (
        f"{stream.path}: {stream.connections} connections, {len(stream.got)} of {len(due)}; "
        f"lost {[each for each in due if each not in got][:20]}; not published {sorted(got - wanted)[:20]}; "
        f"doubled {len(stream.got) - len(got)}; from {place} on: {stream.got[place or 0 :][:10]}, due {due[place or 0 :][:10]}"
    )
