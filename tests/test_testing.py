"""A team's own tests with tornado_relay.testing: run by Django's runner and by pytest, in a project of theirs."""

import subprocess
import sys

import pytest
from relay import environment
from servers import PATIENCE
from team import Project
from test_readme import block

from tornado_relay import RelayError, SettingsError
from tornado_relay.testing import live_relay

CAPTURE = """
from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase
from tornado_relay import EventError, SettingsError, notify
from tornado_relay.testing import capture_events
from shop.models import Customer, Order

A, B, C = ("a", {"event": "x", "data": {"n": [1, None]}}), ("b", {"data": "b"}), ("c", {"id": 3})


def rolled_back(*call, savepoint=True):
    try:
        with transaction.atomic(savepoint=savepoint):
            notify(*call)
            raise RuntimeError
    except RuntimeError:
        pass


class Both:
    def test_events_of_a_block(self):
        notify("before", {"data": 1})
        with capture_events() as events:
            notify(*A)
            self.assertEqual(events, [A])
            rolled_back(*B)
            with transaction.atomic():
                notify(*C)
                rolled_back(*B)
                notify(*A)
            self.assertEqual([each.channel for each in events], ["a", "c", "a"])
        notify("after", {"data": 1})
        self.assertEqual(events, [A, C, A])
        self.assertEqual((len(events), events[1].event, repr(events[1:2])), (3, {"id": 3}, repr([C]).replace("(", "Notified(channel=").replace(", {", ", event={")))

    def test_what_is_wrong_is_raised(self):
        with capture_events() as events, self.assertRaises(EventError):
            notify("a", {"wrong": 1})
        self.assertEqual(events, [])

    def test_rows(self):
        ann = Customer.objects.create(name="Ann")
        with self.assertRaisesRegex(SettingsError, "known are default"), capture_events():
            notify("a", {"data": 1}, using="other")
        with capture_events() as events:
            notify("orders", {"data": 1}, using="default")
        self.assertEqual(len(events), 1)
        with capture_events() as events:
            order = Order.objects.create(customer=ann, total=1)
        self.assertEqual(events[0].channel, "orders")
        self.assertEqual(events[0].event["event"], "order.created")


class InTestCase(Both, TestCase):
    def test_callbacks_that_are_run(self):
        with capture_events() as events:
            with self.captureOnCommitCallbacks(execute=True):
                notify(*A)
                transaction.on_commit(lambda: notify(*B))
            notify(*C)
        self.assertEqual(events, [A, B, C])


class InTransactionTestCase(Both, TransactionTestCase):
    def test_transaction_that_is_rolled_back(self):
        with capture_events() as events:
            try:
                with transaction.atomic():
                    notify(*A)
                    rolled_back(*B)
                    raise RuntimeError
            except RuntimeError:
                pass
        self.assertEqual(events, [])
"""

LIVE = """
from django.conf import settings
from django.test import TransactionTestCase
from tornado_relay import BrokerUnavailable, notify
from tornado_relay.address import stream_url
from tornado_relay.testing import Stream, live_relay


class Live(TransactionTestCase):
    def test_event_reaches_a_stream(self):
        with live_relay(RELAY_MAX_CONNECTIONS="10", RELAY_HEARTBEAT="1") as relay, relay.stream("a", "b") as stream:
            notify("b", {"event": "paid", "data": {"n": 1}})
            received = stream.next()
            self.assertEqual((received.event, received.data), ("paid", '{"n":1}'))
            self.assertEqual(settings.SSE_RELAY["RELAY_URL"], relay.url)
            with Stream(stream_url(["a"]), timeout=1.5) as other, self.assertRaisesRegex(BrokerUnavailable, "within 1.5 s"):
                other.next()
        self.assertNotIn("RELAY_URL", settings.SSE_RELAY)
"""

FIXTURES = """
from tornado_relay import notify

def test_captured(sse_events):
    notify("a", {"data": 1})
    assert sse_events == [("a", {"data": 1})]

def test_live(sse_relay):
    with sse_relay.stream("a") as stream:
        notify("a", {"data": "hello"})
        assert stream.next().data == "hello"
"""


@pytest.fixture
def project(tmp_path, postgres_server):
    return Project(tmp_path, postgres_server)


@pytest.mark.parametrize("broker", ["psycopg2", "psycopg", "redis", "files"])
def test_what_a_block_notified_is_captured(project, tmp_path, broker):
    """In TestCase and TransactionTestCase; on PostgreSQL, for Redis without one, and on SQLite with no broker at all."""
    if broker.startswith("psycopg"):
        project.driver = broker
    elif broker == "redis":
        project.sse_relay = {"REDIS_URL": "redis://127.0.0.1:1"}
    else:
        project.databases["default"] = project.databases[broker]
    code = CAPTURE
    if broker in {"redis", "files"}:  # outside of a capture there is nothing to send to
        code = code.replace('notify("before", {"data": 1})', "").replace('notify("after", {"data": 1})', "")
    (tmp_path / "shop/tests.py").write_text(code)
    assert "Ran 8 tests" in project.run("test", "shop")


@pytest.mark.parametrize("broker", ["psycopg", "redis"])
def test_live_relay(project, redis_server, tmp_path, broker):
    """On the test's own database, with the secret of the project."""
    project.sse_relay = {"RELAY_JWT_SECRET": "s" * 32}
    if broker == "redis":
        project.sse_relay["REDIS_URL"] = redis_server.url
    (tmp_path / "shop/tests.py").write_text(LIVE)
    assert "Ran 1 test" in project.run("test", "shop")


def test_tests_as_the_pages_have_them(project, tmp_path):
    """They pass."""
    (tmp_path / "shop/tests.py").write_text(block("python", "# tests.py"))
    assert "Ran 2 tests" in project.run("test", "shop")


def test_fixtures(broker, tmp_path):
    """Without Django, in a suite that names the plugin."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tornado_relay.testing.fixtures"]\n')
    (tmp_path / "test_ours.py").write_text(FIXTURES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:tornado", "test_ours.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(**broker.environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_live_relay_that_cannot_start_says_why(monkeypatch, redis_server):
    """By its log; and where there is no broker, by that."""
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    with pytest.raises(RelayError, match="RELAY_HISTORY: 'many'"), live_relay(RELAY_HISTORY="many"):
        pass
    monkeypatch.delenv("REDIS_URL")
    with pytest.raises(SettingsError, match="no broker"), live_relay():
        pass
