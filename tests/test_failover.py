"""Two PostgreSQL servers in one URL, of which the standby takes the primary's place."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
from outages import Proxy, end_listeners
from pages import come_back, got, resets
from pair import Pair, url_of
from pooler import PgBouncer
from programs import program
from psycopg2.extensions import parse_dsn
from relay import Relay, run
from servers import PATIENCE, execute, free_port, until
from storm import is_part, storm
from team import Project
from test_history import listeners

from tornado_relay import BrokerError, BrokerUnavailable
from tornado_relay.publish import open_publisher


@contextmanager
def running_pair(home, name, folder):
    path = home / f"pair-{name}"
    path.mkdir(mode=0o755)
    pair = Pair(path)
    try:
        assert run("init-db", cwd=folder, **pair.environment).returncode == 0
        yield pair
    finally:
        pair.stop()


@pytest.fixture
def pair(home, channel, tmp_path):
    """Two servers of the test's own, with a history."""
    with running_pair(home, channel, tmp_path) as pair:
        yield pair


@pytest.fixture(scope="module")
def lasting(home, tmp_path_factory):
    """Two servers that stay what they are, with a history."""
    with running_pair(home, "lasting", tmp_path_factory.mktemp("lasting")) as pair:
        yield pair


def newest(pair):
    return pair.execute("SELECT coalesce(max(id), 0) FROM sse_relay.event")[0][0]


def test_synchronous_standby_takes_over(pair, tmp_path):
    """A crash, and a planned change back: nothing lost, doubled or out of order with a history, and no gap unsaid without."""

    def disturb(relays, fleets):
        for mode in ("immediate", "fast"):
            pair.synchronise()
            begun = newest(pair)
            until(lambda begun=begun: newest(pair) >= begun + 1000, "a thousand events")
            pair.primary.stop(mode)
            pair.promote()
            until(lambda: len(listeners(pair)) == 4, "all workers are back", 40)
            if mode == "immediate":
                pair.rejoin()

    storm(pair, tmp_path, disturb)


def test_standby_that_had_not_got_all_takes_over(pair, tmp_path, pages, channel):
    """Who had what is lost is told, now and later, and gets none of the events of after for it; who had not, goes on."""
    publisher = open_publisher("postgres", pair.url)
    with (
        Relay(tmp_path, "--workers", "1", **pair.environment, RELAY_HISTORY="100") as relay,
        Relay(tmp_path, "--workers", "1", **pair.environment, RELAY_HISTORY="0") as plain,
    ):
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        (other,) = pages.open(plain.port, [f"/channel={channel}"])
        lose_two(pair, publisher, channel)
        got(pages, page, "kept", "lost 1", "lost 2")
        kept, _, lost = (event.id for event in page.events)
        until(lambda: "read-only" in relay.log, "the standby is no place to listen")
        with pytest.raises(BrokerUnavailable, match=f"{pair.primary.port}.* refused.*{pair.standby.port}.*read-only"):
            publisher.publish(channel, '{"data":"refused"}')
        with Relay(tmp_path, "--workers", "1", **pair.environment, RELAY_HISTORY="100") as late:
            (answer,) = pages.open(late.port, ["/readyz"])
            pages.until(lambda: answer.closed or answer.body, "the reason")
            assert (answer.status, b"read-only" in answer.body) == (503, True)
            pair.promote()
            pages.until(lambda: resets(page) and resets(other), "the open streams are told")
            publisher.publish(channel, '{"data":"new"}')
            got(pages, page, "kept", "lost 1", "lost 2", "new")
            got(pages, other, "kept", "lost 1", "lost 2", "new")
            assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]
            assert resets(other) == [{"reason": "broker-reconnect", "channels": [channel]}]
            until(lambda: "the history is at" in late.log, "the second relay is there")
            for each in (relay, late):
                back = come_back(pages, each, channel, lost)
                pages.until(lambda back=back: back.events, "an answer")
                assert resets(back) == [{"reason": "unknown-id", "channels": [channel]}]
                got(pages, come_back(pages, each, channel, kept), "new")


def test_loss_is_said_although_the_new_primary_is_lost_as_well(pair, tmp_path, pages, channel):
    """Events of the new primary came, but its history could not be opened before the next loss."""
    publisher = open_publisher("postgres", pair.url)
    with Relay(tmp_path, "--workers", "1", **pair.environment, RELAY_HISTORY="100") as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        pair.execute("ALTER FUNCTION sse_relay.open() RENAME TO set_aside")
        lose_two(pair, publisher, channel)
        got(pages, page, "kept", "lost 1", "lost 2")
        pair.promote()
        until(lambda: "the history cannot be read" in relay.log, "the relay is there")
        publisher.publish(channel, '{"data":"new"}')
        tries = relay.log.count("the history cannot be read")
        until(lambda: relay.log.count("the history cannot be read") > tries + 1, "the relay has heard the event")
        pair.execute("ALTER FUNCTION sse_relay.set_aside() RENAME TO open")
        end_listeners(pair)
        pages.until(lambda: resets(page), "the stream is told")
        assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]


def test_numbers_go_on_in_a_database_that_was_made_from_a_template(pair, channel):
    """PostgreSQL lets its standby draw numbers again there: none of an event that is kept."""
    pair.execute("SELECT sse_relay.publish('a', '{}', NULL)")
    pair.execute("CREATE DATABASE copied TEMPLATE relay")

    def execute_there(server, statement):
        return execute(f"{server.url.removesuffix('relay')}copied", statement)

    last = "SELECT max(id) FROM sse_relay.event"
    for _ in range(5):
        execute_there(pair.primary, "SELECT sse_relay.publish('a', '{}', NULL)")
    assert execute_there(pair.primary, last) == [(6,)]
    pair.catch_up()
    pair.primary.stop("immediate")
    pair.promote()
    execute_there(pair.primary, "SELECT sse_relay.publish('a', '{}', NULL)")
    assert execute_there(pair.primary, last)[0][0] > 6


def lose_two(pair, publisher, channel):
    """Let the primary crash with two events that its standby has not got."""
    publisher.publish(channel, '{"data":"kept"}')
    until(
        lambda: pair.standby.execute("SELECT max(id) FROM sse_relay.event") == [(newest(pair),)], "the standby has it"
    )
    pair.standby.stop()
    for number in (1, 2):
        publisher.publish(channel, json.dumps({"data": f"lost {number}"}))
    pair.primary.stop("immediate")
    pair.standby.start()


@pytest.mark.parametrize(
    ("first", "commands"), [("standby", ("init-db", "check")), ("away", ("init-db", "check")), ("silent", ())]
)
def test_first_server_of_the_url_takes_no_writes(lasting, tmp_path, pages, channel, first, commands):
    """The relay, notify(), init-db and check all find the one that does, and show no password."""
    takes = lasting.primary.port
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = {"standby": lasting.standby.port, "away": free_port(), "silent": silent.getsockname()[1]}[first]
        url = lasting.primary.url.replace("127.0.0.1:", f"127.0.0.1:{port},127.0.0.1:") + "?connect_timeout=2"
        for command in commands:
            done = run(command, cwd=tmp_path, DATABASE_URL=url)
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"relay@127.0.0.1:{port},127.0.0.1:{takes}/relay" in done.stdout
            assert (command == "check") == (f", of which 127.0.0.1:{takes} takes writes, version" in done.stdout)
            assert parse_dsn(url)["password"] not in done.stdout + done.stderr
        with Relay(tmp_path, "--workers", "1", DATABASE_URL=url, RELAY_HISTORY="100") as relay:
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            with closing(open_publisher("postgres", url)) as publisher:
                publisher.publish(channel, '{"data":"through"}')
            got(pages, page, "through")
            assert f"connected to relay@127.0.0.1:{takes}/relay" in relay.log


def test_standby_that_the_url_allows_is_passed_over(lasting, tmp_path, pages, channel):
    """target_session_attrs=any lets the relay in there, but LISTEN fails."""
    url = url_of(lasting.standby, lasting.primary) + "?target_session_attrs=any"
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=url) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        lasting.publish(channel, "heard")
        got(pages, page, "heard")


def test_primary_whose_synchronous_standby_is_away_keeps_its_relay(pair, tmp_path, pages, channel):
    """Nothing commits there, but what is kept can be read, and the relay leaves no sessions that wait behind it."""
    with closing(open_publisher("postgres", pair.url)) as publisher:
        publisher.publish(channel, '{"data":"kept"}')
    pair.synchronise()
    pair.standby.stop()
    pair.primary.stop()
    pair.primary.start()
    with Relay(tmp_path, "--workers", "2", **pair.environment, RELAY_HISTORY="100") as relay:
        got(pages, come_back(pages, relay, channel, "earliest"), "kept")
        assert not pair.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        assert "cannot be read" not in relay.log


@pytest.mark.parametrize("held", ["the question before it", "the event"])
def test_only_what_was_surely_not_sent_is_sent_again(lasting, monkeypatch, tmp_path, pages, channel, held):
    """The first server goes away without a word; a publisher asks anew now and then whether there is a history."""
    with (
        Proxy(lasting.primary.port) as proxy,
        Relay(tmp_path, "--workers", "1", DATABASE_URL=lasting.url) as relay,
        ThreadPoolExecutor(1) as executor,
    ):
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        url = lasting.primary.url.replace("127.0.0.1:", f"127.0.0.1:{proxy.port},127.0.0.1:")
        with closing(open_publisher("postgres", url)) as publisher:
            if held != "the event":
                monkeypatch.setattr("tornado_relay.brokers.postgres.publisher.REMEMBER_SECONDS", 0.0)
            publisher.publish(channel, '{"data":"before"}')
            proxy.freeze()
            publishing = executor.submit(publisher.publish, channel, '{"data":"after"}')
            until(proxy.holds.is_set, "something is on its way")
            proxy.cut()
            if held == "the event":
                with pytest.raises(BrokerError, match="may be lost"):
                    publishing.result(PATIENCE)
            else:
                publishing.result(PATIENCE)
            publisher.publish(channel, '{"data":"last"}')
        got(pages, page, *(["before", "last"] if held == "the event" else ["before", "after", "last"]))


@pytest.fixture
def poolers(home, lasting):
    """One in front of either server."""
    with (
        PgBouncer(program("pgbouncer"), home, lasting.primary, "transaction") as first,
        PgBouncer(program("pgbouncer"), home, lasting.standby, "transaction") as second,
    ):
        yield first, second


def test_publisher_leaves_a_pooler_whose_server_is_a_standby_now(lasting, poolers, tmp_path, pages, channel):
    """Its connection to the pooler lives on; the standby takes nothing, so the event is sent once more, elsewhere."""
    first, second = poolers
    url = first.url.replace(f":{first.port}/", f":{first.port},127.0.0.1:{second.port}/")
    with (
        Relay(tmp_path, "--workers", "1", DATABASE_URL=lasting.url) as relay,
        closing(open_publisher("postgres", url)) as publisher,
    ):
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, '{"data":"before"}')
        first.lead_to(lasting.standby)
        second.lead_to(lasting.primary)
        publisher.publish(channel, '{"data":"after"}')
        got(pages, page, "before", "after")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_django_finds_the_server_that_takes_writes(lasting, tmp_path, pages, channel, driver):
    """By HOST, PORT and OPTIONS, as docs/failover.md has it."""
    project = Project(tmp_path, lasting.primary)
    default = project.databases["default"]
    default.update(HOST="127.0.0.1,127.0.0.1", PORT=f"{lasting.standby.port},{lasting.primary.port}")
    default["OPTIONS"] = {"target_session_attrs": "read-write", "connect_timeout": 5}
    project.driver = driver
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=project.url) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project.python(f"notify({channel!r}, {{'data': 'through'}})")
        got(pages, page, "through")


_KEPT = "SELECT payload FROM sse_relay.event WHERE channel = 'orders' ORDER BY id"

NUMBERS = """
import time
import django
django.setup()
from django.db import Error, connection, transaction
from tornado_relay import notify

for number in range(1500):
    try:
        with transaction.atomic():
            notify("orders", {"data": f"{number}:" + "x" * (20_000 if number % 50 == 0 else 10)})
    except Error:
        connection.close()
        time.sleep(0.01)
    else:
        print(number)
"""


def test_django_behind_a_pooler_that_follows_the_promotion(pair, home, tmp_path, pages):
    """In transaction mode: what Django committed arrives, large events too, once and in order, and no stream is told otherwise."""
    project = Project(tmp_path, pair.primary)
    project.run("migrate", "sse_relay")
    name = project.url.rpartition("/")[2]

    def kept():
        return execute(f"{pair.primary.url.removesuffix('relay')}{name}", _KEPT)

    pair.synchronise()
    with PgBouncer(program("pgbouncer"), home, pair.primary, "transaction") as pooler:
        project.databases["default"]["PORT"] = pooler.port
        urls = {
            "DATABASE_URL": pooler.url_of(project.url),
            "RELAY_LISTEN_DATABASE_URL": pair.url.removesuffix("relay") + name,
        }
        with Relay(tmp_path, "--workers", "1", **urls, RELAY_HISTORY="10000") as relay:
            checked = run("check", cwd=tmp_path, **urls)
            assert f" ms through the pooler at relay@127.0.0.1:{pooler.port}/{name}" in checked.stdout
            (page,) = pages.open(relay.port, ["/channel=orders"])
            process = project.start("-c", NUMBERS)
            pages.until(lambda: len(page.events) > 300, "some events")
            pair.primary.stop("immediate")
            pair.promote()
            pooler.lead_to(pair.primary)
            pages.until(lambda: process.poll() is not None, "all are published")
            published, errors = process.communicate()
            assert process.returncode == 0, errors
            truth = [json.loads(payload)["data"] for (payload,) in kept()]
            pages.until(lambda: page.data[-1:] == truth[-1:], "the last event")
            assert page.data == truth
            numbers = [data.partition(":")[0] for data in truth]
            assert is_part(published.split(), numbers)
            assert numbers[-1] == "1499"
            assert not resets(page)
