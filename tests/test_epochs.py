"""Histories that have lost something: what is gone is said, and nothing new is taken for it."""

import json
import subprocess
from pathlib import Path

import pytest
from pages import come_back, data_of, got, resets
from relay import Relay, run
from servers import PostgresServer, RedisServer, execute, until

from tornado_relay.publish import open_publisher


@pytest.mark.parametrize("relay_lives", [True, False])
def test_broker_that_lost_its_data_is_a_new_epoch(home, tmp_path, pages, channel, relay_lives):
    """Redis without persistence: an id of before is told so, and gets none of the events of after."""
    folder = home / f"epoch-{channel}"
    folder.mkdir()
    server = RedisServer(folder)
    environment = {**server.environment, "RELAY_HISTORY": "100"}
    try:
        with Relay(tmp_path, "--workers", "1", **environment) as relay:
            publisher = open_publisher("redis", server.url)
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, '{"data":"lost"}')
            got(pages, page, "lost")
            if relay_lives:
                server.stop()
                server.start()
                pages.until(lambda: resets(page), "the open stream is told")
                assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]
                new_epoch(pages, relay, publisher, channel, page.events[0].id)
                got(pages, page, "lost", "new")
        if not relay_lives:
            server.stop()
            server.start()
            with Relay(tmp_path, "--workers", "1", **environment) as relay:
                new_epoch(pages, relay, publisher, channel, page.events[0].id)
    finally:
        server.stop()


def test_redis_that_was_set_back_is_a_new_epoch(home, tmp_path, pages, channel):
    """It starts from an older dump: who had what is lost is told, also later, and who had only what is there goes on."""
    folder = home / f"epoch-{channel}"
    folder.mkdir()
    server = RedisServer(folder)
    try:
        with Relay(tmp_path, "--workers", "1", **server.environment, RELAY_HISTORY="100") as relay:
            publisher = open_publisher("redis", server.url)
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, '{"data":"saved"}')
            server.client.save()
            for lost in ("lost 1", "lost 2"):
                publisher.publish(channel, json.dumps({"data": lost}))
            got(pages, page, "saved", "lost 1", "lost 2")
            server.stop("immediate")
            server.start()
            pages.until(lambda: resets(page), "the open stream is told")
            assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]
            saved, lost = page.events[0].id, page.events[1].id
            # The numbers that are drawn now are higher than the lost ones.
            publisher.publish(channel, '{"data":"higher"}')
            new_epoch(pages, relay, publisher, channel, lost)
            got(pages, come_back(pages, relay, channel, saved), "higher", "new")
    finally:
        server.stop()


def test_history_that_is_deleted_under_the_relay(kept, tmp_path, pages, channel):
    """FLUSHALL or DROP SCHEMA: streams are told with no event on their way, and the relay goes on without or anew."""
    server = kept.server
    if kept.kind == "redis":
        url = server.url.removesuffix("0") + "6"
    else:
        server.execute("CREATE DATABASE dropped")
        url = server.url.removesuffix("relay") + "dropped"
        assert run("init-db", cwd=tmp_path, DATABASE_URL=url).returncode == 0
    environment = {key: url for key in kept.environment if key.endswith("URL")}
    with Relay(tmp_path, "--workers", "1", **environment, RELAY_HISTORY="100") as relay:
        until(lambda: "the history is at" in relay.log, "the history is set up")
        publisher = open_publisher(kept.kind, url)
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, '{"data":"gone"}')
        got(pages, page, "gone")
        if kept.kind == "redis":
            server.client.execute_command("SELECT", 6)
            server.client.flushdb()
            server.client.execute_command("SELECT", 0)
        else:
            publisher.close()
            execute(url, "DROP SCHEMA sse_relay CASCADE")
        pages.until(lambda: resets(page), "the open stream is told", 30)
        assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]
        if kept.kind == "redis":
            publisher.publish(channel, '{"data":"next"}')
        else:  # notify() remembers for some seconds that there was a history
            execute(url, "SELECT pg_notify(%s, 'next')", channel)
        got(pages, page, "gone", "next")


def test_database_that_was_set_back_is_a_new_epoch(home, tmp_path, pages, channel):
    """A copy of its files from before is put in place: ids that are drawn again are not taken for the first ones."""
    folder = home / f"epoch-{channel}"
    folder.mkdir(mode=0o755)
    server = PostgresServer(folder)
    environment = {**server.environment, "RELAY_HISTORY": "100"}
    data, copy = server.cluster.data, server.cluster.data.with_name("copy")
    try:
        assert run("init-db", cwd=tmp_path, **server.environment).returncode == 0
        publisher = open_publisher("postgres", server.url)
        publisher.publish(channel, '{"data":"true"}')
        true = publisher.newest()
        server.stop()
        _copy(data, copy)
        server.start()
        with Relay(tmp_path, "--workers", "1", **environment) as relay:
            until(lambda: "the history is at" in relay.log, "the relay is there")
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            publisher.publish(channel, '{"data":"lost"}')
            got(pages, page, "lost")
            server.stop()
            data.rename(data.with_name("set aside"))
            _copy(copy, data)
            server.start()
            pages.until(lambda: resets(page), "the open stream is told")
            assert resets(page) == [{"reason": "history-lost", "channels": [channel]}]
            new_epoch(pages, relay, publisher, channel, page.events[0].id)
            assert publisher.newest().partition("-")[2] == page.events[0].id.partition("-")[2]
            got(pages, come_back(pages, relay, channel, true), "new")
    finally:
        server.stop("immediate")


def test_sequence_that_is_set_back_is_no_new_epoch(kept_postgres, tmp_path, pages, channel):
    """ALTER SEQUENCE ... RESTART under a running relay: publishers go on, and so do streams, without a reset."""
    with Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        kept_postgres.publish(channel, "1", "2", "3")
        got(pages, page, "1", "2", "3")
        kept_postgres.execute("ALTER SEQUENCE sse_relay.event_id RESTART")
        back = come_back(pages, relay, channel, page.events[1].id)
        got(pages, back, "3")
        kept_postgres.publish(channel, "4", "5", "6")
        for each in (page, back, come_back(pages, relay, channel, page.events[0].id)):
            pages.until(lambda each=each: data_of(each)[-1:] == ["6"], "all events")
            assert not resets(each)
        got(pages, page, "1", "2", "3", "4", "5", "6")
        got(pages, back, "3", "4", "5", "6")
        got(pages, come_back(pages, relay, channel, page.events[3].id), "5", "6")


def _copy(source: Path, target: Path):
    subprocess.run(["cp", "-a", source, target], check=True)


def new_epoch(pages, relay, publisher, channel, old_id):
    back = come_back(pages, relay, channel, old_id)
    pages.until(lambda: back.events, "an answer")
    assert resets(back) == [{"reason": "unknown-id", "channels": [channel]}]
    publisher.publish(channel, '{"data":"new"}')
    got(pages, back, "new")
