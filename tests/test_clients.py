"""Streams read by clients that no one here wrote: httpx-sse, npm's eventsource, Chromium's EventSource."""

import json
import os
import queue
import signal
import subprocess
import threading
from contextlib import contextmanager

import httpx
import pytest
import requests
from httpx_sse import connect_sse
from outages import Proxy
from programs import program
from relay import Relay
from servers import PATIENCE, until

from tornado_relay.visit import NO_HISTORY

EVENTS = [
    {"event": "NEW_NOTIFICATION", "id": 1, "data": {"message": "A new notification"}},
    {"data": 'two\nlines, it\'s 🎉 "quoted"'},
    {"event": "NEW_NOTIFICATION", "id": "ü-2", "data": " blanks stay "},
    {"data": "\u2028 and \x0b end no line"},
]
RECEIVED = [
    ["NEW_NOTIFICATION", '{"message":"A new notification"}', "1"],
    ["message", 'two\nlines, it\'s 🎉 "quoted"', "1"],
    ["NEW_NOTIFICATION", " blanks stay ", "ü-2"],
    ["message", "\u2028 and \x0b end no line", "ü-2"],
]


def publish(broker, channel):
    from tornado_relay.events import serialize
    from tornado_relay.publish import open_publisher

    publisher = open_publisher(broker.kind, broker.url)
    for event in EVENTS:
        publisher.publish(channel, serialize(event))
    publisher.close()


def test_httpx_sse(relay, broker, channel):
    """Python's httpx-sse."""
    with httpx.Client() as client, connect_sse(client, "GET", f"{relay.url}/channel={channel}") as source:
        publish(broker, channel)
        events = source.iter_sse()
        assert next(events).event == "stream-open"
        got = [next(events) for _ in EVENTS]
    assert [[event.event, event.data, event.id] for event in got] == RECEIVED


def heartbeats(pages, relay):
    """Wait until every stream of the relay's one worker has had two heartbeats."""
    (page,) = pages.open(relay.port, ["/channel=quiet"])
    pages.until(lambda: page.body.count(b"\n:\n:\n:\n"), "three heartbeats")


@pytest.mark.parametrize("history", ["0", "100"])
def test_httpx_sse_gets_no_event_from_a_heartbeat(kept, channel, tmp_path, pages, history):
    """It makes an event of every block that ends, even without data; a comment line ends none."""
    environment = kept.environment | {"RELAY_HISTORY": history}
    with (
        Relay(tmp_path, "--workers", "1", "--heartbeat", "1", **environment) as relay,
        httpx.Client() as client,
        connect_sse(client, "GET", f"{relay.url}/channel={channel}") as source,
    ):
        events = source.iter_sse()
        assert next(events).event == "stream-open"
        heartbeats(pages, relay)
        kept.publish(channel, "hello")
        event = next(events)
        assert (event.event, event.data) == ("message", "hello")
        kept.publish(f"{channel}-2", "elsewhere")
        heartbeats(pages, relay)
        kept.publish(channel, "bye")
        # With a history the position has moved; without one nothing has.
        moved = [json.loads(next(events).data)["id"]] if history != "0" else []
        event = next(events)
        assert (event.event, event.data) == ("message", "bye")
        if moved:
            assert kept.publisher.newest() == event.id != moved[0]


def test_requests(relay, broker, channel):
    """Python's requests, which buffers what does not come in chunks; each event is there before the next is sent."""
    answer = requests.get(f"{relay.url}/channel={channel}", stream=True, timeout=30)
    lines = answer.iter_lines()
    assert next(line for line in lines if line.startswith(b"data:")) == b'data: {"id":"none","resumed":false}'
    for number in range(3):
        broker.publish(channel, str(number))
        assert next(line for line in lines if line.startswith(b"data:")) == b"data: %d" % number
    answer.close()


@contextmanager
def node_client(folder, package, code, url):
    """Run ``code``, which prints lines of JSON, and yield a function that returns the next of them."""
    node, npm = program("node"), program("npm")
    subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", package], cwd=folder, check=True, timeout=180
    )
    (folder / "client.mjs").write_text(code)
    client = subprocess.Popen([node, "client.mjs", url], cwd=folder, stdout=subprocess.PIPE, text=True)
    lines = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in client.stdout])
    reader.start()
    try:
        yield lambda: json.loads(lines.get(timeout=3 * PATIENCE))
    finally:
        client.kill()
        reader.join()
        client.communicate()


NPM_EVENTSOURCE = """
    import { EventSource } from 'eventsource'
    const source = new EventSource(process.argv[2])
    const show = e => console.log(JSON.stringify([e.type, e.data, e.lastEventId]))
    source.onopen = () => console.log('"open"')
    source.onmessage = show
    for (const type of ['NEW_NOTIFICATION', 'stream-open', 'stream-reset']) source.addEventListener(type, show)
"""


def test_npm_eventsource(relay, broker, channel, tmp_path):
    """Node's eventsource package, which also reconnects as the standard says."""
    with node_client(tmp_path, "eventsource@4", NPM_EVENTSOURCE, f"{relay.url}/channel={channel}") as line:
        assert line() == "open"
        assert line() == ["stream-open", '{"id":"none","resumed":false}', NO_HISTORY]
        publish(broker, channel)
        # The package leaves lastEventId of an event without an id of its own empty, where the standard keeps the last.
        own_ids = [[*received[:2], str(event.get("id", ""))] for event, received in zip(EVENTS, RECEIVED, strict=True)]
        assert [line() for _ in EVENTS] == own_ids
        for worker in relay.workers():
            os.kill(worker, signal.SIGKILL)
        assert line() == "open"
        assert line()[:2] == [
            "stream-reset",
            json.dumps({"reason": "unknown-id", "channels": [channel]}, separators=(",", ":")),
        ]


@pytest.mark.parametrize("history", ["0", "100"])
def test_npm_eventsource_on_a_quiet_channel(kept, channel, tmp_path, history):
    """It has had no event before the cut. It gets what it has missed, or it gets a reset."""
    with (
        Relay(tmp_path, "--workers", "1", **kept.environment | {"RELAY_HISTORY": history}) as relay,
        node_client(tmp_path, "eventsource@4", NPM_EVENTSOURCE, f"{relay.url}/channel={channel}") as line,
    ):
        assert line() == "open"
        began = line()
        for worker in relay.workers():
            os.kill(worker, signal.SIGKILL)
        kept.publish(channel, "while it was away")
        assert line() == "open"
        if history == "0":
            assert line()[0] == "stream-reset"
            assert line() == began
        else:
            assert line() == ["stream-open", began[1].replace("false", "true"), began[2]]
            assert line()[:2] == ["message", "while it was away"]


FETCH_EVENT_SOURCE = """
    import library from '@microsoft/fetch-event-source'
    globalThis.window = globalThis
    const show = what => console.log(JSON.stringify(what))
    library.fetchEventSource(process.argv[2], {
        fetch, openWhenHidden: true,
        onmessage: ({ event, data, id }) => show([event, data, id]),
    })
"""


def test_fetch_event_source_gets_no_message_from_a_heartbeat(kept, channel, tmp_path, pages):
    """It calls onmessage for every blank line; each call has data."""
    with (
        Relay(tmp_path, "--workers", "1", "--heartbeat", "1", **kept.environment) as relay,
        node_client(
            tmp_path, "@microsoft/fetch-event-source@2", FETCH_EVENT_SOURCE, f"{relay.url}/channel={channel}"
        ) as line,
    ):
        assert line()[0] == "stream-open"
        heartbeats(pages, relay)
        for worker in relay.workers():
            os.kill(worker, signal.SIGKILL)
        kept.publish(channel, "while it was away")
        assert json.loads(line()[1])["resumed"]
        assert line()[:2] == ["", "while it was away"]
        heartbeats(pages, relay)
        kept.publish(channel, "hello")
        while (received := line())[0] == "stream-position":
            assert json.loads(received[1])["id"] == received[2]
        assert received[:2] == ["", "hello"]


PAGE = """<!doctype html><meta charset="utf-8"><script>
  const source = new EventSource(decodeURIComponent(location.hash.slice(1)), { withCredentials: true })
  let queue = Promise.resolve()
  const report = what => { queue = queue.then(() => fetch('/report', { method: 'POST', body: JSON.stringify(what) })) }
  const show = e => report([e.type, e.data, e.lastEventId])
  source.onopen = () => report('open')
  source.onerror = () => report(source.readyState === EventSource.CLOSED ? 'closed for good' : 'reconnecting')
  source.onmessage = show
  for (const type of ['NEW_NOTIFICATION', 'stream-reset']) source.addEventListener(type, show)
</script>"""


@pytest.fixture
def site(site):
    site.page = PAGE
    return site


@pytest.mark.parametrize("compression", ["off", "gzip"])
def test_chromium(broker, channel, tmp_path, site, browse, compression):
    """A page of another origin, with credentials: events, a killed worker, and the events after it."""
    flags = ("--workers", "2", "--allowed-origins", site.url, "--compression", compression)
    with Relay(tmp_path, *flags, **broker.environment) as relay:
        browse(f"{site.url}/#{relay.url}/channel={channel}")
        until(lambda: site.reports, "the page is connected", seconds=40)
        assert site.reports == ["open"]
        publish(broker, channel)
        until(lambda: len(site.reports) == 1 + len(EVENTS), "all events")
        assert site.reports[1:] == RECEIVED
        for worker in relay.workers():
            os.kill(worker, signal.SIGKILL)
        until(
            lambda: site.reports[-1][0] == "stream-reset",
            "the page is back, and told that it may have missed something",
        )
        assert site.reports[-3:-1] == ["reconnecting", "open"]
        broker.publish(channel, "again")
        until(lambda: site.reports[-1][1] == "again", "the next event")


def test_chromium_reads_compressed_streams(redis_server, channel, tmp_path, site, browse):
    """Unasked, live, and with a tenth of the bytes."""
    data = json.dumps([{"order": number, "customer": "Ann"} for number in range(1000)])
    with (
        Relay(tmp_path, "--workers", "1", "--allowed-origins", site.url, **redis_server.environment) as relay,
        Proxy(relay.port) as proxy,
    ):
        browse(f"{site.url}/#http://127.0.0.1:{proxy.port}/channel={channel}")
        until(lambda: site.reports, "the page is connected", seconds=40)
        before = proxy.forwarded
        for number in range(3):
            redis_server.publish(channel, json.dumps({"id": number, "data": data}))
            until(lambda number=number: len(site.reports) == 2 + number, "the event")
        assert site.reports[1:] == [["message", data, str(number)] for number in range(3)]
        assert 0 < proxy.forwarded - before < 3 * len(data) / 5


def test_chromium_misses_nothing(kept, channel, tmp_path, site, browse):
    """With a history: what is published while the page has no connection, behind an id of ours and one of its own."""
    with Relay(tmp_path, "--workers", "2", "--allowed-origins", site.url, **kept.environment) as relay:
        browse(f"{site.url}/#{relay.url}/channel={channel}")
        until(lambda: site.reports, "the page is connected", seconds=40)
        for number, fields in enumerate(({}, {"id": "own"})):
            kept.publish(channel, f"before {number}", **fields)
            until(lambda number=number: site.reports[-1][1] == f"before {number}", "the event")
            for worker in relay.workers():
                os.kill(worker, signal.SIGKILL)
            until(lambda: site.reports[-1] == "reconnecting", "the connection is lost")
            kept.publish(channel, f"meanwhile {number}", "and again")
            until(lambda: site.reports[-1][1] == "and again", "what it missed")
            assert site.reports[-3] == "open"
            assert site.reports[-2][1] == f"meanwhile {number}"
        assert not any("stream-reset" in report for report in site.reports)


def test_chromium_page_of_another_origin_is_refused_for_good(redis_server, channel, tmp_path, site, browse):
    """It sees no event, and does not come back."""
    with Relay(
        tmp_path, "--workers", "1", "--allowed-origins", "https://shop.example", **redis_server.environment
    ) as relay:
        browse(f"{site.url}/#{relay.url}/channel={channel}")
        until(lambda: site.reports, "the page is refused", seconds=40)
        assert site.reports == ["closed for good"]
        assert "stream opened" not in relay.log


def test_chromium_outlives_a_broker_that_is_away(home, channel, tmp_path, site, browse):
    """A page that connects while the broker is down keeps trying, which it would not after a 503."""
    from servers import RedisServer

    folder = home / f"away-{channel}"
    folder.mkdir()
    server = RedisServer(folder)
    server.stop()
    with Relay(tmp_path, "--workers", "1", "--allowed-origins", site.url, **server.environment) as relay:
        browse(f"{site.url}/#{relay.url}/channel={channel}")
        until(lambda: "reconnecting" in site.reports, "the page tries again", seconds=40)
        server.start()
        try:
            until(lambda: f"stream opened: 127.0.0.1 on {channel}" in relay.log, "the page has its stream", seconds=30)
            server.publish(channel, "hello")
            until(lambda: ["message", "hello", NO_HISTORY] in site.reports, "the event")
            assert "closed for good" not in site.reports
        finally:
            server.stop()
