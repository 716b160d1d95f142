"""A relay whose broker goes away and comes back."""

import asyncio
import json
import os
import re
import signal
import socket
from pathlib import Path

import httpx
import pytest
from fleet import Numbers
from outages import Proxy, end_listeners
from pages import Page, Pages
from relay import Relay
from servers import PATIENCE, PostgresServer, RedisServer, free_port, until

from tornado_relay.brokers.message import Message
from tornado_relay.brokers.redis.listener import RedisListener
from tornado_relay.publish import open_publisher


@pytest.fixture(params=[PostgresServer, RedisServer])
def mortal(request, home, channel):
    """A server of the test's own."""
    folder = home / f"mortal-{channel}"
    folder.mkdir(mode=0o755)
    server = request.param(folder)
    yield server
    server.stop("immediate")


def reset_of(page):
    return [json.loads(event.data) for event in page.events if event.event == "stream-reset"]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_is_mended_and_said(mortal, mode, tmp_path, pages, channel):
    """Open streams stay open, learn that they may have missed something, and go on; new ones are refused softly meanwhile."""
    with Relay(tmp_path, "--workers", "2", **mortal.environment) as relay:
        opened = pages.open(relay.port, [f"/channel={channel}"] * 6 + [f"/events?channel={channel}&channel=b"] * 2)
        mortal.stop(mode)
        until(lambda: relay.log.count("is not reachable") >= 2, "both workers notice")
        (refused,) = pages.open(relay.port, ["/channel=x"])
        pages.until(lambda: refused.closed, "the refusal ends")
        assert (refused.status, refused.parser.retry is not None) == (200, True)
        (ready,) = pages.open(relay.port, ["/readyz"])
        assert ready.status == 503
        mortal.start()
        pages.until(lambda: all(reset_of(page) for page in opened), "every stream is told")
        mortal.publish(channel, '{"data":"after"}')
        pages.until(lambda: all(page.data[-1:] == ["after"] for page in opened), "the next event")
        assert not any(page.closed for page in opened)
        assert reset_of(opened[0]) == [{"reason": "broker-reconnect", "channels": [channel]}]
        assert reset_of(opened[-1]) == [{"reason": "broker-reconnect", "channels": [channel, "b"]}]


def test_listener_that_the_broker_ends_is_replaced(broker, tmp_path, pages, channel):
    """pg_terminate_backend and CLIENT KILL."""
    with Relay(tmp_path, "--workers", "2", **broker.environment) as relay:
        opened = pages.open(relay.port, [f"/channel={channel}"] * 8)
        end_listeners(broker)
        pages.until(lambda: all(reset_of(page) for page in opened), "every stream is told")
        broker.publish(channel, '{"data":"after"}')
        pages.until(lambda: all(page.data[-1:] == ["after"] for page in opened), "the next event")
        assert len(broker.listeners()) == 2


def test_streams_that_missed_nothing_are_told_nothing(relay, broker, pages, channel):
    """stream-reset comes after a loss, and never at the first connect."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    broker.publish(channel, "x")
    pages.until(lambda: page.events, "the event")
    assert not reset_of(page)


def test_10000_channels_survive_a_restart(mortal, tmp_path, pages):
    """They are listened to again in batches, before streams are told to go on."""
    with Relay(tmp_path, "--workers", "1", **mortal.environment) as relay:
        paths = [
            "/events?" + "&".join(f"channel=c{first + number}" for number in range(100))
            for first in range(0, 10_000, 100)
        ]
        opened = pages.open(relay.port, paths)
        mortal.stop()
        until(lambda: "is not reachable" in relay.log, "the worker notices")
        mortal.start()
        pages.until(lambda: all(reset_of(page) for page in opened), "every stream is told")
        mortal.publish("c0", "first")
        mortal.publish("c9999", "last")
        pages.until(lambda: opened[0].data[-1] == "first" and opened[-1].data[-1] == "last", "events on both ends")


def test_connection_that_never_answers_is_given_up(tmp_path, pages):
    """Something that accepts and says nothing is not a broker: the relay says so, and tries again."""
    with socket.create_server(("127.0.0.1", free_port())) as silent:
        port = silent.getsockname()[1]
        with Relay(tmp_path, "--workers", "1", DATABASE_URL=f"postgresql://u@127.0.0.1:{port}/d") as relay:
            until(lambda: "is not reachable" in relay.log, "it is given up", seconds=30)
            (healthy,) = pages.open(relay.port, ["/healthz"])
            assert healthy.status == 200


def test_silent_redis_connection_is_noticed(redis_server, tmp_path, pages, channel):
    """A Redis that stops answering, as behind a cut cable, is noticed by a PING and not after the kernel's hours."""
    with Proxy(redis_server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        with Relay(tmp_path, "--workers", "1", REDIS_URL=url) as relay:
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            proxy.freeze()
            until(lambda: "no answer to PING" in relay.log, "it is noticed", seconds=30)
            proxy.thaw()
            pages.until(lambda: reset_of(page), "the stream is told")
            redis_server.publish(channel, "after")
            pages.until(lambda: page.data[-1] == "after", "the next event")


def test_stopped_postgres_resumes_without_a_loss(postgres_server, tmp_path, pages, channel):
    """A server that stands still for a moment loses nothing, and nobody is told otherwise."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        (pid,) = postgres_server.listeners()[0]
        os.kill(pid, signal.SIGSTOP)
        postgres_server.publish(channel, "meanwhile")
        os.kill(pid, signal.SIGCONT)
        pages.until(lambda: page.events, "the event")
        assert page.data == ["meanwhile"]


def test_message_that_is_no_text_is_delivered_as_far_as_it_is_one(redis_server, tmp_path, pages, channel):
    """Redis carries bytes, event streams carry UTF-8."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        redis_server.publish(channel, b"\xff\xfe caf\xc3\xa9")
        pages.until(lambda: page.events, "the event")
        assert page.data == ["\ufffd\ufffd café"]


def test_redis_channel_that_acl_forbids_fails_alone(redis_server, tmp_path, pages, channel):
    """A page that asks for such a channel costs others neither their connection nor a channel that it asked for as well."""
    redis_server.client.execute_command(
        "ACL", "SETUSER", "limited", "on", ">pw", "resetchannels", f"&{channel}", f"&{channel}-2", "+@all", "~*"
    )
    url = redis_server.url.replace("redis://", "redis://limited:pw@")
    with Relay(tmp_path, "--workers", "1", REDIS_URL=url) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        (refused,) = pages.open(relay.port, [f"/events?channel=forbidden&channel={channel}-2"])
        pages.until(lambda: refused.closed, "the refusal")
        (second,) = pages.open(relay.port, [f"/channel={channel}-2"])
        redis_server.publish(channel, "x")
        redis_server.publish(f"{channel}-2", "y")
        pages.until(lambda: page.events and second.events, "the events")
        assert (page.data, second.data) == (["x"], ["y"])
        assert "Redis refused the channel forbidden: " in relay.log


def test_refused_channels_are_logged_at_a_bounded_rate(redis_server, tmp_path, pages, channel):
    """A visitor who makes up names that Redis refuses fills nobody's disk."""
    redis_server.client.execute_command(
        "ACL", "SETUSER", "limited", "on", ">pw", "resetchannels", f"&{channel}*", "+@all", "~*"
    )
    url = redis_server.url.replace("redis://", "redis://limited:pw@")
    with Relay(tmp_path, "--workers", "1", REDIS_URL=url) as relay:
        for number in range(20):
            path = "/events?" + "&".join(f"channel=forbidden-{number}-{n}" for n in range(50))
            (refused,) = pages.open(relay.port, [path])
            pages.until(lambda: refused.closed, "the refusal")
        assert relay.log.count("refused the channel") == 1
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        redis_server.publish(channel, "x")
        pages.until(lambda: page.events, "the event")


def test_redis_url_may_ask_for_protocol_3(redis_server, tmp_path, pages, channel):
    """The reader speaks its own."""
    with Relay(tmp_path, "--workers", "1", REDIS_URL=redis_server.url + "?protocol=3") as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        redis_server.publish(channel, "x")
        pages.until(lambda: page.events, "the event")


def test_batches_are_handed_on_one_a_turn_of_the_loop():
    """Sockets that can be written to come in between, so that a burst does not make readers slow."""
    got = []

    async def main():
        listener = RedisListener("redis://127.0.0.1:1", lambda messages, arrived: got.append((messages, arrived)))
        for number in range(3):
            listener._hand_over([[b"message", b"c", b"%d" % number]])  # noqa: SLF001
        for _ in range(10):
            before = len(got)
            await asyncio.sleep(0)
            assert len(got) <= before + 1

    asyncio.run(main())
    assert [messages for messages, _ in got] == [[Message("c", str(number))] for number in range(3)]
    times = [arrived for _, arrived in got]
    assert times == sorted(times)


def test_loss_while_streams_open_is_mended(broker, tmp_path, pages, channel):
    """However often the connection is lost while new channels are asked for, the worker is ready again."""
    with Relay(tmp_path, "--workers", "1", **broker.environment) as relay:
        pages.open(relay.port, [f"/channel={channel}-held"])
        for attempt in range(5):  # the back-off grows with each
            with Pages() as opening:
                for number in range(12):
                    opening.all.append(Page(relay.port, f"/channel={channel}-{attempt}-{number}"))
                noticed = relay.log.count("is not reachable")
                end_listeners(broker)
                until(lambda: relay.log.count("is not reachable") > noticed, f"loss {attempt} is noticed")
                until(lambda: ready(relay, pages), f"ready after loss {attempt}")
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        broker.publish(channel, "x")
        pages.until(lambda: page.events, "the event")


def test_pauses_grow_while_no_connection_holds(broker, tmp_path, pages, channel):
    """One that is lost as soon as it is made does not count as a good one."""
    with Relay(tmp_path, "--workers", "1", **broker.environment) as relay:
        pages.open(relay.port, [f"/channel={channel}"])
        for attempt in range(1, 5):
            until(lambda: relay.log.count("connected, listening") == attempt, f"connection {attempt}")
            end_listeners(broker)
            until(lambda: relay.log.count("next try in") == attempt, f"loss {attempt}")
        # The fourth is between half and all of 0.2 * 2 ** 3 s.
        assert float(re.findall(r"next try in ([\d.]+) s", relay.log)[-1]) >= 0.8


def test_second_host_of_the_url_is_used(postgres_server, tmp_path, pages, channel):
    """As libpq has it: the first that answers."""
    url = postgres_server.url.replace("127.0.0.1:", f"127.0.0.1:{free_port()},127.0.0.1:")
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=url) as relay:
        until(lambda: ready(relay, pages), "connected")
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        postgres_server.publish(channel, "x")
        pages.until(lambda: page.events, "the event")


def test_every_address_of_a_host_is_tried():
    """A server that listens on 127.0.0.1 only is found by the name localhost, whatever that means first."""
    from psycopg2.extensions import parse_dsn

    from tornado_relay.brokers.postgres.dsn import addresses, complete

    tried = [parse_dsn(dsn) for dsn in addresses(complete("postgresql://u:p@192.0.2.1:1,localhost:2/d", "x"))]
    assert (tried[0]["hostaddr"], tried[0]["port"]) == ("192.0.2.1", "1")
    assert {"127.0.0.1"} <= {dsn["hostaddr"] for dsn in tried[1:]} <= {"127.0.0.1", "::1"}
    assert {(dsn["host"], dsn["port"], dsn["password"]) for dsn in tried[1:]} == {("localhost", "2", "p")}
    assert [parse_dsn(dsn)["host"] for dsn in addresses("host=/run/postgresql dbname=d")] == ["/run/postgresql"]


def test_listen_that_is_not_answered_counts_as_a_loss(postgres_server, tmp_path, pages, channel):
    """A backend that stands still is replaced, and new channels are served again."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (open_before,) = pages.open(relay.port, [f"/channel={channel}"])
        (pid,) = postgres_server.listeners()[0]
        os.kill(pid, signal.SIGSTOP)
        try:
            pages.open(relay.port, [f"/channel={channel}-new"])
            pages.until(lambda: reset_of(open_before), "the open stream is told", seconds=40)
            (page,) = pages.open(relay.port, [f"/channel={channel}-newer"])
            postgres_server.publish(f"{channel}-newer", "x")
            pages.until(lambda: page.events, "the event")
        finally:
            os.kill(pid, signal.SIGCONT)


def test_subscription_that_is_not_answered_is_not_waited_for(redis_server, tmp_path, pages, channel):
    """The client is told before the connection is given up, and open streams go on."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        redis_server.process.send_signal(signal.SIGSTOP)
        try:
            answer = httpx.get(f"{relay.url}/channel={channel}-new", timeout=PATIENCE * 2)
        finally:
            redis_server.process.send_signal(signal.SIGCONT)
        assert (answer.status_code, "not confirmed: no answer in time" in answer.text) == (503, True)
        redis_server.publish(channel, "x")
        pages.until(lambda: page.events, "the event")
        assert page.data == ["x"]


def test_name_that_the_database_cannot_encode_fails_alone(postgres_server, tmp_path, pages, channel):
    """In a LATIN1 database an emoji is refused, and nobody else's stream feels it."""
    postgres_server.execute("CREATE DATABASE latin ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    url = postgres_server.url.removesuffix("relay") + "latin"
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=url) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        (refused,) = pages.open(relay.port, [f"/events?channel=%F0%9F%98%80&channel={channel}-2"])
        pages.until(lambda: refused.closed, "the refusal")
        (second,) = pages.open(relay.port, [f"/channel={channel}-2"])
        open_publisher("postgres", url).publish(channel, '{"data":"caf\u00e9"}')
        pages.until(lambda: page.events, "the event")
        assert page.data == ["café"]
        assert not second.closed
        assert "is not reachable" not in relay.log


def ready(relay, pages):
    (answer,) = pages.open(relay.port, ["/readyz"])
    return answer.status == 200


def test_notification_that_comes_with_an_answer_is_not_left_behind(postgres_server, tmp_path, pages, channel):
    """A worker that finds both in its socket at once delivers without waiting for what comes next."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        ((backend,),) = postgres_server.listeners()
        (worker,) = relay.workers()
        for number in range(5):
            os.kill(backend, signal.SIGSTOP)
            asking = pages.add(Page(relay.port, f"/channel={channel}-{number}"))
            until(lambda: unread(postgres_server.port), "the worker's LISTEN is on its way")
            os.kill(worker, signal.SIGSTOP)
            os.kill(backend, signal.SIGCONT)
            until(lambda: not unread(postgres_server.port), "the backend has it")
            postgres_server.publish(channel, str(number))
            idle = "SELECT pid FROM pg_stat_activity WHERE pid = %s AND state = 'idle'"
            until(lambda: postgres_server.execute(idle, backend), "it has answered")
            os.kill(worker, signal.SIGCONT)
            # The worker asks for nothing by itself for 10 s.
            pages.until(lambda number=number: page.data[-1:] == [str(number)], "the event", 5)
            pages.until(lambda asking=asking: asking.status == 200, "the answer")


def unread(port):
    """Bytes that a server on this port has not read, on all its connections."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01")


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_pauses_grow_while_a_broker_is_away(kind, home, tmp_path, channel):
    """Also behind a connection that had been good: many workers must not hammer at a server that is coming up."""
    folder = home / f"away-{channel}"
    folder.mkdir(mode=0o755)
    server = kind(folder)
    with Relay(tmp_path, "--workers", "1", **server.environment) as relay:
        server.stop()

        def pauses():
            return [float(pause) for pause in re.findall(r"next try in ([\d.]+) s", relay.log)]

        # Longer than any that comes while the last connection is younger than a good one has to be.
        until(lambda: max(pauses(), default=0.0) > 6.4, "a long pause", 60)
        assert len(pauses()) < 15


@pytest.mark.parametrize("broker", ["postgres", "redis"], indirect=True)
def test_page_is_told_of_the_gap_before_the_events_behind_it(broker, tmp_path, pages):
    """Events that come while channels are still being subscribed to again wait until the streams have their reset."""
    with Relay(tmp_path, "--workers", "1", **broker.environment) as relay:
        names = [f"gap-{number}" for number in range(5000)]
        for first in range(0, len(names), 100):
            pages.open(relay.port, ["/events?" + "&".join(f"channel={name}" for name in names[first : first + 100])])
        numbers = Numbers(broker, names[::500], 0, 5000.0)
        numbers.start()
        opened = [page for page in pages.all if page.path.partition("=")[2].partition("&")[0] in numbers.channels]
        pages.until(lambda: all(page.events for page in opened), "events come")
        end_listeners(broker)
        pages.until(lambda: all(reset_of(page) for page in opened), "every stream is told")
        numbers.enough.set()
        pages.until(lambda: not numbers.is_alive(), "all are published")
        for page in opened:
            place = [event.event for event in page.events].index("stream-reset")
            before = [int(number) for number in page.data[:place]]
            sent = numbers.taken[page.path.partition("=")[2].partition("&")[0]]
            assert before == list(map(int, sent[: len(before)])), "events behind the gap came before the reset"
