"""Streams read by clients that no one here wrote: httpx-sse, npm's eventsource, Chromium's EventSource."""

import json
import os
import signal
import subprocess

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
        # httpx-sse makes an event of the opening retry field, where the standard fires none.
        events = (event for event in source.iter_sse() if event.data)
        got = [next(events) for _ in EVENTS]
    assert [[event.event, event.data, event.id] for event in got] == RECEIVED


def test_requests(relay, broker, channel):
    """Python's requests, which buffers what does not come in chunks; each event is there before the next is sent."""
    answer = requests.get(f"{relay.url}/channel={channel}", stream=True, timeout=PATIENCE)
    lines = answer.iter_lines()
    for number in range(3):
        broker.publish(channel, str(number))
        assert next(line for line in lines if line.startswith(b"data:")) == b"data: %d" % number
    answer.close()


def test_npm_eventsource(relay, broker, channel, tmp_path):
    """Node's eventsource package, which also reconnects as the standard says."""
    node, npm = program("node"), program("npm")
    subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "eventsource@4"],
        cwd=tmp_path,
        check=True,
        timeout=PATIENCE * 9,
    )
    (tmp_path / "client.mjs").write_text(
        """
        import { EventSource } from 'eventsource'
        const source = new EventSource(process.argv[2])
        const show = e => console.log(JSON.stringify([e.type, e.data, e.lastEventId]))
        source.onopen = () => console.log('"open"')
        source.onmessage = show
        source.addEventListener('NEW_NOTIFICATION', show)
        """
    )
    client = subprocess.Popen(
        [node, "client.mjs", f"{relay.url}/channel={channel}"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert json.loads(client.stdout.readline()) == "open"
        publish(broker, channel)
        # The package leaves lastEventId of an event without an id of its own empty, where the standard keeps the last.
        own_ids = [[*received[:2], str(event.get("id", ""))] for event, received in zip(EVENTS, RECEIVED, strict=True)]
        assert [json.loads(client.stdout.readline()) for _ in EVENTS] == own_ids
        for worker in relay.workers():
            os.kill(worker, signal.SIGKILL)
        assert json.loads(client.stdout.readline()) == "open"
    finally:
        client.kill()
        client.communicate()


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
