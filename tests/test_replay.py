"""What may come between while streams are brought up to date: losses, refusals, large events, and long quiet."""

import re
import time
from urllib.parse import quote

import pytest
from outages import Proxy, end_listeners
from pages import Page, come_back, got, resets
from relay import Relay, run
from servers import RedisServer, execute, until

from tornado_relay.errors import BrokerError
from tornado_relay.events import serialize
from tornado_relay.publish import open_publisher


def test_redis_connection_that_is_lost_during_a_read(kept_redis, tmp_path, pages, channel):
    """The page that was read before joins to nothing: it lacks what was missed live."""
    with Proxy(kept_redis.server.port, slow=b"sse-relay-history") as proxy:
        url = kept_redis.url.replace(str(kept_redis.server.port), str(proxy.port))
        with Relay(tmp_path, "--workers", "1", **kept_redis.environment | {"REDIS_URL": url}) as relay:
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            kept_redis.publish(channel, "1", "2")
            got(pages, page, "1", "2")
            got(pages, come_back(pages, relay, channel, page.events[0].id), "2")
            proxy.freeze()
            back = pages.add(Page(relay.port, f"/channel={channel}", {"Last-Event-ID": page.events[0].id}))
            until(proxy.holds.is_set, "the history's answer is held back")
            end_listeners(kept_redis.server)
            until(lambda: not kept_redis.server.listeners(), "the connection is lost")
            kept_redis.publish(channel, "3", "4")
            until(lambda: relay.log.count("Redis connected") == 2, "it is back")
            proxy.thaw()
            kept_redis.publish(channel, "5")
            got(pages, back, "2", "3", "4", "5")
            assert not resets(back)


def test_channel_that_cannot_be_read_holds_up_nobody(kept_redis, tmp_path, pages, channel):
    """A key of another type in its place: its streams are told, others get theirs."""
    bad = f"{channel}-bad"
    kept_redis.publish(channel, "1", "2")
    client = kept_redis.server.client
    client.execute_command("SELECT", 5)
    client.set(f"sse-relay:events:{bad}", "x")
    client.execute_command("SELECT", 0)
    with Relay(tmp_path, "--workers", "1", **kept_redis.environment) as relay:
        opened = pages.open(
            relay.port, [f"/channel={name}?last_event_id=earliest" for name in (bad, channel, bad, channel)]
        )
        for page in opened[1::2]:
            got(pages, page, "1", "2")
        for page in opened[::2]:
            pages.until(lambda page=page: page.events, "an answer")
            assert resets(page) == [{"reason": "unreadable-history", "channels": [bad]}]


def test_channel_that_the_database_cannot_spell_holds_up_nobody(postgres_server, tmp_path, pages, channel):
    """In a database in LATIN1 a name of other letters is refused by each read."""
    postgres_server.execute("CREATE DATABASE latin_kept ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    url = postgres_server.url.removesuffix("relay") + "latin_kept"
    assert run("init-db", cwd=tmp_path, DATABASE_URL=url).returncode == 0
    publisher = open_publisher("postgres", url)
    for data in ("é1", "é2"):
        publisher.publish(channel, serialize({"data": data}))
    foreign = "日本" * 20
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=url, RELAY_HISTORY="100") as relay:
        paths = [f"/channel={quote(name)}?last_event_id=earliest" for name in (foreign, channel)]
        told, served = pages.open(relay.port, paths)
        got(pages, served, "é1", "é2")
        pages.until(lambda: told.events, "an answer")
        assert resets(told) == [{"reason": "unreadable-history", "channels": [foreign]}]
    publisher.close()


def test_quiet_stream_outlives_what_is_pruned(kept, tmp_path, pages, channel):
    """Nothing came to it for longer than events are kept, so it missed nothing, at a loss of the broker or when it returns."""
    quiet, busy = f"{channel}-quiet", f"{channel}-busy"
    flags = ("--workers", "1", "--history-seconds", "4", "--heartbeat", "3600")
    with Relay(tmp_path, *flags, **kept.environment) as relay:
        until(lambda: "the history is at" in relay.log, "the history is set up")
        (page,) = pages.open(relay.port, [f"/channel={quiet}"])
        begin = page.parser.last_event_id
        end = time.monotonic() + 8
        while time.monotonic() < end:
            kept.publish(busy, "x")
            pages.read(0.1)
        assert page.parser.last_event_id != begin
        end_listeners(kept.server)
        until(lambda: relay.log.count(" connected") == 2, "the connection is back")
        kept.publish(quiet, "1")
        got(pages, page, "1")
        back = come_back(pages, relay, quiet, page.parser.last_event_id)
        kept.publish(quiet, "2")
        got(pages, back, "2")
        assert not resets(page)
        assert not resets(back)


def test_beginning_of_the_history_is_a_place_as_any(postgres_server, tmp_path, pages, channel):
    """A stream from before the first event of all is told what was pruned since."""
    postgres_server.execute("CREATE DATABASE beginning")
    url = postgres_server.url.removesuffix("relay") + "beginning"
    assert run("init-db", cwd=tmp_path, DATABASE_URL=url).returncode == 0
    publisher = open_publisher("postgres", url)
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=url, RELAY_HISTORY="100") as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        assert page.parser.last_event_id.endswith("-0")
        for number in range(5):
            publisher.publish(channel, serialize({"data": str(number)}))
        until(lambda: not execute(url, "SELECT sse_relay.prune(2, 86400, 500)")[0][0], "pruned")
        back = come_back(pages, relay, channel, page.parser.last_event_id)
        got(pages, back, "3", "4")
        assert resets(back) == [{"reason": "pruned-id", "channels": [channel]}]
        (fresh,) = pages.open(relay.port, [f"/channel={channel}?last_event_id=earliest"])
        got(pages, fresh, "3", "4")
        assert not resets(fresh)
    publisher.close()


def test_own_id_whose_first_use_is_pruned_stays_unknown(kept, tmp_path, pages, channel):
    """A stream that had the first event would lose those up to the second."""
    with Relay(tmp_path, "--workers", "1", **kept.environment | {"RELAY_HISTORY": "2"}) as relay:
        until(lambda: "the history is at" in relay.log, "the history is set up")
        kept.publish(channel, "first", id="same")
        kept.publish(channel, "between")
        kept.publish(channel, "second", id="same")
        kept.publish(channel, "last")
        if kept.kind == "postgres":
            until(lambda: not kept.execute("SELECT sse_relay.prune(2, 86400, 500)")[0][0], "pruned")
        back = come_back(pages, relay, channel, "same")
        pages.until(lambda: back.events, "an answer")
        assert resets(back) == [{"reason": "unknown-id", "channels": [channel]}]
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        until(lambda: "the history is at" in relay.log, "more is kept again")


def test_large_events_at_many_places_are_read_a_few_at_a_time(kept_postgres, tmp_path, pages, channel):
    """60 streams, each at a place of its own before an event of 1 MB: no read is for more than 8 of them."""
    with Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        numbers = [str(number) for number in range(60)]
        kept_postgres.publish(channel, *numbers, "x" * 1_000_000)
        pages.until(lambda: len(page.events) == 61, "all places")
        reads = kept_postgres.server.log.count(f"ARRAY['{channel}'")
        back = [Page(relay.port, f"/channel={channel}", {"Last-Event-ID": event.id}) for event in page.events[:60]]
        for each in back:
            pages.add(each)
        pages.until(lambda: all(len(each.events) == 60 - n for n, each in enumerate(back)), "all is read", 60)
        assert all(each.data == page.data[n + 1 :] for n, each in enumerate(back))
        places = [
            found.count(channel) for found in re.findall(rf"ARRAY\[('{channel}'[^]]*)\]", kept_postgres.server.log)
        ]
        assert max(places[reads:]) <= 8


def test_page_that_is_under_way_makes_no_slow_reader(kept, tmp_path, pages, channel):
    """RELAY_CLIENT_BUFFER is what may wait behind it: heartbeats and live events cut nobody."""
    kept.publish(channel, *(str(number) + "x" * 100_000 for number in range(60)))
    flags = ("--workers", "1", "--client-buffer", "20000", "--heartbeat", "1")
    with Relay(tmp_path, *flags, **kept.environment) as relay:
        beating, page = pages.open(
            relay.port, [f"/channel={channel}-other", f"/channel={channel}?last_event_id=earliest"]
        )
        pages.selector.unregister(page)
        kept.publish(channel, "live")
        pages.until(lambda: beating.body.count(b"\n:") > 3, "heartbeats")
        assert "cutting" not in relay.log
        pages.add(page)
        pages.until(lambda: page.data[-1:] == ["live"], "all")
        assert len(page.data) == 61


def test_redis_users_of_few_rights(kept_redis, tmp_path, pages, channel):
    """A relay without INFO has its history; what a publisher may not PUBLISH is not kept either."""
    client = kept_redis.server.client
    client.execute_command("ACL", "SETUSER", "relay", "on", ">pw", "~sse-relay:*", "&*", "+@all", "-info")
    client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~sse-relay:*", "resetchannels", "&other", "+@all")
    url = kept_redis.url.replace("//", "//relay:pw@")
    with Relay(tmp_path, "--workers", "1", **kept_redis.environment | {"REDIS_URL": url}) as relay:
        publisher = open_publisher("redis", kept_redis.url.replace("//", "//app:pw@"))
        with pytest.raises(BrokerError, match="may not PUBLISH"):
            publisher.publish(channel, '{"data":"forbidden"}')
        kept_redis.publish(channel, "allowed")
        (page,) = pages.open(relay.port, [f"/channel={channel}?last_event_id=earliest"])
        got(pages, page, "allowed")
    publisher.close()


def test_many_channels_with_large_events(kept, tmp_path, pages, channel):
    """A stream on 40 channels with 1 MB on each gets all in order, by reads that share their room."""
    names = [f"{channel}-{number}" for number in range(40)]
    sent = [f"{number}" + "x" * 1_000_000 for number in range(40)]
    for number, data in enumerate(sent):
        kept.publish(names[number * 7 % 40], data)
    with Proxy(kept.server.port) as proxy:
        (key,) = (key for key in kept.environment if key.endswith("URL"))
        url = kept.url.replace(f":{kept.server.port}/", f":{proxy.port}/")
        with Relay(tmp_path, "--workers", "1", **kept.environment | {key: url}) as relay:
            path = "/events?last_event_id=earliest&" + "&".join(f"channel={name}" for name in names)
            (page,) = pages.open(relay.port, [path])
            pages.until(lambda: len(page.events) == 40, "all", 60)
    assert page.data == sent
    # Each read of all 40 for the sake of one would make it 1,600 MB.
    assert proxy.forwarded < 200_000_000


def test_stream_that_takes_what_there_is_is_told_of_no_gap(kept, tmp_path, pages, channel):
    """Not when it is at a place of its own later, with more of another channel pruned behind it."""
    busy = f"{channel}-busy"
    with Relay(tmp_path, "--workers", "1", **kept.environment | {"RELAY_HISTORY": "50"}) as relay:
        until(lambda: "the history is at" in relay.log, "the history is set up")
        kept.publish(channel, *(f"{number}" + "x" * 10_000 for number in range(40)))
        kept.publish(busy, *map(str, range(200)))
        if kept.kind == "postgres":
            until(lambda: not kept.execute("SELECT sse_relay.prune(50, 86400, 500)")[0][0], "pruned")
        (page,) = pages.open(relay.port, [f"/events?channel={channel}&channel={busy}&last_event_id=earliest"])
        pages.until(lambda: page.data[-1:] == ["199"], "all")
        assert len(page.events) == 90
        assert not resets(page)
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        until(lambda: "the history is at" in relay.log, "more is kept again")


def test_id_of_nobody_spoils_no_other_stream(kept_redis, tmp_path, pages, channel):
    """A stream waits for a read, and another one comes with what looks like a place and makes the relay look again."""
    with (
        Proxy(kept_redis.server.port, slow=b"sse-relay-history") as proxy,
        Relay(tmp_path, "--workers", "1", **kept_redis.environment) as other,
    ):
        url = kept_redis.url.replace(str(kept_redis.server.port), str(proxy.port))
        (page,) = pages.open(other.port, [f"/channel={channel}"])
        kept_redis.publish(channel, "0")  # where it is the first of all, it begins a span
        with Relay(tmp_path, "--workers", "1", **kept_redis.environment | {"REDIS_URL": url}) as relay:
            until(lambda: "the history is at" in relay.log, "the history is set up")
            kept_redis.publish(channel, "1", "2")
            got(pages, page, "0", "1", "2")
            proxy.freeze()
            back = pages.add(Page(relay.port, f"/channel={channel}", {"Last-Event-ID": page.events[-1].id}))
            until(proxy.holds.is_set, "the history's answer is held back")
            strange = pages.add(Page(relay.port, f"/channel={channel}-2", {"Last-Event-ID": "20261124-17"}))
            until(lambda: len(kept_redis.server.client.pubsub_channels(f"{channel}-2")), "it is on its way")
            end = time.monotonic() + 1.5  # an unknown id is looked up once a second
            while time.monotonic() < end:
                pages.read(0.1)
            proxy.thaw()
            pages.until(lambda: strange.events, "an answer")
            assert resets(strange) == [{"reason": "unknown-id", "channels": [f"{channel}-2"]}]
            kept_redis.publish(channel, "3")
            got(pages, back, "3")
            assert not resets(back)


def test_full_redis_is_still_read(home, tmp_path, pages, channel):
    """It refuses to write, so nothing is published; streams come and go, also when their places would be moved on."""
    folder = home / f"full-{channel}"
    folder.mkdir()
    server = RedisServer(folder)
    try:
        flags = ("--workers", "1", "--history", "100", "--history-seconds", "4")
        with Relay(tmp_path, *flags, **server.environment) as relay:
            publisher = open_publisher("redis", server.url)
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, '{"data":"1"}')
            publisher.publish(channel, '{"data":"2"}')
            got(pages, page, "1", "2")
            server.client.config_set("maxmemory", 1)
            with pytest.raises(BrokerError, match="maxmemory"):
                publisher.publish(channel, '{"data":"3"}')
            end = time.monotonic() + 1  # the end of the history is older than an eighth of the seconds
            while time.monotonic() < end:
                pages.read(0.1)
            got(pages, come_back(pages, relay, channel, page.events[0].id), "2")
            (fresh,) = pages.open(relay.port, [f"/channel={channel}-fresh"])
            server.client.config_set("maxmemory", 0)
            publisher.publish(f"{channel}-fresh", '{"data":"4"}')
            got(pages, fresh, "4")
            publisher.close()
    finally:
        server.stop()


def test_history_that_nobody_looks_after_is_said(kept_postgres, postgres_server, tmp_path):
    """A relay without RELAY_HISTORY deletes nothing; where there is no history there is nothing to say."""
    said = "nobody deletes what is old; set RELAY_HISTORY"
    unread = {"DATABASE_URL": kept_postgres.environment["DATABASE_URL"]}
    for environment, expected in (
        (unread, True),
        (kept_postgres.environment, False),
        (postgres_server.environment, False),
    ):
        with Relay(tmp_path, "--workers", "1", **environment) as relay:
            assert (said in relay.log) == expected
