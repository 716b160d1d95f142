"""Streams end to end: the installed command, a real broker, sockets."""

import json
import random
import re
import socket
import struct
import time
from pathlib import Path

import pytest
from relay import Relay
from servers import until

from tornado_relay import PayloadTooLarge
from tornado_relay.publish import open_publisher


def test_event_reaches_the_streams_of_its_channel_only(relay, broker, pages, channel):
    """Each of the three URL forms opens a stream that gets its own channel's events and no other's."""
    forms = pages.open(relay.port, [f"/channel={channel}", f"/{channel}", f"/events?channel={channel}&channel=more"])
    (other,) = pages.open(relay.port, ["/channel=elsewhere"])
    broker.publish(channel, json.dumps({"event": "greeting", "id": 7, "data": "hello\nyou"}))
    broker.publish("elsewhere", "x")
    pages.until(lambda: all(page.events for page in [*forms, other]), "all got something")
    for page in forms:
        assert [(event.event, event.id, event.data) for event in page.events] == [("greeting", "7", "hello\nyou")]
    assert other.data == ["x"]


def test_stream_headers_and_first_bytes(relay, pages):
    """The headers keep proxies from buffering, and the stream begins with a comment and a retry time."""
    (page,) = pages.open(relay.port, ["/channel=x"])
    pages.until(lambda: page.body, "first bytes")
    assert page.status == 200
    assert page.headers["content-type"] == "text/event-stream"
    assert page.headers["cache-control"] == "no-store, no-transform"
    assert page.headers["x-accel-buffering"] == "no"
    assert page.body.startswith(b": ")
    pages.until(lambda: page.parser.retry, "a retry time")
    assert 1000 <= page.parser.retry <= 10_000


def test_first_block_tells_that_there_is_no_history(relay, pages, channel):
    """The first block is an event with data, so that every client keeps its id and sends it later."""
    plain, labelled = pages.open(relay.port, [f"/events?channel={channel}{more}" for more in ("", "&labels=1")])
    pages.until(lambda: plain.positions and labelled.positions, "the first block")
    opened = rb'id: none\nevent: stream-open\ndata: {"id":"none","resumed":false}\n\n'
    assert re.match(rb": sse-relay-server\nretry: \d+\n" + opened, plain.body)
    assert re.match(rb": sse-relay-server\nretry: \d+\nheartbeat: 15\nfolds: [01]\n" + opened, labelled.body)


@pytest.mark.parametrize("labels", ["", "&labels=1"])
def test_reset_of_a_return_comes_before_the_position(relay, pages, channel, labels):
    """A page that is cut between the two blocks keeps its old id, and is told at its next return."""
    (page,) = pages.open(relay.port, [f"/events?channel={channel}&last_event_id=none{labels}"])
    pages.until(lambda: page.positions, "the first blocks")
    first, second, rest = page.body.split(b"\n\n")
    reset = json.dumps({"reason": "unknown-id", "channels": [channel]}, separators=(",", ":")).encode()
    assert re.fullmatch(rb": sse-relay-server\nretry: \d+\nevent: stream-reset\ndata: " + re.escape(reset), first)
    assert second.endswith(b'id: none\nevent: stream-open\ndata: {"id":"none","resumed":false}')
    assert (b"heartbeat: " in second, rest) == (bool(labels), b"")


def test_many_channels_in_one_stream_keep_the_order_of_the_broker(relay, broker, pages, channel):
    """A stream on several channels gets their events in the order in which they were published."""
    names = [f"{channel}-{number}" for number in range(5)]
    (page,) = pages.open(relay.port, ["/events?" + "&".join(f"channel={name}" for name in names)])
    publisher = open_publisher(broker.kind, broker.url)
    expected = [str(number) for number in range(200)]
    for number in expected:
        publisher.publish(random.choice(names), json.dumps({"data": number}))
    pages.until(lambda: len(page.events) >= 200, "all events")
    assert page.data == expected


def test_labelled_stream(relay, broker, pages, channel):
    """With labels=1 a client is told how often something comes, and of which channel each event is."""
    labelled, plain = pages.open(
        relay.port, [f"/events?channel={channel}&channel={channel}-2{more}" for more in ("&labels=1", "")]
    )
    broker.publish(channel, "1")
    broker.publish(f"{channel}-2", "2")
    pages.until(lambda: len(labelled.events) == len(plain.events) == 2, "both events")
    assert labelled.data == plain.data == ["1", "2"]
    assert b"heartbeat: 15\nfolds: %d\n" % (broker.kind == "postgres") in labelled.body
    assert f"channel: {channel}\ndata: 1\n\nchannel: {channel}-2\ndata: 2\n\n".encode() in labelled.body
    assert b"channel: " not in plain.body
    assert b"heartbeat: " not in plain.body


def test_http_1_0_client_gets_a_plain_stream(relay, broker, pages, channel):
    """A client of HTTP/1.0, as nginx is by default, gets the bytes unchunked."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"], version="1.0")
    broker.publish(channel, "hello")
    pages.until(lambda: page.events, "the event")
    assert page.data == ["hello"]
    assert "transfer-encoding" not in page.headers


def test_head_answers_the_headers_and_ends(relay, pages):
    """HEAD gets what GET would, without a stream."""
    (page,) = pages.open(relay.port, ["/channel=x"], method="HEAD")
    pages.until(lambda: page.closed, "the end")
    assert (page.status, page.headers["content-type"], page.body) == (200, "text/event-stream", b"")


def test_idle_stream_gets_comments(broker, tmp_path, pages):
    """A comment comes every RELAY_HEARTBEAT seconds, and is no event."""
    with Relay(tmp_path, "--workers", "1", "--heartbeat", "1", **broker.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=x"])
        pages.until(lambda: page.body.endswith(b"\n\n:\n:\n"), "two heartbeats")
        assert not page.events
        assert len(page.positions) == 1


def test_stream_ends_when_its_time_is_up(broker, tmp_path, pages):
    """With RELAY_MAX_STREAM_SECONDS a stream ends, with a retry time that brings the page back."""
    with Relay(tmp_path, "--workers", "1", "--max-stream-seconds", "1", **broker.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=x"])
        pages.until(lambda: page.closed, "the end")
        assert page.body.rstrip().rpartition(b"\n")[2].startswith(b"retry: ")


def test_slow_reader_is_cut_and_others_do_not_feel_it(broker, tmp_path, pages, channel):
    """A client that stops reading is cut once its buffer is full; the stream beside it gets everything."""
    with Relay(tmp_path, "--workers", "1", "--client-buffer", "100000", **broker.environment) as relay:
        (reader,) = pages.open(relay.port, [f"/channel={channel}"])
        (stopped,) = pages.open(relay.port, [f"/channel={channel}"])
        pages.selector.unregister(stopped)
        publisher = open_publisher(broker.kind, broker.url)
        count = 0
        while "cutting a slow reader" not in relay.log:
            count += 1
            assert count < 20_000, "never cut"
            publisher.publish(channel, json.dumps({"data": f"{count}:{'x' * 7000}"}))
            pages.until(lambda: len(reader.events) == count, "the reader keeps up")
        assert [int(data.partition(":")[0]) for data in reader.data] == list(range(1, count + 1))
        assert not reader.closed


def test_event_larger_than_the_buffer_is_no_slow_reader(redis_server, tmp_path, pages, channel):
    """Slow is who leaves something waiting: an 8 MB event, or a burst that fits the buffer, is for everybody who reads."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        redis_server.publish(channel, json.dumps({"data": "x" * 8_000_000}))
        pages.until(lambda: page.events, "the large event")
        assert len(page.data[0]) == 8_000_000
        pipeline = redis_server.client.pipeline(transaction=False)
        for number in range(200):
            pipeline.publish(channel, json.dumps({"data": f"{number}:{'x' * 4000}"}))
        pipeline.execute()
        pages.until(lambda: len(page.events) == 201 or page.closed, "the burst")
        assert [int(data.partition(":")[0]) for data in page.data[1:]] == list(range(200))


def test_stream_takes_100_channels_with_long_names(relay, broker, pages, channel):
    """The limit of the address's length leaves room for what the limits of channels allow."""
    names = [f"{channel}-{number}-".ljust(200, "x") for number in range(100)]
    (page,) = pages.open(relay.port, ["/events?" + "&".join(f"channel={name}" for name in names)])
    open_publisher(broker.kind, broker.url).publish(names[-1], '{"data":"x"}')
    pages.until(lambda: page.events, "the event")


def test_clients_that_leave_at_once_are_forgotten(broker, tmp_path, channel):
    """Whenever a client goes, before, while or after its stream opens, nothing of it stays."""
    with Relay(tmp_path, "--workers", "1", **broker.environment) as relay:
        for number in range(1500):
            client = socket.create_connection(("127.0.0.1", relay.port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", number % 2, 0))
            client.sendall(f"GET /channel={channel}-{number % 300} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            deadline = time.perf_counter() + random.uniform(0, 0.004)
            while time.perf_counter() < deadline:
                pass
            client.close()
        until(
            lambda: relay.log.count("stream opened") == relay.log.count("stream ended") > 0, "each opened stream ended"
        )
        (worker,) = relay.workers()

        def sockets():
            """The listening one, the loop's own pair, the broker's connection, and those of clients."""
            links = [str(link.readlink()) for link in Path(f"/proc/{worker}/fd").iterdir()]
            return sum("socket:" in link for link in links)

        until(lambda: sockets() <= 4, "no client's socket is left")


NAMES = [
    "a;DROP TABLE x",
    '"',
    "'",
    "café",
    "x" * 200,
    "é" * 200,
    "Orders-Mixed",
    "%s",
    "a b",
    "日本",
    "a/b",
    "..",
    "{}",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_printable_channel_name_works(relay, broker, pages, name):
    """A channel may have any printable name of up to 200 characters, on both brokers."""
    from urllib.parse import quote

    (page,) = pages.open(relay.port, ["/channel=" + quote(name, safe="")])
    open_publisher(broker.kind, broker.url).publish(name, '{"data":"for you"}')
    pages.until(lambda: page.events, "the event")
    assert page.data == ["for you"]


def test_channel_names_reach_postgres_quoted(postgres_server, tmp_path, pages):
    """No part of a channel's name is ever SQL: the server's log shows one quoted identifier."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        pages.open(relay.port, ["/channel=" + 'a"%3BDROP TABLE x%3B--'.replace('"', "%22").replace(" ", "%20")])
        log = postgres_server.log
        assert 'statement: LISTEN "a"";DROP TABLE x;--"' in log
        assert "ERROR" not in log.partition('LISTEN "a"";DROP')[2].partition("\n")[0]


def test_mixed_case_stream_hears_its_folded_twin_on_postgres(postgres_server, tmp_path, pages):
    """An unquoted NOTIFY Orders arrives as "orders", and a stream on Orders hears it; not the other way round."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        mixed, lower = pages.open(relay.port, ["/channel=TwinCase", "/channel=twincase"])
        postgres_server.execute("NOTIFY TwinCase, 'by hand'")
        postgres_server.publish("TwinCase", "exact")
        pages.until(lambda: len(mixed.events) == 2 and lower.events, "both")
        assert mixed.data == ["by hand", "exact"]
        assert lower.data == ["by hand"]


def test_redis_channels_differ_by_case(redis_server, tmp_path, pages):
    """On Redis nothing folds names, so a stream hears its exact channel alone."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=TwinCase"])
        redis_server.publish("twincase", "no")
        redis_server.publish("TwinCase", "yes")
        pages.until(lambda: page.events, "the event")
        assert page.data == ["yes"]


PAYLOADS = [
    "it's",
    'say "hi"',
    "a\nb\r\nc\rd",
    "🎉 ünï",
    "  two spaces",
    "\u2028\u0085\x0b",
    "",
    "nul \0 inside",
    ":colon",
]


@pytest.mark.parametrize("text", PAYLOADS)
def test_text_arrives_as_given(relay, broker, pages, channel, text):
    """Quotes, line ends, emoji, NUL and leading blanks reach event.data as they were; line ends become LF."""
    from tornado_relay.events import serialize

    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    open_publisher(broker.kind, broker.url).publish(channel, serialize({"data": text}))
    pages.until(lambda: page.events, "the event")
    assert page.data == [text.replace("\r\n", "\n").replace("\r", "\n")]


def test_7999_bytes_pass_and_8000_are_refused_on_postgres(postgres_server, tmp_path, pages, channel):
    """PostgreSQL's limit is kept to the byte, and the error names limit and size."""
    publisher = open_publisher("postgres", postgres_server.url)
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        frame = '{"data":"%s"}'
        fits = "é" + "x" * (7999 - len(frame % "é".encode().decode("latin-1")))
        publisher.publish(channel, frame % fits)
        pages.until(lambda: page.events, "the event")
        assert page.data == [fits]
        with pytest.raises(PayloadTooLarge, match=r"8,000 bytes.*7,999"):
            publisher.publish(channel, frame % (fits + "x"))


def test_redis_takes_more_than_8000_bytes(redis_server, tmp_path, pages, channel):
    """Redis has no such limit: a 500 kB event arrives whole."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        redis_server.publish(channel, json.dumps({"data": "x" * 500_000}))
        pages.until(lambda: page.events, "the event")
        assert page.data == ["x" * 500_000]


def test_equal_events_of_one_transaction_are_both_delivered(postgres_server, tmp_path, pages, channel):
    """PostgreSQL folds equal notifications of one transaction; two calls of ours still are two events."""
    import psycopg2

    from tornado_relay.brokers.postgres.publisher import execute

    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        with psycopg2.connect(postgres_server.url) as connection, connection.cursor() as cursor:
            execute(cursor, "a database", channel, '{"data":"+1"}', None)
            execute(cursor, "a database", channel, '{"data":"+1"}', None)
        connection.close()
        pages.until(lambda: len(page.events) == 2, "both events")


def test_hand_written_notify_of_the_predecessor_works(relay, broker, pages, channel):
    """The statements that the predecessor's users have in their code still reach the page."""
    payload = json.dumps({"event": "NEW_NOTIFICATION", "id": 1, "data": json.dumps({"message": "A new notification"})})
    name = channel.replace("-", "_").title()
    (page,) = pages.open(relay.port, [f"/channel={name}"])
    if broker.kind == "postgres":
        broker.execute(f"NOTIFY {name}, '{payload}'")
    else:
        broker.client.publish(channel=name, message=payload)
    pages.until(lambda: page.events, "the event")
    (event,) = page.events
    assert (event.event, event.id, json.loads(event.data)) == (
        "NEW_NOTIFICATION",
        "1",
        {"message": "A new notification"},
    )


def test_unsubscribed_channel_is_dropped_at_the_broker_after_a_while(broker, tmp_path, pages, channel):
    """Some seconds after its last stream a channel is no longer listened to; a new stream brings it back."""
    with Relay(tmp_path, "--workers", "1", **broker.environment) as relay:
        page, refused = pages.open(relay.port, [f"/channel={channel}", f"/channel={channel}?last_event_id=%FF"])
        assert refused.status == 400
        pages.close(page)
        if broker.kind == "postgres":
            until(lambda: f'UNLISTEN "{channel}"' in broker.log, "UNLISTEN")
        else:
            until(lambda: not broker.client.pubsub_numsub(channel)[0][1], "UNSUBSCRIBE")
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        broker.publish(channel, "again")
        pages.until(lambda: page.events, "the event")
