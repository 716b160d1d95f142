"""A real PgBouncer in front of the server: what the relay needs of it, and what it says where it cannot have that."""

import re
from contextlib import closing

import pytest
from pages import got
from pooler import PgBouncer
from programs import program
from relay import Relay, run
from servers import free_port
from team import Project

from tornado_relay.publish import open_publisher


@pytest.fixture
def pooler(request, home, postgres_server):
    with PgBouncer(program("pgbouncer"), home, postgres_server, request.param) as running:
        yield running


session = pytest.mark.parametrize("pooler", ["session"], indirect=True)
# The modes that give LISTEN to whatever session is free.
mixing = pytest.mark.parametrize("pooler", ["transaction", "statement"], indirect=True)


@mixing
def test_relay_does_not_start_where_listen_is_lost(pooler, tmp_path):
    """It ends by itself, and says in a line what is wrong and what to set."""
    done = run("--host", "127.0.0.1", "--port", free_port(), "--workers", "2", cwd=tmp_path, DATABASE_URL=pooler.url)
    assert done.returncode == 78
    (reason,) = [line for line in done.stderr.splitlines() if "cannot start" in line]
    assert "a pooler in transaction mode; set RELAY_LISTEN_DATABASE_URL to the server itself" in reason
    assert "Traceback" not in done.stderr
    assert "listening on" not in done.stderr


@mixing
def test_check_tells(pooler, tmp_path):
    """Status 1, and the same advice."""
    done = run("check", cwd=tmp_path, DATABASE_URL=pooler.url)
    assert done.returncode == 1
    (reason,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert re.search("a pooler in transaction mode.*RELAY_LISTEN_DATABASE_URL", reason)


@mixing
def test_publishers_may_go_through_where_the_relay_does_not(pooler, tmp_path, pages, channel):
    """RELAY_LISTEN_DATABASE_URL is the server itself, and DATABASE_URL the pooler."""
    urls = {"DATABASE_URL": pooler.url, "RELAY_LISTEN_DATABASE_URL": pooler.server.url}
    checked = run("check", cwd=tmp_path, **urls)
    assert checked.returncode == 0, checked.stdout
    assert f"through the pooler at relay@127.0.0.1:{pooler.port}/relay" in checked.stdout
    with Relay(tmp_path, "--workers", "2", **urls) as relay:
        opened = pages.open(relay.port, [f"/channel={channel}"] * 4)
        with closing(open_publisher("postgres", pooler.url)) as publisher:
            publisher.publish(channel, '{"data":"through"}')
        pages.until(lambda: all(page.data == ["through"] for page in opened), "the event")


@mixing
def test_history_is_added_to_through_the_pooler(pooler, tmp_path, pages, channel):
    """A stream that comes back gets what it missed, in order."""
    pooler.server.execute(f'CREATE DATABASE "{channel}"')
    url = pooler.server.url.removesuffix("relay") + channel
    urls = {"DATABASE_URL": pooler.url_of(url), "RELAY_LISTEN_DATABASE_URL": url}
    done = run("init-db", cwd=tmp_path, **urls)
    assert done.returncode == 0, done.stderr
    with (
        Relay(tmp_path, "--workers", "2", RELAY_HISTORY="100", **urls) as relay,
        closing(open_publisher("postgres", urls["DATABASE_URL"])) as publisher,
    ):
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publisher.publish(channel, '{"data":"seen"}')
        pages.until(lambda: page.data == ["seen"], "the event")
        pages.close(page)
        for data in ("missed", "missed too"):
            publisher.publish(channel, f'{{"data":"{data}"}}')
        (back,) = pages.open(relay.port, [page.path], {"Last-Event-ID": page.parser.last_event_id})
        pages.until(lambda: back.data == ["missed", "missed too"], "what was missed")


@pytest.mark.parametrize("pooler", ["transaction"], indirect=True)
def test_two_connections_of_django_share_a_session(pooler, tmp_path, pages, channel):
    """psycopg 3 prepares what it runs often under names that the other has as well, unless Django forbids it, as it does."""
    project = Project(tmp_path, pooler.server)
    default = project.databases["default"]
    default |= {"PORT": pooler.port, "OPTIONS": {"server_side_binding": True}}
    project.databases["other"] = default
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=project.url) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        names = ("default", "other")
        project.python(f"for n in range(20):\n    notify({channel!r}, {{'data': str(n)}}, using={names}[n % 2])\n")
        got(pages, page, *map(str, range(20)))


@session
def test_session_of_its_own_through_a_pooler_is_enough(pooler, tmp_path, pages, channel):
    """In session mode LISTEN works, and nobody is accused."""
    checked = run("check", cwd=tmp_path, DATABASE_URL=pooler.url)
    assert checked.returncode == 0, checked.stdout
    with Relay(tmp_path, "--workers", "2", DATABASE_URL=pooler.url) as relay:
        opened = pages.open(relay.port, [f"/channel={channel}"] * 4)
        with closing(open_publisher("postgres", pooler.url)) as publisher:
            publisher.publish(channel, '{"data":"through"}')
        pages.until(lambda: all(page.data == ["through"] for page in opened), "the event")
        assert "pooler" not in relay.log
