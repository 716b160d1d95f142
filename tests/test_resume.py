"""Streams that come back: what they are given, and what they are told."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from outages import end_listeners
from pages import come_back, data_of, got, resets
from relay import COMMAND, Relay, environment, run
from servers import until

from tornado_relay.errors import PayloadTooLarge
from tornado_relay.publish import open_publisher


@pytest.fixture
def relay(kept, tmp_path):
    with Relay(tmp_path, "--workers", "2", **kept.environment) as running:
        yield running


def test_header_and_query(relay, kept, pages, channel):
    """Both say where a stream goes on; the header, which a browser sends when it reconnects, is the newer one."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    kept.publish(channel, "1", "2", "3")
    got(pages, page, "1", "2", "3")
    first, second = page.events[0].id, page.events[1].id
    got(pages, come_back(pages, relay, channel, first), "2", "3")
    for path in (f"/channel={channel}", f"/{channel}", f"/events?channel={channel}"):
        (by_query,) = pages.open(relay.port, [path + ("&" if "?" in path else "?") + f"last_event_id={second}"])
        got(pages, by_query, "3")
    (by_both,) = pages.open(relay.port, [f"/channel={channel}?last_event_id={first}"], {"Last-Event-ID": second})
    got(pages, by_both, "3")


def opened(pages, page):
    pages.until(lambda: page.positions, "the stream-open event")
    return page.positions[0].event, page.positions[0].id, json.loads(page.positions[0].data)


@pytest.mark.parametrize("name", ["last_event_id", "lastEventId", "lastEventID", "Last-Event-ID"])
def test_names_of_the_last_id_in_the_address(relay, kept, pages, channel, name):
    """Each name of a client library works, and is newer than the id with which the page began."""
    kept.publish(channel, "1", "2")
    first = kept.publisher.newest()
    kept.publish(channel, "3")
    for more in ("", "&last_event_id=", "&last_event_id=earliest", "&lastEventId=&Last-Event-ID="):
        if name not in more:
            (page,) = pages.open(relay.port, [f"/channel={channel}?{name}={first}{more}"])
            got(pages, page, "3")
    (page,) = pages.open(relay.port, [f"/channel={channel}?{name}=earliest"], {"Last-Event-ID": first})
    got(pages, page, "3")


def test_stream_open_tells_where_the_stream_begins(relay, kept, pages, channel):
    """A new stream begins at the newest position, and one that comes back at the id that it sent."""
    kept.publish(channel, "x", id="own ü")
    newest = kept.publisher.newest()
    (fresh,) = pages.open(relay.port, [f"/channel={channel}"])
    assert opened(pages, fresh) == ("stream-open", newest, {"id": newest, "resumed": False})
    for last in (newest, "own ü", "earliest"):
        back = come_back(pages, relay, channel, last)
        assert opened(pages, back) == ("stream-open", last, {"id": last, "resumed": True})
        pages.until(lambda back=back: back.parser.last_event_id == newest, "the place up to which it has everything")
        assert not resets(back)
    unknown = come_back(pages, relay, channel, "unknown")
    assert opened(pages, unknown) == ("stream-open", newest, {"id": newest, "resumed": False})
    assert unknown.body.index(b"stream-reset") < unknown.body.index(b"\nid: ")


def test_labels_of_what_was_missed(relay, kept, pages, channel):
    """They come with the history too: of each event its channel, and the number that its id has, also behind one of its own."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    kept.publish(channel, "1", id="own")
    kept.publish(f"{channel}-2", "2")
    path = f"/events?channel={channel}&channel={channel}-2&labels=1&last_event_id={page.parser.last_event_id}"
    (back,) = pages.open(relay.port, [path])
    got(pages, back, "1", "2")
    kept.publish(channel, "3")
    got(pages, back, "1", "2", "3")
    numbers = [int(number) for number in re.findall(rb"\nid: [0-9a-z]+-(\d+)\n", back.body)]
    first, second, third = sorted(dict.fromkeys(numbers))[-3:]
    labels = re.findall(rb"channel: (\S+)\nseq: (\d+)\n", back.body)
    names = [channel.encode(), f"{channel}-2".encode(), channel.encode()]
    assert labels == [(name, b"%d" % number) for name, number in zip(names, (first, second, third), strict=True)]


def test_earliest_is_all_that_is_kept(relay, kept, pages, channel):
    """For a page that has nothing yet."""
    kept.publish(channel, "1", "2")
    (page,) = pages.open(relay.port, [f"/channel={channel}?last_event_id=earliest"])
    got(pages, page, "1", "2")
    assert not resets(page)


def test_stream_that_had_no_event_yet_comes_back_to_its_beginning(relay, kept, pages, channel):
    """Its head says where it began, so what is published while it is away arrives, and what was before does not."""
    kept.publish(channel, "before")
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    assert not page.events
    pages.close(page)
    kept.publish(channel, "while it was away")
    got(pages, come_back(pages, relay, channel, page.parser.last_event_id), "while it was away")


def test_ids_of_the_publishers_own(relay, kept, pages, channel):
    """They are what the page sees, and resume as ours do; a browser that comes back sends the exact place."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    for own in ("a-1", "ü 2", 3):
        kept.publish(channel, f"data of {own}", id=own)
    got(pages, page, "data of a-1", "data of ü 2", "data of 3")
    assert [event.id for event in page.events] == ["a-1", "ü 2", "3"]
    got(pages, come_back(pages, relay, channel, "a-1"), "data of ü 2", "data of 3")
    got(pages, come_back(pages, relay, channel, "ü 2"), "data of 3")
    back = come_back(pages, relay, channel, page.parser.last_event_id)
    kept.publish(channel, "next")
    got(pages, back, "next")
    assert not resets(back)


def test_own_id_that_was_used_twice_is_unknown(relay, kept, pages, channel):
    """It could be either event, so the stream is told and not given a guess."""
    for data in ("first", "second"):
        kept.publish(channel, data, id="same")
    page = come_back(pages, relay, channel, "same")
    pages.until(lambda: page.events, "an answer")
    assert resets(page) == [{"reason": "unknown-id", "channels": [channel]}]
    assert not data_of(page)


def test_many_channels_with_one_id(relay, kept, pages, channel):
    """All that came behind the id, on any of them, in the order in which it was published."""
    names = [f"{channel}-{letter}" for letter in "abc"]
    path = "/events?" + "&".join(f"channel={name}" for name in names)
    (page,) = pages.open(relay.port, [path])
    numbers = [str(number) for number in range(2500)]
    for number in numbers:
        kept.publish(names[int(number) ** 2 % 7 % 3], number)
    got(pages, page, *numbers)
    (back,) = pages.open(relay.port, [path], {"Last-Event-ID": page.events[9].id})
    got(pages, back, *numbers[10:])
    (from_start,) = pages.open(relay.port, [path + "&last_event_id=earliest"])
    got(pages, from_start, *numbers)


@pytest.mark.parametrize(
    "last_event_id", ["nonsense", "none", "deadbeef-7", "-1", "deadbeef-99999999999999999999", "%00", "x" * 5000]
)
def test_unknown_id_is_said(relay, kept, pages, channel, last_event_id):
    """Never silence, and never the events of another time; the stream goes on live."""
    kept.publish(channel, "before")
    page = come_back(pages, relay, channel, last_event_id)
    pages.until(lambda: page.events, "an answer")
    assert resets(page) == [{"reason": "unknown-id", "channels": [channel]}]
    kept.publish(channel, "after")
    got(pages, page, "after")


def test_id_of_the_future_is_unknown(relay, kept, pages, channel):
    """A number that the broker has not drawn yet."""
    kept.publish(channel, "now")
    token, _, number = kept.publisher.newest().partition("-")
    page = come_back(pages, relay, channel, f"{token}-{int(number) + 10**15}")
    kept.publish(channel, "after")
    pages.until(lambda: "after" in page.data, "the event")
    assert resets(page) == [{"reason": "unknown-id", "channels": [channel]}]


def test_without_history_every_return_is_told(broker, tmp_path, pages, channel):
    """Whether an event had an id or not: nothing is silently lost."""
    with Relay(tmp_path, "--workers", "1", **broker.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        broker.publish(channel, "x")
        got(pages, page, "x")
        for last in (page.parser.last_event_id, "an-id-of-its-own", "earliest"):
            assert last
            back = come_back(pages, relay, channel, last)
            pages.until(lambda back=back: back.events, "an answer")
            assert resets(back) == [{"reason": "unknown-id", "channels": [channel]}]
        (fresh,) = pages.open(relay.port, [f"/channel={channel}"])
        broker.publish(channel, "y")
        got(pages, fresh, "y")


def test_pruned_id_is_said_with_its_channel_only(kept, tmp_path, pages, channel):
    """What is still kept comes behind it; a channel that lost nothing is not named."""
    busy, quiet = f"{channel}-busy", f"{channel}-quiet"
    path = f"/events?channel={busy}&channel={quiet}"
    with Relay(tmp_path, "--workers", "1", **kept.environment | {"RELAY_HISTORY": "5"}) as relay:
        until(lambda: "the history is at" in relay.log, "the history is set up")
        (page,) = pages.open(relay.port, [path])
        kept.publish(quiet, "q1")
        kept.publish(busy, "0")
        got(pages, page, "q1", "0")
        kept.publish(quiet, "q2")
        kept.publish(busy, *map(str, range(1, 20)))
        if kept.kind == "postgres":
            until(lambda: not kept.execute("SELECT sse_relay.prune(5, 86400, 500)")[0][0], "pruned")
        (back,) = pages.open(relay.port, [path], {"Last-Event-ID": page.events[-1].id})
        got(pages, back, "q2", *map(str, range(15, 20)))
        assert resets(back) == [{"reason": "pruned-id", "channels": [busy]}]
        assert back.events[0].event == "stream-reset"
        (exact,) = pages.open(relay.port, [path], {"Last-Event-ID": next(e.id for e in back.events if e.data == "15")})
        got(pages, exact, *map(str, range(16, 20)))
        assert not resets(exact)
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        until(lambda: "the history is at" in relay.log, "more is kept again")


def test_large_payloads(relay, kept, pages, channel):
    """Up to 1 MiB of JSON, live and from the history, in their place among the others; over it the error says so."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    sizes = [10, 7_900, 7_999, 8_100, 20, 1_048_576 - len('{"data":""}'), 30]
    sent = [chr(97 + number) * size for number, size in enumerate(sizes)]
    kept.publish(channel, *sent)
    got(pages, page, *sent)
    got(pages, come_back(pages, relay, channel, page.events[0].id), *sent[1:])
    with pytest.raises(PayloadTooLarge, match=r"1,048,577 bytes.* 1,048,576"):
        kept.publish(channel, "x" * (sizes[5] + 1))


def test_large_payload_is_read_once_for_all_streams(kept_postgres, tmp_path, pages, channel):
    """By each worker."""
    with Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay:
        opened = pages.open(relay.port, [f"/channel={channel}"] * 50)
        kept_postgres.publish(channel, "x" * 9000)
        pages.until(lambda: all(page.events for page in opened), "all have it")
        (seq,) = re.findall(r"-(\d+)", opened[0].events[0].id)
        reads = f"SELECT id, payload FROM sse_relay.event WHERE id = ANY(ARRAY[{seq}])"
        assert kept_postgres.server.log.count(reads) == 1


def test_payload_that_cannot_be_read_is_said(kept_postgres, tmp_path, pages, channel):
    """A reference whose row has gone."""
    with Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        kept_postgres.execute(
            "WITH lost AS (SELECT * FROM sse_relay.head())"
            " SELECT pg_notify(%s, chr(30) || token || '-' || nextval('sse_relay.event_id') || chr(30)) FROM lost",
            channel,
        )
        kept_postgres.publish(channel, "next")
        got(pages, page, "next")
        assert resets(page) == [{"reason": "unreadable-payload", "channels": [channel]}]


def test_events_that_no_history_keeps_are_said(kept, tmp_path, pages, channel):
    """NOTIFY and PUBLISH by hand arrive, but a stream that was away cannot be given them, and is told; others are not."""
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        kept.publish(channel, "kept")
        got(pages, page, "kept")
        kept.by_hand(channel, "by hand")
        kept.publish(channel, "next")
        got(pages, page, "kept", "by hand", "next")
        back = come_back(pages, relay, channel, page.events[0].id)
        got(pages, back, "next")
        assert resets(back) == [{"reason": "not-kept", "channels": [channel]}]
        had_all = come_back(pages, relay, channel, page.parser.last_event_id)
        kept.publish(channel, "last")
        got(pages, had_all, "last")
        assert not resets(had_all)
        end_listeners(kept.server)
        pages.until(lambda: resets(page), "the open stream is told: there may have been more")
        assert resets(page) == [{"reason": "broker-reconnect", "channels": [channel]}]


def test_heartbeat_moves_the_id_of_idle_streams(kept, tmp_path, pages, channel):
    """A stream on a quiet channel comes back to a place near the end, not to one that was pruned long ago."""
    with Relay(tmp_path, "--workers", "1", "--heartbeat", "1", **kept.environment) as relay:
        quiet, busy = pages.open(relay.port, [f"/channel={channel}-quiet", f"/channel={channel}"])
        kept.publish(channel, "1", "2")
        got(pages, busy, "1", "2")
        pages.until(lambda: quiet.parser.last_event_id == busy.events[-1].id, "a heartbeat with the id")
        assert not quiet.events
        assert [event.event for event in quiet.positions] == ["stream-open", "stream-position"]
        pages.until(lambda: quiet.body.endswith(b"\n\n:\n:\n"), "heartbeats that move nothing")


def test_streams_at_one_place_share_their_reads(kept_postgres, tmp_path, pages, channel):
    """500 streams that come back with the same id on the same channel cost a few reads, not 500."""
    with Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        kept_postgres.publish(channel, *map(str, range(20)))
        got(pages, page, *map(str, range(20)))
        reads = f"ARRAY['{channel}']"
        before = kept_postgres.server.log.count(reads)
        back = pages.open(relay.port, [f"/channel={channel}"] * 500, {"Last-Event-ID": page.events[0].id})
        pages.until(lambda: all(len(each.events) == 19 for each in back), "all have all")
        assert all(each.data == page.data[1:] for each in back)
        assert kept_postgres.server.log.count(reads) - before < 250


def test_backlog_goes_no_faster_than_it_is_read(kept, tmp_path, pages, channel):
    """Twenty times RELAY_CLIENT_BUFFER is replayed without cutting the stream, and never held in memory."""
    kept.publish(channel, *(f"{number}:" + "x" * 20_000 for number in range(1000)))
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        (worker,) = relay.workers()
        before = memory(worker)
        slow = pages.open(relay.port, [f"/channel={channel}?last_event_id=earliest"] * 5)
        peak = 0

        def all_read():
            nonlocal peak
            peak = max(peak, memory(worker))
            return all(len(page.events) == 1000 for page in slow)

        pages.until(all_read, "all is read", 60)
        assert all([data.partition(":")[0] for data in page.data] == [str(n) for n in range(1000)] for page in slow)
        assert peak - before < 20_000_000
        assert "cutting" not in relay.log


def test_reader_that_stops_costs_nobody_and_loses_nothing(kept, tmp_path, pages, channel):
    """Of 500 one stops to read: it is cut at RELAY_CLIENT_BUFFER, and gets all it missed when it comes back."""
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        (worker,) = relay.workers()
        (stuck,) = pages.open(relay.port, [f"/events?channel={channel}&channel={channel}-large"])
        others = pages.open(relay.port, [f"/channel={channel}"] * 499)
        kept.publish(channel, "first")
        pages.until(lambda: all(page.events for page in [stuck, *others]), "the first event")
        before = memory(worker)
        pages.selector.unregister(stuck)
        sent = []
        for number in range(600):
            sent += [f"{number}:" + "x" * 50_000, str(number)]
            kept.publish(f"{channel}-large", sent[-2])
            kept.publish(channel, sent[-1])
        pages.until(lambda: all(page.data[-1] == "599" for page in others), "all others have all", 60)
        assert all(page.data == ["first", *sent[1::2]] for page in others)
        assert relay.log.count("cutting a slow reader") == 1
        # Of 30 MB; what has come from the broker at once is in memory too, for a moment.
        assert memory(worker) - before < 8 * 1_048_576
        (back,) = pages.open(relay.port, [stuck.path], {"Last-Event-ID": stuck.parser.last_event_id})
        pages.until(lambda: len(back.events) == 1200, "what it missed", 60)
        assert back.data == sent


def test_history_that_is_not_set_up_is_said_and_awaited(postgres_server, tmp_path, pages, channel):
    """The relay serves without, says what to do, and uses the history once it is there."""
    postgres_server.execute("CREATE DATABASE later")
    url = postgres_server.url.removesuffix("relay") + "later"
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=url, RELAY_HISTORY="100") as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        assert "run sse-relay-server init-db" in relay.log
        publisher = open_publisher("postgres", url)
        publisher.publish(channel, '{"data":"before"}')
        got(pages, page, "before")
        with pytest.raises(PayloadTooLarge, match="init-db"):
            publisher.publish(channel, '{"data":"%s"}' % ("x" * 9000))
        assert run("init-db", cwd=tmp_path, DATABASE_URL=url).returncode == 0
        until(lambda: "the history is at" in relay.log, "the relay finds it", 30)
        publisher = open_publisher("postgres", url)
        until(publisher.newest, "notify() finds it as well", 30)
        publisher.publish(channel, '{"data":"kept"}')
        got(pages, page, "before", "kept")
        publisher.publish(channel, '{"data":"next"}')
        got(pages, come_back(pages, relay, channel, page.events[1].id), "next")


def test_listen_misses_nothing(kept, tmp_path, channel):
    """The command comes back to where it began, even if it had no event yet."""
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        command = [COMMAND, "listen", f"{relay.url}/channel={channel}"]
        options = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **options) as listening:
            try:
                for number in range(2):
                    until(lambda number=number: relay.log.count("stream opened") == number + 1, "it listens")
                    os.kill(relay.workers()[0], signal.SIGKILL)
                    kept.publish(channel, str(number))
                    assert json.loads(listening.stdout.readline())["data"] == str(number)
            finally:
                listening.terminate()


def memory(pid):
    """Resident bytes of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024
