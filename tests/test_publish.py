"""notify(): both brokers, outside and inside Django, threads, forks, restarts."""

import json
import os
import subprocess
import sys
import threading
import time

import psycopg2
import pytest
import redis
from relay import ROOT, environment
from servers import PATIENCE, PostgresServer, RedisServer, until

import tornado_relay
from tornado_relay import BrokerError, BrokerUnavailable, ChannelError, EventError, SettingsError, notify


class Listener:
    """What arrives on one channel of a broker, without a relay."""

    def __init__(self, broker, channel):
        self.broker = broker
        if broker.kind == "postgres":
            self.connection = psycopg2.connect(broker.url)
            self.connection.autocommit = True
            with self.connection.cursor() as cursor:
                cursor.execute(f'LISTEN "{channel}"')
        else:
            self.connection = redis.Redis.from_url(broker.url)
            self.pubsub = self.connection.pubsub()
            self.pubsub.subscribe(channel)
            self.pubsub.get_message(timeout=PATIENCE)
        self.got = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.broker.kind == "redis":
            self.pubsub.close()
        self.connection.close()

    def read(self):
        if self.broker.kind == "postgres":
            self.connection.poll()
            self.got += [notify.payload for notify in self.connection.notifies]
            self.connection.notifies.clear()
        else:
            while message := self.pubsub.get_message(timeout=0.01):
                self.got.append(message["data"].decode())
        return [json.loads(payload) for payload in self.got]

    def wait(self, count):
        until(lambda: len(self.read()) >= count, f"{count} events")
        return self.read()


@pytest.fixture
def configured(broker, monkeypatch, tmp_path):
    """The process's environment names the broker, as an application's would."""
    monkeypatch.chdir(tmp_path)
    for name in ("REDIS_URL", "DATABASE_URL", "RELAY_USE_PG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in broker.environment.items():
        monkeypatch.setenv(name, value)
    return broker


@pytest.fixture
def listener(configured, channel):
    with Listener(configured, channel) as opened:
        yield opened


def test_event_arrives_as_json(listener, channel):
    """What notify() took is on the broker for any reader of JSON."""
    notify(channel=channel, sse_payload={"event": "e", "id": 1, "data": {"a": [1, "é"]}})
    assert listener.wait(1) == [{"event": "e", "id": 1, "data": {"a": [1, "é"]}}]


def test_predecessors_import_works(listener, channel):
    """from sse_relay_server import notify."""
    import sse_relay_server

    sse_relay_server.notify(channel, {"data": "x"})
    assert listener.wait(1) == [{"data": "x"}]


@pytest.mark.parametrize(
    ("channel", "payload", "error"), [("", {"data": "x"}, ChannelError), ("c", {"id": "a\nb"}, EventError)]
)
def test_nothing_is_sent_of_a_call_that_is_wrong(configured, channel, payload, error):
    """Both are checked before a broker is even looked for."""
    with pytest.raises(error):
        notify(channel, payload)


def test_threads_share_one_connection(listener, channel, monkeypatch):
    """20 threads, 25 events each: none lost, none garbled, one session on PostgreSQL."""
    broker = listener.broker
    if broker.kind == "postgres":
        monkeypatch.setenv("DATABASE_URL", f"{broker.url}?application_name={channel}")

    def publish(thread):
        for number in range(25):
            notify(channel, {"data": f"{thread}-{number}"})

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {event["data"] for event in listener.wait(500)} == {f"{n}-{i}" for n in range(20) for i in range(25)}
    if broker.kind == "postgres":
        assert broker.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", channel) == [(1,)]


def test_forked_child_has_its_own_connection(listener, channel):
    """A child may notify at once, also while a thread of the parent does, and its end harms no one."""
    notify(channel, {"data": "before"})
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [notify(channel, {"data": "busy"}) for _ in iter(stop.is_set, True)])
    busy.start()
    code = 0
    for _ in range(5):
        pid = os.fork()
        if not pid:
            try:
                notify(channel, {"data": "child"})
                os._exit(0)
            finally:
                os._exit(1)
        code = code or os.waitpid(pid, 0)[1]
    stop.set()
    busy.join()
    notify(channel, {"data": "after"})
    assert code == 0
    until(lambda: [event["data"] for event in listener.read()][-1] == "after", "the parent's last event")
    assert [event["data"] for event in listener.read()].count("child") == 5


@pytest.mark.parametrize("server_class", [PostgresServer, RedisServer])
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_between_two_calls_is_not_noticed(server_class, mode, home, monkeypatch, tmp_path):
    """The second call finds that its connection is dead before it sends, and opens another."""
    folder = home / f"restart-{server_class.__name__}-{mode}"
    folder.mkdir(mode=0o755)
    server = server_class(folder)
    try:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("REDIS_URL", raising=False)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        notify("c", {"data": "before"})
        server.stop(mode)
        with pytest.raises(BrokerUnavailable):
            notify("c", {"data": "meanwhile"})
        server.start()
        with Listener(server, "c") as listener:
            notify("c", {"data": "after"})
            assert listener.wait(1) == [{"data": "after"}]
    finally:
        server.stop("immediate")


def test_connection_that_breaks_while_an_event_is_sent_is_said_and_not_retried(postgres_server, channel):
    """Whether the event went out cannot be known then; trying again could double it."""
    from tornado_relay.publish import open_publisher

    publisher = open_publisher("postgres", postgres_server.url)
    publisher.publish(channel, "{}")
    (pid,) = postgres_server.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'sse-relay-notify' ORDER BY backend_start DESC LIMIT 1"
    )[0]
    blocker = psycopg2.connect(postgres_server.url)
    with blocker.cursor() as cursor:  # holds the lock that every notifying commit takes
        cursor.execute("SELECT pg_notify('x', '')")
        lock = "LOCK TABLE pg_catalog.pg_class IN ACCESS SHARE MODE"
        cursor.execute(lock)
        os.kill(pid, 19)  # SIGSTOP: the statement is sent, and no answer comes
        errors = []

        def publish():
            try:
                publisher.publish(channel, "{}")
            except BrokerError as exc:
                errors.append(exc)

        thread = threading.Thread(target=publish)
        thread.start()
        time.sleep(0.2)  # the statement is in the socket's buffer: there is nothing to wait for
        os.kill(pid, 15)
        os.kill(pid, 18)
        thread.join(PATIENCE)
    blocker.close()
    assert "may be lost" in str(errors[0])
    publisher.publish(channel, "{}")
    publisher.close()


def test_without_a_broker_the_error_says_what_to_set(monkeypatch, tmp_path):
    """No traceback of a driver, no default that reaches nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("REDIS_URL", "DATABASE_URL", "RELAY_USE_PG"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match=r"REDIS_URL.*DATABASE_URL"):
        notify("c", {"data": "x"})
    with pytest.raises(SettingsError, match="Django is not set up"):
        notify("c", {"data": "x"}, using="other")


def test_env_file_of_the_working_directory_is_read(broker, channel, tmp_path):
    """As the predecessor did, but at the first call and not at the import."""
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in broker.environment.items()))
    with Listener(broker, channel) as listener:
        code = f"from tornado_relay import notify; notify({channel!r}, {{'data': 'x'}})"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
        assert listener.wait(1) == [{"data": "x"}]


def test_import_starts_nothing_and_loads_no_driver():
    """Django imports the package for notify() alone: no loop, no driver, no thread, no look at the environment."""
    code = """
import os, sys, threading
class Watched(dict):
    def get(self, key, default=None):
        raise SystemExit(f'environment read: {key}')
    __getitem__ = get
environ, os.environ = os.environ, Watched()
import tornado_relay, sse_relay_server
os.environ = environ
loaded = [name for name in ('tornado', 'asyncio', 'psycopg2', 'redis', 'django', 'dotenv') if name in sys.modules]
assert not loaded, loaded
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment())


@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_notify_loads_no_tornado(kind, request, tmp_path):
    """Not even when it is called."""
    server = request.getfixturevalue(f"{kind}_server")
    code = (
        "import sys; from tornado_relay import notify; notify('c', {'data': 'x'}); assert 'tornado' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(**server.environment), check=True)


@pytest.mark.parametrize(("kind", "module"), [("postgres", "psycopg2"), ("redis", "redis")])
def test_missing_driver_is_said_with_the_extra_that_has_it(kind, module, request, tmp_path):
    """pip install sse-relay-server alone has no driver."""
    server = request.getfixturevalue(f"{kind}_server")
    code = f"""
import sys
sys.modules[{module!r}] = None
import tornado_relay
try:
    tornado_relay.notify('c', {{'data': 'x'}})
except tornado_relay.SettingsError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(**server.environment),
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"sse-relay-server[{kind}]" in done.stdout


def test_public_names():
    """What the package promises to its users."""
    assert set(tornado_relay.__all__) >= {
        "notify",
        "RelayError",
        "EventError",
        "ChannelError",
        "PayloadTooLarge",
        "SettingsError",
    }
