"""Redis Cluster: events on their channel's shard, the history on one of them."""

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from pages import come_back, got, resets
from programs import program
from redis_group import NOTIFIED, Cluster, Member, all_say, cluster, notify_in_django, port_with_bus, running
from relay import Relay, run, watched
from servers import old_redis_binary, until
from storm import CHANNELS, drill, drill_live
from test_check import findings
from test_metrics import counted, named

from tornado_relay.brokers.redis import url
from tornado_relay.brokers.redis.cluster import HISTORY_SLOT, TAG, parse, slot_of
from tornado_relay.brokers.redis.listener import links_to
from tornado_relay.errors import BrokerError, SettingsError
from tornado_relay.publish import open_publisher


@pytest.fixture
def fragile(home, channel):
    """A Cluster of the test's own."""
    with running(Cluster, home / f"cluster-{channel}", program("redis-server")) as group:
        yield group


@pytest.fixture
def group(lasting):
    """A Cluster whose servers stay; none has a history."""
    lasting.owner(HISTORY_SLOT).client.delete(f"{TAG}:history", f"{TAG}:spans")
    return lasting


@pytest.fixture(scope="module")
def lasting(home):
    """One whose servers know SPUBLISH, as the wheel's do not."""
    with running(Cluster, home / "cluster", program("redis-server")) as group:
        yield group


@pytest.fixture(scope="module")
def old(home):
    """A Cluster of version 6.2, which has no SPUBLISH."""
    with running(Cluster, home / "old-cluster", old_redis_binary()) as group:
        yield group


def moved(group, slot, before):
    until(lambda: group.owner(slot) not in (None, before), "another server has the slot", 30)


def listening(group, number):
    """Wait until so many workers listen to the history's server."""
    until(lambda: len(group.owner(HISTORY_SLOT).listeners()) == number, "the workers are there", 40)


def test_master_of_the_history_is_killed(fragile, tmp_path):
    """kill -9 while 5,000 events are published."""

    def disturb():
        old = fragile.owner(HISTORY_SLOT)
        old.stop("immediate")
        moved(fragile, HISTORY_SLOT, old)
        listening(fragile, 4)

    _, kept, live = drill(fragile, tmp_path, disturb)
    assert all(stream.resets for stream in [*kept, *live])


def test_planned_fail_over_loses_nothing(fragile, tmp_path):
    """CLUSTER FAILOVER of the history's master while 5,000 events are published."""

    def disturb():
        old = fragile.owner(HISTORY_SLOT)
        fragile.fail_over(old)
        moved(fragile, HISTORY_SLOT, old)
        listening(fragile, 4)

    lacking, _, _ = drill(fragile, tmp_path, disturb)
    assert lacking == 0


def test_shard_without_the_history_is_killed(fragile, tmp_path):
    """Its channels' streams go on at its replica."""

    def disturb():
        old = next(each for each in fragile.servers[:3] if each is not fragile.owner(HISTORY_SLOT))
        slot = next(slot for slot in map(slot_of, CHANNELS) if fragile.owner(slot) is old)
        old.stop("immediate")
        moved(fragile, slot, old)
        listening(fragile, 4)

    lacking, kept, _ = drill(fragile, tmp_path, disturb)
    assert lacking == 0
    assert not [stream for stream in kept if stream.resets]


def test_shard_is_killed_without_a_history(fragile, tmp_path):
    """Events travel by SPUBLISH: what the lost server's channels miss is told."""

    def disturb():
        old = next(each for each in fragile.servers[:3] if each is not fragile.owner(HISTORY_SLOT))
        slot = next(slot for slot in map(slot_of, CHANNELS) if fragile.owner(slot) is old)
        until(lambda: "cmdstat_spublish" in old.client.info("commandstats"), "events travel through it")
        old.stop("immediate")
        moved(fragile, slot, old)
        listening(fragile, 4)

    assert all(stream.resets for stream in drill_live(fragile, tmp_path, disturb))


def test_slot_that_moves_is_told_to_its_channels_alone(group, tmp_path, pages, channel):
    """While events are published to it and to another one; the connection counts as whole."""
    other = f"{channel}-other"
    publisher = open_publisher("redis", group.url)
    with watched(tmp_path, workers=1, **group.environment) as relay:
        page, stays = pages.open(relay.relay.port, [f"/channel={channel}", f"/channel={other}"])
        source = group.owner(slot_of(channel))
        target = next(each for each in group.servers[:3] if each is not source)
        group.migrate(slot_of(channel), target)
        pages.until(lambda: resets(page), "the stream is told")
        assert resets(page) == [{"reason": "broker-reconnect", "channels": [channel]}]
        publisher.publish(channel, "here")
        publisher.publish(other, "there")
        got(pages, page, "here")
        got(pages, stays, "there")
        assert not resets(stays)
        assert "is not reachable" not in relay.relay.log
        assert counted(relay, "resets") == {"broker-reconnect": 1}
        assert counted(relay, "broker_reconnects") == {}
        target.client.execute_command("SPUBLISH", channel, "by hand")
        got(pages, page, "here", "by hand")
    publisher.close()


def test_slot_moves_to_a_server_that_refuses_its_channel(group, tmp_path, pages, channel):
    """Users are each server's own: streams are told, and those that come then are not let in."""
    source = group.owner(slot_of(channel))
    target = next(each for each in group.servers[:3] if each not in (source, group.owner(HISTORY_SLOT)))
    for each in group.servers:
        allowed = "&none" if each is target else "&*"
        each.client.execute_command("ACL", "SETUSER", "uneven", "on", ">pw", "~*", "resetchannels", allowed, "+@all")
    with Relay(tmp_path, "--workers", "1", REDIS_URL=group.url.replace("//", "//uneven:pw@")) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        source.client.execute_command("SPUBLISH", channel, "x")
        got(pages, page, "x")
        group.migrate(slot_of(channel), target)
        pages.until(lambda: resets(page), "the stream is told")
        (refused,) = pages.open(relay.port, [f"/channel={channel}"])
        pages.until(lambda: refused.closed, "the next one is ended")


def test_channel_is_dropped_just_when_its_slot_moves(group, channel):
    """The server tells the one in the words of the other, and answers that the slot has moved; the connection goes on."""
    source = group.owner(slot_of(channel))
    names = (f"{channel}-{number}" for number in itertools.count())
    other, third = itertools.islice((name for name in names if group.owner(slot_of(name)) is source), 2)
    with closing(links_to(group.url, "test")) as links:
        confirmed = set()

        def listens(name):
            for link in links.wait()[1]:
                confirmed.update(name for kind, name, _ in links.checked(link.batch()[0]) if kind == b"subscribe")
            return name.encode() in confirmed

        links.send([("SUBSCRIBE", [channel])])
        until(lambda: listens(channel), "it is listened to")
        group.migrate(slot_of(channel), next(each for each in group.servers[:3] if each is not source))
        links.send([("UNSUBSCRIBE", [channel]), ("SUBSCRIBE", [other])])
        until(lambda: listens(other), "another one is listened to")
        links.send([("UNSUBSCRIBE", [other]), ("SUBSCRIBE", [third])])
        until(lambda: listens(third), "and one more")
        confirmed.clear()
        links.send([("SUBSCRIBE", [channel])])
        until(lambda: listens(channel), "and the first one again")


def test_history_that_moves(fragile, tmp_path, pages, channel):
    """With its slot, to another server: streams are told, and go on."""
    publisher = open_publisher("redis", fragile.url)
    with Relay(tmp_path, "--workers", "1", "--history", "100", **fragile.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, '{"data":"1"}')
        got(pages, page, "1")
        source = fragile.owner(HISTORY_SLOT)
        fragile.migrate(HISTORY_SLOT, next(each for each in fragile.servers[:3] if each is not source))
        publisher.publish(channel, '{"data":"2"}')
        got(pages, page, "1", "2")
        assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]
        back = come_back(pages, relay, channel, page.events[-1].id)
        publisher.publish(channel, '{"data":"3"}')
        got(pages, back, "3")
        assert not resets(back)
    publisher.close()


def test_history_is_used_from_the_first_event_on(group, tmp_path, channel):
    """By all threads of a process, and by one whose first try was an error."""
    with Relay(tmp_path, "--workers", "1", "--history", "100", **group.environment) as relay:
        until(lambda: "the history is at" in relay.log, "there is a history")
        for _ in range(10):
            with closing(open_publisher("redis", group.url)) as publisher, ThreadPoolExecutor(4) as threads:
                together = threading.Barrier(4)

                def publish(_, publisher=publisher, together=together):
                    together.wait()
                    publisher.publish(channel, "x")

                assert len(list(threads.map(publish, range(4)))) == 4
        keeper = group.owner(HISTORY_SLOT)
        with closing(open_publisher("redis", group.url)) as publisher:
            keeper.client.rename(f"{TAG}:history", f"{TAG}:away")
            keeper.client.set(f"{TAG}:history", "of the wrong kind")
            with pytest.raises(BrokerError):
                publisher.publish(channel, "x")
            keeper.client.rename(f"{TAG}:away", f"{TAG}:history")
            publisher.publish(channel, "x")
        assert keeper.client.xlen(f"{TAG}:events:{channel}") == 41


def test_publisher_goes_where_a_server_sends_it(group, channel):
    """Right after a move the other servers have not heard of it."""
    source, target, _ = group.servers[:3]
    names = (f"{channel}-{number}" for number in itertools.count())
    with closing(open_publisher("redis", group.url)) as publisher:
        # All one way: servers that take slots from each other may give themselves the same epoch, and then disagree for good.
        for name in itertools.islice((name for name in names if group.owner(slot_of(name)) is source), 10):
            publisher.publish(name, "x")
            group.migrate(slot_of(name), target)
            publisher.publish(name, "x")


def test_master_that_stands_still(fragile, tmp_path, pages, channel):
    """As behind a cut cable: the reader leaves it for the one in its place, and metrics say so."""
    publisher = open_publisher("redis", fragile.url)
    with watched(tmp_path, workers=1, **fragile.environment) as relay:
        (page,) = pages.open(relay.relay.port, [f"/channel={channel}"])
        old = fragile.owner(slot_of(channel))
        old.freeze()
        moved(fragile, slot_of(channel), old)
        pages.until(lambda: resets(page), "the stream is told", 40)
        old.thaw()
        publisher.publish(channel, "x")
        got(pages, page, "x")
        assert counted(relay, "broker_reconnects")[""] >= 1
        told = relay.metrics()
        assert named(told, "sse_relay_broker_up") == {"0": 1}
        assert told["sse_relay_delivery_latency_seconds_count",] == 1
        until(lambda: named(relay.metrics(), "sse_relay_broker_probe_seconds").get("0"), "a probe")
    publisher.close()


def test_master_that_is_cut_off_is_not_believed(home, tmp_path, pages, channel):
    """It goes on taking events, and still names itself, when another one is elected: nobody stays with it."""
    sides = []
    try:
        for side in ("minority", "majority"):
            options = ("--cluster-enabled", "yes")
            sides.append(
                Member(home / f"{channel}-{side}", *options, port=port_with_bus(), binary=program("redis-server"))
            )
        minority, majority = sides
        cluster(minority, "ADDSLOTSRANGE", 0, 16383)
        until(all_say([minority], "cluster_state:ok"), "all is as it was")
        address = f"redis+cluster://127.0.0.1:{minority.port},127.0.0.1:{majority.port}"
        with (
            closing(open_publisher("redis", address)) as publisher,
            Relay(tmp_path, "--workers", "1", REDIS_URL=address) as relay,
        ):
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, "before")
            got(pages, page, "before")
            # As it is behind a cut: its own slot is still its own, and it takes what is sent to that.
            cluster(minority, "DELSLOTS", next(slot for slot in (0, 1) if slot != slot_of(channel)))
            cluster(majority, "ADDSLOTSRANGE", 0, 16383)
            until(all_say([minority], "cluster_state:fail"), "it knows that it is cut off")
            until(all_say([majority], "cluster_state:ok"), "there is another one")

            def heard():
                publisher.publish(channel, "after")
                pages.read(0.1)
                return page.data[-1] == "after" and resets(page)

            until(heard, "publisher and relay are at the other one", 30)
            for number in range(10):
                with closing(open_publisher("redis", address)) as another:
                    another.publish(channel, str(number))
            pages.until(lambda: page.data[-10:] == [*map(str, range(10))], "those that begin now are there too")
            assert len(resets(page)) == 1
            assert majority.listeners()
            assert not minority.listeners()
    finally:
        for each in sides:
            each.end()


@pytest.mark.parametrize("history", ["0", "100"])
def test_event_by_hand(group, tmp_path, pages, channel, history):
    """SPUBLISH on the channel's shard, PUBLISH anywhere."""
    with Relay(tmp_path, "--workers", "1", "--history", history, **group.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        group.owner(slot_of(channel)).client.execute_command("SPUBLISH", channel, "shard")
        got(pages, page, "shard")
        for number, each in enumerate(group.servers):
            each.client.publish(channel, str(number))
            pages.until(lambda number=number: page.data[-1] == str(number), "the event")


def test_channels_are_spread_over_the_shards(group, tmp_path, pages, channel):
    """Without a history, each event is on one server."""
    publisher = open_publisher("redis", group.url)
    names = [f"{channel}-{number}" for number in range(30)]
    with Relay(tmp_path, "--workers", "1", **group.environment) as relay:
        opened = pages.open(relay.port, [f"/channel={name}" for name in names])
        for name in names:
            publisher.publish(name, "x")
        pages.until(lambda: all(page.data == ["x"] for page in opened), "all events")
        heard = [each.client.execute_command("PUBSUB", "SHARDCHANNELS", f"{channel}-*") for each in group.servers[:3]]
        assert sum(map(len, heard)) == 30
        assert all(heard)
        published = [each.client.info("commandstats")["cmdstat_spublish"]["calls"] for each in group.servers[:3]]
        assert all(published)
        for page in opened:
            pages.close(page)
        until(
            lambda: (
                not [
                    name
                    for each in group.servers[:3]
                    for name in each.client.execute_command("PUBSUB", "SHARDCHANNELS", f"{channel}-*")
                ]
            ),
            "all are dropped",
            30,
        )
    publisher.close()


def test_servers_that_do_not_know_their_address(group, tmp_path):
    """As behind a load balancer: all are where the first one is."""
    for each in group.servers:
        each.client.config_set("cluster-preferred-endpoint-type", "unknown-endpoint")
    checked = run("check", cwd=tmp_path, **group.environment)
    for each in group.servers:
        each.client.config_set("cluster-preferred-endpoint-type", "ip")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_servers_without_spublish(old, tmp_path, pages, channel):
    """Redis 6: PUBLISH, with and without a history."""
    publisher = open_publisher("redis", old.url)
    with Relay(tmp_path, "--workers", "1", **old.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, "x")
        old.servers[0].client.publish(channel, "y")
        pages.until(lambda: {*page.data} == {"x", "y"}, "the events")
        with Relay(tmp_path, "--workers", "1", "--history", "100", **old.environment) as keeping:
            (first,) = pages.open(keeping.port, [f"/channel={channel}"])
            publisher.publish(channel, '{"data":"1"}')
            publisher.publish(channel, '{"data":"2"}')
            got(pages, first, "1", "2")
            got(pages, come_back(pages, keeping, channel, first.events[0].id), "2")
        pages.until(lambda: page.data[-1] == "2", "the other relay's stream")
    checked = run("check", cwd=tmp_path, **old.environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    publisher.close()


def test_check(group, tmp_path):
    """It looks at all masters, and for the history at the one that has it."""
    keeper = group.owner(HISTORY_SLOT)
    other = next(each for each in group.servers[:3] if each is not keeper)
    other.client.config_set("client-output-buffer-limit", "pubsub 1mb 1mb 60")
    other.client.config_set("maxmemory", "100mb")
    other.client.config_set("maxmemory-policy", "allkeys-lru")
    with Relay(tmp_path, "--workers", "1", "--history", "7", **group.environment) as relay:
        until(lambda: "the history is at" in relay.log, "there is a history")
        checked = run("check", "--history", "10", cwd=tmp_path, **group.environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"127.0.0.1:{keeper.port}: 7 events of each channel are kept" in checked.stdout
    assert re.search(
        rf"Redis \(used\): 127.0.0.1:{group.servers[0].port},.*, now at 127.0.0.1:{keeper.port}, .* an event took",
        checked.stdout,
    )
    for each in group.servers[:3]:
        level = "WARN" if each is other else "ok"
        assert re.search(rf"^{level} +Redis.*127.0.0.1:{each.port}: Redis keeps ", checked.stdout, re.MULTILINE)
    keeper.client.config_set("maxmemory", "100mb")
    keeper.client.config_set("maxmemory-policy", "allkeys-lru")
    assert findings(tmp_path, RELAY_HISTORY="10", **group.environment)["redis.eviction"]["level"] == "failure"
    for each in (keeper, other):
        each.client.config_set("maxmemory", "0")


def test_user_with_few_channels(group, tmp_path, pages, channel):
    """May listen to those alone; one that may not SSUBSCRIBE is refused, as it would miss events."""
    for each in group.servers:
        for user in (["few", "&few-*", "+@all"], ["none", "&*", "+@all", "-ssubscribe"]):
            each.client.execute_command("ACL", "SETUSER", *user, "on", ">pw", "~*")
    few, none = (group.url.replace("//", f"//{name}:pw@") for name in ("few", "none"))
    with (
        Relay(tmp_path, "--workers", "1", REDIS_URL=few) as relay,
        closing(open_publisher("redis", few)) as publisher,
    ):
        (page,) = pages.open(relay.port, [f"/channel=few-{channel}"])
        publisher.publish(f"few-{channel}", "x")
        got(pages, page, "x")
    done = run("--port", "0", cwd=tmp_path, REDIS_URL=none)
    assert (done.returncode, "ssubscribe" in done.stderr) == (78, True)


def test_cluster_that_is_none(redis_server, tmp_path):
    """The relay does not start on a single server, and says why."""
    address = redis_server.url.removesuffix("/0").replace("redis:", "redis+cluster:")
    done = run("--port", "0", cwd=tmp_path, REDIS_URL=address)
    assert done.returncode == 78
    assert "cluster support disabled" in done.stderr


def test_notify_in_django(group, tmp_path, pages, channel):
    """At the commit, to the channel's shard, from a process and those that it forks."""
    with Relay(tmp_path, "--workers", "1", **group.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        notify_in_django(group, tmp_path, channel)
        got(pages, page, *NOTIFIED)


def test_url():
    """Its hosts, and redis-py's options behind them."""
    parts = parse("rediss+cluster://u:p%40@a:7000,[::1]?ssl_ca_certs=/etc/ca.pem")
    assert (parts.addresses, parts.path) == ([("a", 7000), ("::1", 6379)], "")
    assert parts.url("", parts.options) == "rediss://u:p%40@localhost/?ssl_ca_certs=%2Fetc%2Fca.pem"


@pytest.mark.parametrize(
    "text", ["redis+cluster://", "redis+cluster:///0", "redis+cluster://a/1", "rediss+cluster://a/m/0"]
)
def test_url_that_names_no_cluster(text):
    """The error shows one that does."""
    with pytest.raises(SettingsError, match=r"redis\+cluster://user:password@host1:6379"):
        url.connection(text, "x")
