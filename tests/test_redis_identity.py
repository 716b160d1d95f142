"""Redis servers that restart, or replace each other behind one address: what is lost is announced, and nothing else."""

import json
from contextlib import closing, contextmanager

import pytest
from outages import Proxy
from pages import come_back, got, resets
from redis_group import Member
from relay import Relay
from servers import free_port, old_redis_binary, redis_binary, until

from tornado_relay.brokers.redis import scripts
from tornado_relay.publish import open_publisher

versions = pytest.mark.parametrize("binary", [redis_binary, old_redis_binary], ids=["new", "6.2"])


@pytest.fixture
def servers(home, channel):
    """Make servers of the test's own, each from a binary and more options, and end them."""
    made = []

    def make(binary, *options, **more):
        made.append(Member(home / f"{channel}-{len(made)}", *options, binary=binary(), **more))
        return made[-1]

    yield make
    for each in made:
        each.end()


@contextmanager
def relay_at(port, tmp_path, workers=1):
    environment = {"REDIS_URL": f"redis://127.0.0.1:{port}", "RELAY_HISTORY": "100"}
    with Relay(tmp_path, "--workers", str(workers), **environment) as relay:
        until(lambda: relay.log.count("the history is at") == workers, "the history is there")
        yield relay


def publish(port, channel, *events, publisher=None):
    """Publish from a process that knows of nothing before it, or by a publisher that lives longer."""
    with closing(publisher or open_publisher("redis", f"redis://127.0.0.1:{port}")) as given:
        for data in events:
            given.publish(channel, json.dumps({"data": data}))


def told(pages, relay, channel, last_event_id):
    back = come_back(pages, relay, channel, last_event_id)
    pages.until(lambda: back.events, "an answer")
    assert resets(back) == [{"reason": "unknown-id", "channels": [channel]}]


@versions
@pytest.mark.parametrize("has_replica", [False, True], ids=["alone", "replica"])
def test_crash_that_sets_a_server_back_is_announced(servers, tmp_path, pages, channel, binary, has_replica):
    """Redis 6.2 writes the script cache into its dump if it has a replica; a restart is noticed all the same."""
    server = servers(binary)
    if has_replica:
        replica = servers(binary, "--replicaof", "127.0.0.1", str(server.port), "--repl-diskless-sync-delay", "0")
        until(lambda: replica.client.info("replication")["master_link_status"] == "up", "the replica is there")
    with relay_at(server.port, tmp_path) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publish(server.port, channel, "1", "2")
        server.client.save()
        publish(server.port, channel, "lost")
        got(pages, page, "1", "2", "lost")
        server.stop("immediate")
        server.start()
        until(lambda: relay.log.count("Redis connected") == 2, "the relay is back", 40)
        publish(server.port, channel, "3")
        told(pages, relay, channel, page.events[2].id)
        got(pages, come_back(pages, relay, channel, page.events[0].id), "2", "3")


@versions
def test_restart_that_loses_nothing_resets_nobody(servers, tmp_path, pages, channel, binary):
    """With all data on disk a page goes on exactly, over a crash and over a script cache that somebody empties."""
    server = servers(binary, persistent=True)
    with relay_at(server.port, tmp_path) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publish(server.port, channel, "1", "2")
        for number, mode in enumerate(("immediate", "fast"), 2):
            got(pages, page, *map(str, range(1, number + 1)))
            server.stop(mode)
            server.start()
            until(lambda number=number: relay.log.count("Redis connected") == number, "the relay is back", 40)
            publish(server.port, channel, str(number + 1))
        spans = server.client.lrange("sse-relay:spans", 0, -1)
        server.client.script_flush()
        publish(server.port, channel, "5")
        got(pages, page, *"12345")
        back = come_back(pages, relay, channel, page.events[0].id)
        got(pages, back, *"2345")
        assert not resets(page)
        assert not resets(back)
        assert len(spans) == 6  # the first process and two more, each with a token and a number
        assert server.client.lrange("sse-relay:spans", 0, -1) == spans


def switch(proxy, server, relay, workers=1):
    """Let the address lead to another server, and wait until the relay is there."""
    connected, told = relay.log.count("Redis connected"), relay.log.count("the broker has lost events")
    proxy.lead_to(server.port)
    until(lambda: relay.log.count("Redis connected") >= connected + workers, "the relay is there", 40)
    until(lambda: relay.log.count("the broker has lost events") >= told + workers, "it has looked at the history", 40)


def newest(pages, relay, channel, port):
    """Publish an event, and return the id that a page gets with it."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    publish(port, channel, "new")
    got(pages, page, "new")
    return page.events[0].id


@versions
def test_servers_that_are_switched_back_and_forth_under_a_relay(servers, tmp_path, pages, channel, binary):
    """Neither restarts. Pages from before a switch are told of what the other server took, once."""
    a, b = servers(binary), servers(binary)
    with Proxy(a.port) as proxy, relay_at(proxy.port, tmp_path, 2) as relay:
        last = newest(pages, relay, channel, proxy.port)
        for number in range(2):
            switch(proxy, b, relay, 2)
            publish(proxy.port, channel, "lost")
            switch(proxy, a, relay, 2)
            told(pages, relay, channel, last)
            last = newest(pages, relay, channel, proxy.port)
            publish(proxy.port, channel, f"missed {number}")
            back = come_back(pages, relay, channel, last)
            got(pages, back, f"missed {number}")
            assert not resets(back)


@versions
def test_servers_that_are_switched_back_and_forth_under_a_publisher(servers, tmp_path, pages, channel, binary):
    """The relays are new ones each time, so only the publisher knows that another server had the say."""
    a, b = servers(binary), servers(binary)
    with Proxy(a.port) as proxy, closing(open_publisher("redis", f"redis://127.0.0.1:{proxy.port}")) as publisher:
        for _ in range(2):
            with relay_at(a.port, tmp_path) as relay:
                last = newest(pages, relay, channel, a.port)
            with relay_at(b.port, tmp_path):
                proxy.lead_to(b.port)
                publish(proxy.port, channel, "lost", publisher=publisher)
            proxy.lead_to(a.port)
            publish(proxy.port, channel, "first", "second", publisher=publisher)
            with relay_at(a.port, tmp_path) as relay:
                told(pages, relay, channel, last)
                everything = come_back(pages, relay, channel, "earliest")
                pages.until(lambda page=everything: page.data[-1:] == ["second"], "all that is kept")
                back = come_back(pages, relay, channel, everything.events[-2].id)
                got(pages, back, "second")
                assert not resets(back)


@versions
def test_replica_that_takes_over_without_a_restart(servers, tmp_path, pages, channel, binary):
    """It lacks an event, and the page has only those before that: it is told, and what the replica has is kept."""
    a = servers(binary)
    b = servers(binary, "--replicaof", "127.0.0.1", str(a.port), "--repl-diskless-sync-delay", "0")
    # Redis tells in seconds since when it runs.
    until(lambda: b.client.info("server")["uptime_in_seconds"] >= 2, "it runs for a while")
    until(lambda: b.client.info("replication")["master_link_status"] == "up", "the replica is there")
    with Proxy(a.port) as proxy, relay_at(proxy.port, tmp_path) as relay:
        # Both have the scripts already.
        b.client.script_load(scripts.text("open"))
        b.client.script_load(scripts.text("publish"))
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publish(proxy.port, channel, "1")
        got(pages, page, "1")
        pages.close(page)
        until(lambda: b.client.xlen(f"sse-relay:events:{channel}") == 1, "the replica has it")
        b.client.replicaof("NO", "ONE")
        publish(proxy.port, channel, "lost")
        switch(proxy, b, relay)
        publish(proxy.port, channel, "2")
        told(pages, relay, channel, page.events[0].id)
        everything = come_back(pages, relay, channel, "earliest")
        got(pages, everything, "1", "2")


@versions
@pytest.mark.parametrize("how", ["one connection is lost", "the old server is demoted"])
def test_connections_that_lead_to_two_servers(servers, tmp_path, pages, channel, binary, how):
    """Only new connections lead to the other server: the relay and notify() leave the old one, and streams are told."""
    a, b = servers(binary), servers(binary)
    with (
        Proxy(a.port) as proxy,
        relay_at(proxy.port, tmp_path) as relay,
        closing(open_publisher("redis", f"redis://127.0.0.1:{proxy.port}")) as publisher,
    ):
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, "1")
        got(pages, page, "1")
        proxy.target = b.port
        if how == "the old server is demoted":
            a.client.replicaof("127.0.0.1", free_port())
            publisher.publish(channel, "to nobody yet, or to the relay")
        else:
            for each in a.client.client_list():
                if each["name"].startswith("sse-relay-history"):
                    a.client.client_kill_filter(_id=each["id"])
        until(lambda: relay.log.count("Redis connected") == 2, "the reader follows", 40)
        assert "the address leads to another server now" in relay.log
        pages.until(lambda: resets(page), "the stream is told")
        publish(proxy.port, channel, "2")
        pages.until(lambda: page.data[-1:] == ["2"], "the event")
        assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]


def test_user_that_may_not_ask_for_the_identity(servers, tmp_path, pages, channel):
    """Without INFO the missing script tells of a restart, as far as it can, and the relay says what to allow."""
    user = ["--user", "few", "on", ">pw", "~*", "&*", "+@all", "-info"]
    server = servers(redis_binary, *user, persistent=True)
    url = f"redis://few:pw@127.0.0.1:{server.port}"
    with Relay(tmp_path, "--workers", "1", REDIS_URL=url, RELAY_HISTORY="100") as relay:
        until(lambda: "the history is at" in relay.log, "the history is there")
        assert relay.log.count("may not use INFO") == 1
        with closing(open_publisher("redis", url)) as publisher:
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, "1")
            got(pages, page, "1")
            server.stop("immediate")
            server.start()
            until(lambda: relay.log.count("Redis connected") == 2, "the relay is back", 40)
            # One publisher that may ask, one that may not, and a relay that may not: no event is told as lost.
            for data in "2345":
                publisher.publish(channel, data) if data in "24" else publish(server.port, channel, data)
            got(pages, page, *"12345")
            back = come_back(pages, relay, channel, page.events[0].id)
            got(pages, back, *"2345")
            assert not resets(page)
            assert not resets(back)
        assert relay.log.count("may not use INFO") == 1
        spans = server.client.lrange("sse-relay:spans", 0, -1)[::2]
        assert len(spans) > 1
