"""Redis Sentinel: the relay and notify() go where the master is."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import redis
from outages import Proxy
from pages import come_back, got, resets
from programs import program
from redis_group import NOTIFIED, Member, Sentinels, answers, notify_in_django, running
from relay import Relay, run, watched
from servers import PATIENCE, free_port, redis_binary, until
from storm import drill
from test_check import findings
from test_metrics import counted, named

from tornado_relay.brokers.redis import sentinel, url
from tornado_relay.brokers.redis.watch import LEAVE_SECONDS
from tornado_relay.errors import BrokerError, BrokerUnavailable, SettingsError
from tornado_relay.history.redis import RedisHistory
from tornado_relay.publish import open_publisher


@pytest.fixture
def group(home, channel):
    with running(Sentinels, home / f"group-{channel}") as group:
        yield group


@pytest.fixture(scope="module")
def steady(home):
    """A group whose master stays."""
    with running(Sentinels, home / "steady") as group:
        yield group


class Interrupted(Exception):
    """What a task's time limit raises."""


@contextmanager
def lonely(folder, master, *lines, password=None):
    """A Sentinel that knows no other, of a master on a port; yields its own port."""
    port = free_port()
    file = folder / "lonely.conf"
    file.write_text(
        "\n".join([f"port {port}", "bind 127.0.0.1", f"sentinel monitor mymaster 127.0.0.1 {master} 2", *lines])
    )
    process = subprocess.Popen([redis_binary(), file, "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port, password=password) as client:
            until(lambda: answers(client), "the Sentinel answers")
        yield port
    finally:
        process.kill()
        process.wait(PATIENCE)


def moved(group, old):
    """Wait until the Sentinels name another master than ``old``."""
    until(lambda: group.master() not in (None, old), "another master", 30)


def published(publisher, channel, payload):
    """Whether there is a master that takes an event."""
    with suppress(BrokerUnavailable):
        publisher.publish(channel, payload)
        return True
    return False


def listening(group, number):
    """Wait until so many workers listen to the master."""
    until(lambda: len(group.master().listeners()) == number, "the workers are there", 40)


def test_planned_fail_over_loses_nothing(group, tmp_path):
    """SENTINEL FAILOVER while 5,000 events are published."""

    def disturb():
        old = group.master()
        group.fail_over()
        moved(group, old)
        listening(group, 4)

    lacking, kept, _ = drill(group, tmp_path, disturb)
    assert lacking == 0
    assert all([reset["reason"] for reset in stream.resets] == ["history-lost"] for stream in kept)


def test_master_that_is_killed(group, tmp_path):
    """kill -9: what the replica had not got yet, and no relay had heard, would be told."""

    def disturb():
        old = group.master()
        old.stop("immediate")
        moved(group, old)
        listening(group, 4)

    _, kept, live = drill(group, tmp_path, disturb)
    assert all(stream.resets for stream in [*kept, *live])


def test_master_that_was_replaced_and_goes_on(group, tmp_path, pages, channel):
    """No Sentinel reaches it, and it is busy: neither listener nor publisher stay with it."""
    publisher = open_publisher("redis", group.url)
    with Relay(tmp_path, "--workers", "1", **group.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, "before")
        old = group.master()
        group.shut_sentinels_out(old)
        moved(group, old)
        assert old.client.role()[0] == b"master"

        def told():
            old.publish(channel, "old")
            return resets(page)

        pages.until(told, "the listener leaves")
        assert "the master is 127.0.0.1" in relay.log
        publisher.publish(channel, "new")
        pages.until(lambda: page.data[-1:] == ["new"], "an event of the new master")
        assert page.data[0] == "before"
        assert page.data.index("old") < page.data.index("new")
    publisher.close()


def test_sentinel_that_is_cut_off_is_not_believed(group, tmp_path, pages, channel):
    """It hears none of the others, is the first of the URL, and still names the old master."""
    for server in group.servers:
        server.client.acl_setuser("lonely", enabled=True, nopass=True, keys="*", channels="none", commands=["+@all"])
    old = group.master()
    lines = (f"requirepass {group.sentinel_password}", "sentinel auth-user mymaster lonely")
    lines += ("sentinel auth-pass mymaster x",)
    with lonely(tmp_path, old.port, *lines, password=group.sentinel_password) as port:
        address = group.url.replace("@", f"@127.0.0.1:{port},")
        publisher = open_publisher("redis", address)
        with Relay(tmp_path, "--workers", "1", REDIS_URL=address) as relay:
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, "before")
            got(pages, page, "before")
            group.shut_sentinels_out(old)
            moved(group, old)
            listening(group, 1)
            pages.until(lambda: resets(page), "the stream is told")
            publisher.publish(channel, "new")
            got(pages, page, "before", "new")
        publisher.close()


def test_publisher_leaves_a_replaced_master_before_listeners_do(group, tmp_path, pages, channel):
    """What it sends meanwhile is heard, on one server or the other."""
    publisher = open_publisher("redis", group.url)
    with Relay(tmp_path, "--workers", "1", "--history", "100", **group.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        old = group.master()
        sent = ["first"]
        publisher.publish(channel, '{"data":"first"}')
        group.shut_sentinels_out(old)
        # Asked now, they name no master.
        until(lambda: all(map(group.is_down_to, group.ports)), "the Sentinels miss it")

        def publish():
            sent.append(str(len(sent)))
            publisher.publish(channel, json.dumps({"data": sent[-1]}))
            time.sleep(0.01)
            return resets(page)

        pages.until(publish, "the listener leaves", 40)
        got(pages, page, *sent)
    publisher.close()


def test_master_that_stands_still(group, tmp_path, pages, channel):
    """As behind a cut cable: it is left, and when it is back it is nobody's master. Metrics say what happened."""
    publisher = open_publisher("redis", group.url)
    with watched(tmp_path, workers=1, **group.environment) as relay:
        (page,) = pages.open(relay.relay.port, [f"/channel={channel}"])
        old = group.master()
        old.freeze()
        moved(group, old)
        listening(group, 1)
        pages.until(lambda: resets(page), "the stream is told")
        old.thaw()
        until(old.follows, "it follows", 40)
        publisher.publish(channel, "x")
        got(pages, page, "x")
        assert counted(relay, "broker_reconnects") == {"": 1}
        assert counted(relay, "resets") == {"broker-reconnect": 1}
        told = relay.metrics()
        assert named(told, "sse_relay_broker_up") == {"0": 1}
        assert told["sse_relay_delivery_latency_seconds_count",] == 1
        until(lambda: named(relay.metrics(), "sse_relay_broker_probe_seconds").get("0"), "a probe of the new master")
    publisher.close()


def test_server_that_no_sentinel_knows_to_be_a_replica(group):
    """It was made one by hand, a moment ago; what it says of itself counts."""
    old = group.master()
    old.client.replicaof("127.0.0.1", group.other(old).port)
    with pytest.raises(redis.ConnectionError, match="is a slave, and no Sentinel says so yet"):
        url.connection(group.url, "x").connect()


@pytest.mark.parametrize(("command", "error"), [(b"ROLE", BrokerUnavailable), (b"EVALSHA", Interrupted)])
def test_late_reply_is_not_that_to_the_next_event(home, channel, command, error):
    """One is waited for too long, or until a task's time limit; the event after that is refused."""

    def interrupt(*_):
        raise Interrupted

    def interrupt_once_held():
        proxy.holds.wait(PATIENCE)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def thaw_once_sent(before):
        until(lambda: proxy.forwarded > before, "the next command")
        proxy.thaw()

    handler = signal.signal(signal.SIGUSR1, interrupt)
    folder = home / f"late-{channel}"
    server = Member(folder)
    with Proxy(server.port, slow=command) as proxy, lonely(folder, proxy.port) as port:
        server.client.acl_setuser(
            "mute", enabled=True, nopass=True, keys="*", channels="*", commands=["+@all", "-publish"]
        )
        publisher = open_publisher("redis", f"redis+sentinel://mute:x@127.0.0.1:{port}/mymaster?socket_timeout=2")
        proxy.freeze()
        if error is Interrupted:
            threading.Thread(target=interrupt_once_held).start()
        with pytest.raises(error):
            publisher.publish(channel, "x")
        threading.Thread(target=thaw_once_sent, args=(proxy.forwarded,)).start()
        with pytest.raises(BrokerError, match=r"can't run|permissions"):
            publisher.publish(channel, "y")
        publisher.close()
    signal.signal(signal.SIGUSR1, handler)
    server.end()


@pytest.mark.parametrize("own_id", ["", "mine"])
def test_event_that_was_not_handed_on_is_told_to_who_comes_back(group, tmp_path, pages, channel, own_id):
    """The master took it and died; the page, and the relay, had only heard those before it."""
    publisher = open_publisher("redis", group.url)
    fields = {"id": own_id} if own_id else {}
    with Relay(tmp_path, "--workers", "1", "--history", "100", **group.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, json.dumps({"data": "1", **fields}), own_id or None)
        got(pages, page, "1")
    old = group.master()
    replica = group.other(old)
    until(lambda: replica.client.xlen(f"sse-relay:events:{channel}") == 1, "the replica has it")
    replica.client.replicaof("127.0.0.1", free_port())
    publisher.publish(channel, '{"data":"lost"}')
    old.stop("immediate")
    moved(group, old)
    until(lambda: published(publisher, channel, '{"data":"2"}'), "all Sentinels name it")
    publisher.publish(channel, '{"data":"3"}')
    with Relay(tmp_path, "--workers", "1", "--history", "100", **group.environment) as relay:
        back = come_back(pages, relay, channel, page.events[0].id)
        pages.until(lambda: back.events, "an answer")
        assert resets(back) == [{"reason": "unknown-id", "channels": [channel]}]
        publisher.publish(channel, '{"data":"4"}')
        got(pages, back, "4")
        # What the new master took before a relay was there is as good as any.
        late = come_back(pages, relay, channel, "earliest")
        got(pages, late, "1", "2", "3", "4")
        again = come_back(pages, relay, channel, late.events[1].id)
        got(pages, again, "3", "4")
        assert not resets(again)
    publisher.close()


def test_master_that_is_elected_again_begins_anew(group, tmp_path, pages, channel):
    """No event came while the other one was it: what it had taken and not handed on is told all the same."""
    publisher = open_publisher("redis", group.url)
    with Relay(tmp_path, "--workers", "1", "--history", "100", **group.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, '{"data":"1"}')
        got(pages, page, "1")
    for _ in range(2):
        old = group.master()
        group.fail_over()
        moved(group, old)
        until(old.follows, "it follows", 40)
    with Relay(tmp_path, "--workers", "1", "--history", "100", **group.environment) as relay:
        back = come_back(pages, relay, channel, page.events[0].id)
        pages.until(lambda: back.events, "an answer")
        assert resets(back) == [{"reason": "unknown-id", "channels": [channel]}]
    publisher.close()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_sentinels_that_are_gone_cost_nothing(group, tmp_path, pages, channel, way):
    """The master that is known is used on, also on new connections."""
    publisher = open_publisher("redis", group.url)
    with Relay(tmp_path, "--workers", "1", **group.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, "0")
        for process in group.processes:
            process.send_signal(way)
        end = time.monotonic() + 2 * LEAVE_SECONDS + 1
        number = 0
        while time.monotonic() < end:
            number += 1
            publisher.publish(channel, str(number))
            publisher.close()
            pages.read(0.1)
        pages.until(lambda: len(page.data) == number + 1, "all events")
        assert not resets(page)
    publisher.close()


@pytest.mark.parametrize("text", ["redis+sentinel://a/m", "redis+cluster://a"])
def test_history_of_a_group_waits_for_its_server(text):
    """Before the worker's connection says which one it is, it goes nowhere."""
    history = RedisHistory(text, 10, 60.0, lambda: "")
    with pytest.raises(BrokerUnavailable, match="no server of the group is connected"):
        asyncio.run(history.open())


def test_passwords_of_servers_and_of_sentinels(steady, tmp_path, pages, channel):
    """Each has its own; relay, publisher and check use both, and show none."""
    checked = run("check", cwd=tmp_path, RELAY_HISTORY="10", **steady.environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"/mymaster, now at 127.0.0.1:{steady.master().port}, version" in checked.stdout
    with Relay(tmp_path, "--workers", "1", "--history", "10", **steady.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        sent = run("notify", channel, '{"data":"x"}', cwd=tmp_path, **steady.environment)
        assert sent.returncode == 0, sent.stderr
        got(pages, page, "x")
        shown = relay.log + checked.stdout + checked.stderr
    assert not [secret for secret in ("p@ss", "p%40ss", "s/ent", "s%2Fent") if secret in shown]


def test_check_looks_at_the_master(steady, tmp_path):
    """And not at its replica, of which it says nothing."""
    master, variables = steady.master(), steady.environment
    steady.other(master).client.config_set("client-output-buffer-limit", "pubsub 1mb 1mb 60")
    found = findings(tmp_path, "--workers", "2", RELAY_HISTORY="10", **variables)
    assert {name for name, each in found.items() if each["level"] != "ok" and name.startswith("redis")} == {
        "redis.persistence"
    }
    assert f"127.0.0.1:{master.port}: " in found["redis.history"]["text"]
    master.client.config_set("client-output-buffer-limit", "pubsub 1mb 1mb 60")
    master.client.config_set("maxmemory", "100mb")
    master.client.config_set("maxmemory-policy", "allkeys-lru")
    found = findings(tmp_path, "--workers", "2", RELAY_HISTORY="10", **variables)
    assert found["redis.pubsub-buffer"]["level"] == "warning"
    assert found["redis.eviction"]["level"] == "failure"
    master.client.config_set("maxmemory", "0")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("p%40ss", "wrong", "invalid username-password pair|WRONGPASS"),
        ("s%2Fent", "wrong", "no Sentinel names a master for 'mymaster': .*(WRONGPASS|invalid)"),
        ("sentinel_password", "other_password", "REDIS_URL has an option that cannot be used"),
        ("mymaster", "theirs", "no Sentinel names a master for 'theirs': known to a Sentinel is 'mymaster'"),
    ],
)
def test_what_is_wrong_is_said(steady, tmp_path, old, new, said):
    """By check, without a password."""
    checked = run("check", cwd=tmp_path, REDIS_URL=steady.url.replace(old, new))
    assert checked.returncode == 1
    assert re.search(said, checked.stdout + checked.stderr), checked.stdout + checked.stderr
    assert "p%40ss" not in checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("mymaster", "theirs", "no Sentinel names a master for 'theirs': known to a Sentinel is 'mymaster'"),
        ("s%2Fent", "wrong", "WRONGPASS|invalid username-password"),
        ("p%40ss", "wrong", "WRONGPASS|invalid username-password"),
    ],
)
def test_relay_does_not_start_on_what_cannot_be_mended(steady, tmp_path, old, new, said):
    """A name or a password that is wrong ends the command."""
    done = run("--port", "0", cwd=tmp_path, REDIS_URL=steady.url.replace(old, new))
    assert done.returncode == 78
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr


def test_relay_waits_for_sentinels(steady, tmp_path, pages, channel):
    """None can be reached at the start; when one can, streams open."""
    with socket.create_server(("127.0.0.1", 0)) as silent, Proxy(silent.getsockname()[1]) as proxy:
        address = re.sub("@.*/mymaster", f"@127.0.0.1:{proxy.port}/mymaster", steady.url)
        with Relay(tmp_path, "--workers", "1", REDIS_URL=address) as relay:
            until(lambda: "next try in" in relay.log, "the first try")
            assert "no Sentinel names a master for 'mymaster'" in relay.log
            proxy.lead_to(steady.ports[0])
            until(lambda: "Redis connected" in relay.log, "the relay is there")
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            steady.publish(channel, "x")
            got(pages, page, "x")


def test_tls_to_sentinels_and_servers(certificate, tmp_path, pages, channel):
    """Neither takes anything else; what the URL says of it is for both."""
    files = [f"tls-{name} {certificate}/{file}" for name, file in (("cert-file", "pem"), ("key-file", "key"))]
    files += [f"tls-ca-cert-file {certificate}/pem", "tls-auth-clients no"]
    port, sentinel_port = free_port(), free_port()
    configured = {
        "server": [f"tls-port {port}", 'save ""'],
        "sentinel": [
            f"tls-port {sentinel_port}",
            "tls-replication yes",
            f"sentinel monitor mymaster 127.0.0.1 {port} 1",
        ],
    }
    processes = []
    try:
        for name, lines in configured.items():
            file = tmp_path / f"{name}.conf"
            file.write_text("\n".join(["port 0", "bind 127.0.0.1", f"dir {tmp_path}", *files, *lines]))
            command = [program("redis-server"), file, *(["--sentinel"] if name == "sentinel" else [])]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        options = f"ssl_ca_certs={certificate}/pem&ssl_min_version=771&ssl_check_hostname=true"
        address = f"rediss+sentinel://127.0.0.1:{sentinel_port}/mymaster?{options}"
        publisher = open_publisher("redis", address)
        until(lambda: published(publisher, channel, "x"), "the master")
        with Relay(tmp_path, "--workers", "1", REDIS_URL=address) as relay:
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, "x")
            got(pages, page, "x")
        publisher.close()
        stranger = open_publisher("redis", address.replace("127.0.0.1", "localhost"))
        with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.publish(channel, "x")
        open_publisher("redis", address.replace("127.0.0.1", "localhost").replace("=true", "=false")).publish(
            channel, "x"
        )
    finally:
        for process in processes:
            process.kill()
            process.wait(PATIENCE)


def test_notify_in_django(steady, tmp_path, pages, channel):
    """At the commit, to the master, from a process and those that it forks."""
    with Relay(tmp_path, "--workers", "1", **steady.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        notify_in_django(steady, tmp_path, channel)
        got(pages, page, *NOTIFIED)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis+sentinel://a/m", ([("a", 26379)], "m", {}, "redis://localhost/")),
        (
            "redis+sentinel://u:p%40@a:1,[::1]:2/m/3?sentinel_username=s&sentinel_password=%26&socket_timeout=2",
            (
                [("a", 1), ("::1", 2)],
                "m",
                {"username": "s", "password": "&"},
                "redis://u:p%40@localhost/3?socket_timeout=2",
            ),
        ),
        (
            "rediss+sentinel://a/m?ssl_cert_reqs=none&ssl_min_version=771&ssl_check_hostname=false",
            (
                [("a", 26379)],
                "m",
                {"ssl": True, "ssl_cert_reqs": "none", "ssl_min_version": 771, "ssl_check_hostname": False},
                "rediss://localhost/?ssl_cert_reqs=none&ssl_min_version=771&ssl_check_hostname=false",
            ),
        ),
    ],
)
def test_url(text, expected):
    """What goes to the Sentinels, and what to the servers."""
    hosts, *others = sentinel.parse(text)
    assert (hosts.addresses, *others) == expected


@pytest.mark.parametrize(
    "text", ["redis+sentinel://a:1", "redis+sentinel://a:1/", "redis+sentinel://a/m/x", "redis+sentinel:///m"]
)
def test_url_that_names_no_group(text):
    """The error shows one that does."""
    with pytest.raises(SettingsError, match=r"redis\+sentinel://user:password@host1:26379"):
        url.connection(text, "x")


@pytest.mark.parametrize("text", ["redis+sentinel://[x]:1/m", "redis+sentinel://u:p?x@a:1/m", "redis+cluster://[x]:1"])
def test_url_that_cannot_be_read(text):
    """The error shows one that can, and nothing of a password."""
    with pytest.raises(SettingsError, match=r"^REDIS_URL cannot be read; give redis\+[a-z]+://user:password@host1"):
        url.connection(text, "x")


@pytest.mark.parametrize("text", ["rediss+sentinel://a/m?ssl_none=1", "redis+sentinel://a/m?none=1"])
def test_option_that_there_is_none_of(text):
    """The error names it."""
    with pytest.raises(SettingsError, match=r"REDIS_URL has an option that cannot be used: .*none"):
        url.pool(text, "x")
