"""Processes: real forks, real signals, through the installed command."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from relay import COMMAND, ROOT, Relay, environment, run
from servers import PATIENCE, RedisServer, accepts, free_port, until

from tornado_relay import subscribe_token

PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----"""


def state(pid):
    """The kernel's letter for a process: Z is dead and not reaped; None is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_sigterm_drains_and_ends_with_0(broker, tmp_path, pages):
    """Each stream is told when to come back, they are closed over the drain's time, and the command ends."""
    with Relay(tmp_path, "--workers", "2", "--drain-seconds", "1", **broker.environment) as relay:
        opened = pages.open(relay.port, ["/channel=x"] * 40)
        workers = relay.workers()
        relay.signal(signal.SIGTERM)
        pages.until(lambda: any(page.closed for page in opened), "the first is closed")
        assert not all(page.closed for page in opened), "all were closed at once"
        pages.until(lambda: all(page.closed for page in opened), "all are closed")
        assert all(page.body.rstrip().rpartition(b"\n")[2].startswith(b"retry: ") for page in opened)
        assert len({page.body.rstrip().rpartition(b"\n")[2] for page in opened}) > 10, "the retry times are jittered"
        assert relay.process.wait(PATIENCE) == 0
        assert [state(pid) for pid in workers] == [None, None]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", relay.port), 1)


def test_streams_get_events_while_they_drain(broker, tmp_path, pages, channel):
    """A stream that is still open during the drain is a stream."""
    with Relay(tmp_path, "--workers", "1", "--drain-seconds", "60", **broker.environment) as relay:
        opened = pages.open(relay.port, [f"/channel={channel}"] * 10)
        relay.signal(signal.SIGTERM)
        pages.until(lambda: any(page.closed for page in opened), "the drain has begun")
        assert all(page.ended for page in opened if page.closed), "a stream that is ended on purpose is whole"
        broker.publish(channel, "late")
        pages.until(lambda: all(page.events for page in opened if not page.closed), "the event")
        relay.signal(signal.SIGTERM)
        assert relay.process.wait(PATIENCE) == 0, "a second SIGTERM does not wait"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_sigint_stops_at_once(broker, tmp_path, pages, number):
    """Ctrl-C does not wait for the drain; streams are still told when to come back."""
    with Relay(tmp_path, "--workers", "2", "--drain-seconds", "300", **broker.environment) as relay:
        opened = pages.open(relay.port, ["/channel=x"] * 10)
        relay.signal(number)
        pages.until(lambda: all(page.closed for page in opened), "all are closed")
        assert all(page.body.count(b"retry: ") == 2 for page in opened)
        assert relay.process.wait(PATIENCE) == 0


def test_sighup_replaces_the_workers_one_at_a_time_with_new_settings(broker, tmp_path, pages, channel):
    """The settings are read again, no connect is refused meanwhile, and every worker is a new one at the end."""
    env_file = tmp_path / "relay.env"
    env_file.write_text("RELAY_HEARTBEAT=60\n")
    with Relay(tmp_path, "--workers", "2", "--env-file", env_file, **broker.environment) as relay:
        before = relay.workers()
        opened = pages.open(relay.port, [f"/channel={channel}"] * 20)
        env_file.write_text("RELAY_HEARTBEAT=1\n")
        relay.signal(signal.SIGHUP)
        while "reloaded" not in relay.log:
            assert len([pid for pid in relay.workers() if state(pid) != "Z"]) >= 2, "a place was empty"
            pages.open(relay.port, ["/healthz"])
        assert not set(before) & set(relay.workers())
        pages.until(lambda: all(page.closed for page in opened), "the old workers' streams ended")
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        pages.until(lambda: page.body.endswith(b"\n\n:\n"), "the new heartbeat")


def test_sighup_with_wrong_settings_changes_nothing(broker, tmp_path, pages):
    """The mistake is logged by name, and the streams go on."""
    env_file = tmp_path / "relay.env"
    env_file.write_text("")
    with Relay(tmp_path, "--workers", "2", "--env-file", env_file, **broker.environment) as relay:
        before = relay.workers()
        (page,) = pages.open(relay.port, ["/channel=x"])
        env_file.write_text("RELAY_HEARTBEAT=often\n")
        relay.signal(signal.SIGHUP)
        until(lambda: "reload refused" in relay.log, "the refusal")
        assert "RELAY_HEARTBEAT" in relay.log
        assert relay.workers() == before
        assert not page.closed


@pytest.mark.parametrize("pad", ["", "x"])
def test_sighup_with_a_long_wrong_setting_changes_nothing(redis_server, tmp_path, pages, pad):
    """Its end says what is wrong, so that is logged too, whatever letter the cut before it would go through."""
    env_file = tmp_path / "relay.env"
    env_file.write_text("")
    with Relay(tmp_path, "--workers", "1", "--env-file", env_file, **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=x"])
        names = [f"https://kund{pad}-{n}.müllerstraße-öäü.example" for n in range(100)]
        env_file.write_text(f"ALLOWED_ORIGINS={','.join(names)},shop.example\n")
        relay.signal(signal.SIGHUP)
        until(lambda: "reload refused" in relay.log, "the refusal")
        assert re.search(r"reload refused.*ALLOWED_ORIGINS.* \[\.\.\.\] .*shop\.example", relay.log)
        redis_server.publish("x", "hello")
        pages.until(lambda: page.events, "the event")


REMOVED = [
    ({"RELAY_JWT_SECRET": "s" * 40}, {}),
    ({"RELAY_JWT_SECRET_PREVIOUS": "s" * 40}, {"RELAY_SERVER_DEBUG": "true"}),
    ({"RELAY_JWT_PUBLIC_KEY": PUBLIC_KEY}, {"ALLOWED_ORIGINS": "https://shop.example"}),
    ({"RELAY_AUTH_URL": "http://127.0.0.1:1/"}, {}),
]


@pytest.mark.parametrize(("before", "after"), REMOVED)
def test_sighup_that_removes_authentication_is_refused(redis_server, tmp_path, pages, before, after):
    """A .env that is lost must not open the relay to everybody; another way to authenticate is taken."""
    env_file = tmp_path / "relay.env"

    def write(variables):
        env_file.write_text("".join(f'{name}="{value}"\n' for name, value in variables.items()))

    write(before)
    with Relay(tmp_path, "--workers", "1", "--env-file", env_file, **redis_server.environment) as relay:
        workers = relay.workers()
        write(after)
        relay.signal(signal.SIGHUP)
        until(lambda: "reload refused" in relay.log, "the refusal")
        assert re.search("reload refused.*anybody could listen.*restart the relay", relay.log)
        assert relay.workers() == workers
        write({**after, "RELAY_JWT_SECRET": "t" * 40})
        relay.signal(signal.SIGHUP)
        until(lambda: " reloaded" in relay.log, "the reload")
        path = f"/channel=x?token={subscribe_token('x', key='t' * 40)}"
        assert pages.open(relay.port, [path])[0].status == 200


def test_sighup_may_remove_authentication_in_debug_mode(redis_server, tmp_path, pages):
    """A relay that was started to be tried out warns of nothing."""
    env_file = tmp_path / "relay.env"
    env_file.write_text(f"RELAY_JWT_SECRET={'s' * 40}\n")
    with Relay(tmp_path, "--workers", "1", "--debug", "--env-file", env_file, **redis_server.environment) as relay:
        env_file.write_text("")
        relay.signal(signal.SIGHUP)
        until(lambda: " reloaded" in relay.log, "the reload")
        assert pages.open(relay.port, ["/channel=x"])[0].status == 200


def test_sighup_with_a_broker_that_refuses_keeps_the_old_workers(tmp_path, pages, postgres_server):
    """A new worker must serve before an old one goes."""
    env_file = tmp_path / "relay.env"
    env_file.write_text(f"DATABASE_URL={postgres_server.url}\n")
    with Relay(tmp_path, "--workers", "2", "--env-file", env_file) as relay:
        before = relay.workers()
        (page,) = pages.open(relay.port, ["/channel=x"])
        env_file.write_text(f"DATABASE_URL={re.sub(':[^:@]+@', ':wrong@', postgres_server.url)}\n")
        relay.signal(signal.SIGHUP)
        until(lambda: "reload refused" in relay.log, "the refusal")
        assert "password authentication failed" in relay.log
        assert relay.workers() == before
        assert not page.closed


def test_sighup_with_a_broker_that_cannot_be_reached_keeps_the_streams(broker, tmp_path, pages, channel):
    """A closed port, or a host that does not exist, is named; a reload to the broker that answers goes through."""
    env_file = tmp_path / "relay.env"
    ((variable, url),) = broker.environment.items()
    env_file.write_text(f"{variable}={url}\n")
    with Relay(tmp_path, "--workers", "2", "--env-file", env_file) as relay:
        before = relay.workers()
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        for times, place in enumerate((f"127.0.0.1:{free_port()}", "no-such-host.invalid:1"), 1):
            env_file.write_text(f"{variable}={url.replace(f'127.0.0.1:{broker.port}', place)}\n")
            relay.signal(signal.SIGHUP)
            until(lambda times=times: relay.log.count("reload refused") == times, "the refusal", 30)
        assert re.search(r"reload refused.* is not reachable: ", relay.log)
        assert relay.workers() == before
        broker.publish(channel, "hello")
        pages.until(lambda: page.events, "the event")
        env_file.write_text(f"{variable}={url}\n")
        relay.signal(signal.SIGHUP)
        until(lambda: " reloaded" in relay.log, "the reload")
        assert not set(relay.workers()) & set(before)


def test_sighup_while_the_broker_is_away_changes_nothing(tmp_path, pages, home):
    """Also where nothing was to change: the workers wait for it, and their streams are still there when it is back."""
    (folder := home / "away").mkdir()
    server = RedisServer(folder)
    try:
        with Relay(tmp_path, "--workers", "2", **server.environment) as relay:
            before = relay.workers()
            (page,) = pages.open(relay.port, ["/channel=x"])
            server.stop()
            relay.signal(signal.SIGHUP)
            until(lambda: "Redis is not reachable" in relay.log.partition("reload refused")[2], "the refusal")
            server.start()
            until(lambda: relay.log.count("Redis connected") == 4, "both are connected again")
            server.publish("x", "hello")
            pages.until(lambda: page.data[-1:] == ["hello"], "the event")
            assert relay.workers() == before
            relay.signal(signal.SIGHUP)
            until(lambda: " reloaded" in relay.log, "the reload")
    finally:
        server.stop()


def test_settings_of_a_reload_that_failed_are_not_used_later(tmp_path, pages, postgres_server):
    """A worker that dies after it starts with the old settings, which work."""
    env_file = tmp_path / "relay.env"
    env_file.write_text(f"DATABASE_URL={postgres_server.url}\n")
    with Relay(tmp_path, "--workers", "2", "--env-file", env_file) as relay:
        env_file.write_text(f"DATABASE_URL={re.sub(':[^:@]+@', ':wrong@', postgres_server.url)}\n")
        relay.signal(signal.SIGHUP)
        until(lambda: "reload refused" in relay.log, "the refusal")
        os.kill(relay.workers()[0], signal.SIGKILL)
        until(lambda: relay.log.count("PostgreSQL connected") == 3, "the next worker serves")


def test_second_sighup_during_a_reload_is_not_forgotten(tmp_path, pages, redis_server):
    """What was edited meanwhile takes effect as well."""
    env_file = tmp_path / "relay.env"
    env_file.write_text("")
    with Relay(tmp_path, "--workers", "2", "--env-file", env_file, **redis_server.environment) as relay:
        relay.signal(signal.SIGHUP)
        until(lambda: "reloading" in relay.log, "the reload has begun")
        env_file.write_text("ALLOWED_ORIGINS=https://shop.example\n")
        relay.signal(signal.SIGHUP)
        until(lambda: relay.log.count(" reloaded") == 2, "both reloads are done")
        answers = pages.open(relay.port, ["/healthz"] * 8, {"Origin": "https://other.example"})
        assert {page.status for page in answers} == {403}


def test_drain_takes_as_long_as_the_worker_was_told_at_its_start(tmp_path, pages, redis_server):
    """A reload that shortens RELAY_DRAIN_SECONDS does not kill the old worker in the middle of its drain."""
    env_file = tmp_path / "relay.env"
    env_file.write_text("RELAY_DRAIN_SECONDS=8\n")
    with Relay(tmp_path, "--workers", "1", "--env-file", env_file, drain=None, **redis_server.environment) as relay:
        opened = pages.open(relay.port, ["/channel=x"] * 10)
        env_file.write_text("RELAY_DRAIN_SECONDS=0\n")
        relay.signal(signal.SIGHUP)
        pages.until(lambda: all(page.closed for page in opened), "the drain")
        assert all(page.body.count(b"retry: ") == 2 for page in opened)


def test_sigterm_while_a_reload_replaces_a_dead_worker(tmp_path, redis_server):
    """Whatever comes together, the command ends in order."""
    with Relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        workers = relay.workers()
        relay.signal(signal.SIGHUP)
        until(lambda: "has taken over" in relay.log, "the handover")
        until(lambda: len(relay.workers()) == 3, "the first replacement is forked")
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        relay.signal(signal.SIGTERM)
        assert relay.process.wait(PATIENCE) == 0
        assert "Traceback" not in relay.log


def test_signal_that_ends_a_worker_is_survived(tmp_path, redis_server):
    """The worker is replaced, and the log names the signal."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (pid,) = relay.workers()
        os.kill(pid, signal.SIGXCPU)
        until(lambda: "was ended by SIGXCPU" in relay.log, "it is noticed")
        until(lambda: relay.log.count("Redis connected") == 2, "the next worker serves")


def test_stray_signals_are_ignored(tmp_path, redis_server, pages):
    """Those that would end a process by default, and that a relay has no use for, end neither parent nor workers."""
    strays = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO]
    strays += [signal.SIGPWR, signal.SIGPIPE, signal.SIGRTMIN, 40, signal.SIGRTMAX]
    with Relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        opened, workers = pages.open(relay.port, ["/channel=x"] * 8), relay.workers()
        for number in strays:
            for pid in (relay.process.pid, *workers):
                os.kill(pid, number)
        redis_server.publish("x", "hello")
        pages.until(lambda: all(page.events for page in opened), "the event")
        until(lambda: "SIGUSR1 is ignored" in relay.log and "signal 40 is ignored" in relay.log, "it is logged")
        assert relay.workers() == workers
        assert relay.stop() == 0


def test_stuck_worker_is_killed_and_replaced(redis_server, tmp_path, pages):
    """A worker whose loop does not turn is noticed by the parent; SIGSTOP stands in for a hang."""
    with Relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        victim, survivor = relay.workers()
        os.kill(victim, signal.SIGSTOP)
        until(lambda: "is stuck" in relay.log, "the parent notices", seconds=30)
        until(lambda: len(relay.workers()) == 2 and victim not in relay.workers(), "it is replaced")
        assert survivor in relay.workers()


def test_restarts_back_off(redis_server, tmp_path):
    """A worker that dies again and again is restarted after growing delays."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        for count in range(1, 5):
            (pid,) = until(relay.workers, "a worker")
            os.kill(pid, signal.SIGKILL)
            until(lambda: relay.log.count("was ended by SIGKILL") == count, "its death is noticed")
        delays = [float(text) for text in re.findall(r"the next starts in ([\d.]+) s", relay.log)]
        assert delays[-1] > delays[0]


def test_workers_end_when_the_supervisor_is_killed(redis_server, tmp_path, pages):
    """No orphan serves on unseen."""
    with Relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        workers = relay.workers()
        pages.open(relay.port, ["/channel=x"] * 4)
        relay.process.kill()
        relay.process.wait()
        until(lambda: all(state(pid) is None for pid in workers), "the workers are gone")


def test_port_is_free_when_the_supervisor_is_killed(redis_server, tmp_path, pages):
    """The kernel ends the workers, even those that hang, so the next relay can start immediately."""
    with Relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        workers, (page,) = relay.workers(), pages.open(relay.port, ["/channel=x"])
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        relay.process.kill()
        relay.process.wait()
        pages.until(lambda: page.closed, "the stream ends")
        until(lambda: all(state(pid) in (None, "Z") for pid in workers), "the workers are gone")
        with Relay(tmp_path, "--workers", "1", port=relay.port, **redis_server.environment) as after:
            assert pages.open(after.port, ["/channel=x"])[0].status == 200


def test_worker_whose_supervisor_dies_during_the_fork_ends(redis_server, tmp_path):
    """A child that comes too late to hear of its parent's death does not serve as nobody's worker."""
    (tmp_path / "sitecustomize.py").write_text("""
import os, time
def wait():
    while os.getppid() == parent:
        time.sleep(0.01)
def remember():
    global parent
    parent = os.getpid()
os.register_at_fork(before=remember, after_in_child=wait)
""")
    relay = Relay(tmp_path, "--workers", "2", PYTHONPATH=str(tmp_path), **redis_server.environment)
    try:
        workers = until(lambda: len(pids := relay.workers()) == 2 and pids, "both are forked")
    finally:
        relay.process.kill()
        relay.process.wait()
    until(lambda: all(state(pid) in (None, "Z") for pid in workers), "the workers are gone")
    assert "Traceback" not in relay.log


def test_signal_to_the_whole_group_leaves_no_noise(redis_server, tmp_path):
    """Those that come while a worker closes its loop are nobody's any more; the worker ends with status 0."""
    (tmp_path / "sitecustomize.py").write_text("""
import os, signal
from asyncio.selector_events import BaseSelectorEventLoop
close = BaseSelectorEventLoop.close
def late(loop):
    close(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
BaseSelectorEventLoop.close = late
""")
    with Relay(tmp_path, "--workers", "2", PYTHONPATH=str(tmp_path), **redis_server.environment) as relay:
        (one, _) = relay.workers()
        os.kill(one, signal.SIGTERM)
        until(lambda: f"({one}) ended with status 0, the next starts" in relay.log, "it has ended")
        assert relay.stop() == 0
        for noise in ("Traceback", "Bad file descriptor", "Exception ignored"):
            assert noise not in relay.log


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(redis_server, tmp_path, pages, closed):
    """As some daemons start their children: the relay serves, reloads, and ends with 0."""
    port, command = free_port(), ("sh", "-c", f'exec "$@" {closed}', "sh", COMMAND)
    relay = Relay(tmp_path, "--workers", "1", port=port, command=command, **redis_server.environment)
    try:
        until(lambda: relay.process.poll() is not None or accepts(port), "it listens")
        assert pages.open(port, ["/healthz"])[0].status == 200
        for pid in (relay.process.pid, *relay.workers()):
            for number in range(3):
                assert str(Path(f"/proc/{pid}/fd/{number}").readlink()) in ("/dev/null", str(relay.log_path))
        before = relay.workers()
        relay.signal(signal.SIGHUP)
        until(lambda: not set(before) & set(relay.workers()), "the reload")
        assert pages.open(port, ["/healthz"])[0].status == 200
    finally:
        assert relay.stop() == 0


def test_parent_runs_no_loop_and_holds_no_broker_connection(broker, tmp_path):
    """Nothing lives in the parent that a fork could copy; each worker connects by itself, after the fork."""
    with Relay(tmp_path, "--workers", "2", **broker.environment) as relay:
        links = [str(link.readlink()) for link in Path(f"/proc/{relay.process.pid}/fd").iterdir()]
        assert not [link for link in links if "eventpoll" in link]
        assert len([link for link in links if link.startswith("socket:")]) == 2, "its two listening sockets"
        assert len(list(Path(f"/proc/{relay.process.pid}/task").iterdir())) == 1, "no thread"


class TestBootFailures:
    """
    What cannot start ends the command with a message, and without a restart loop.

    The status is 2 for a wrong setting, and 78 if the broker refuses the relay: systemd tries neither again.
    """

    def test_wrong_password(self, postgres_server, tmp_path):
        """PostgreSQL's own words, once."""
        url = re.sub(":[^:@]+@", ":wrong@", postgres_server.url)
        done = run("--port", 0, "--workers", "4", cwd=tmp_path, DATABASE_URL=url)
        assert done.returncode == 78
        assert done.stderr.count("cannot start") == 1
        assert "password authentication failed" in done.stderr
        assert "Traceback" not in done.stderr
        assert "wrong" not in done.stderr

    def test_unknown_database(self, postgres_server, tmp_path):
        """Named."""
        done = run("--port", 0, cwd=tmp_path, DATABASE_URL=postgres_server.url + "nope")
        assert done.returncode == 78
        assert 'database "relaynope" does not exist' in done.stderr

    def test_redis_that_wants_a_password(self, redis_server, tmp_path):
        """A Redis with a password, and one that has none where one is given."""
        url = redis_server.url.replace("redis://", "redis://:wrong@")
        done = run("--port", 0, cwd=tmp_path, REDIS_URL=url)
        assert done.returncode == 78
        assert "Redis refused" in done.stderr
        redis_server.client.config_set("requirepass", "secret")
        try:
            done = run("--port", 0, cwd=tmp_path, REDIS_URL=redis_server.url)
        finally:
            redis_server.client.execute_command("AUTH", "secret")
            redis_server.client.config_set("requirepass", "")
        assert done.returncode == 78
        assert "Redis refused" in done.stderr
        assert "Traceback" not in done.stderr

    def test_port_taken(self, redis_server, tmp_path):
        """By a stranger, and by another relay, which SO_REUSEPORT would let share."""
        with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
            done = run("--host", "127.0.0.1", "--port", relay.port, cwd=tmp_path, **redis_server.environment)
        assert done.returncode == 2
        assert f"127.0.0.1:{relay.port}" in done.stderr
        assert "in use" in done.stderr
        assert done.stderr.strip().count("\n") <= 2

    def test_host_that_is_not_ours(self, redis_server, tmp_path):
        """An address of another machine, and a name that does not exist."""
        for host in ("192.0.2.1", "no.such.host.invalid"):
            done = run("--host", host, cwd=tmp_path, **redis_server.environment)
            assert done.returncode == 2
            assert f"cannot listen on {host}" in done.stderr

    def test_missing_driver(self, postgres_server, tmp_path):
        """The extra to install is named."""
        code = "import sys; sys.modules['psycopg2'] = None; from tornado_relay.cli import main; sys.exit(main(['--port', '0']))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment(**postgres_server.environment),
            capture_output=True,
            text=True,
            timeout=PATIENCE * 3,
            check=False,
        )
        assert done.returncode == 2
        assert "install sse-relay-server[postgres]" in done.stderr

    def test_worker_that_crashes(self, redis_server, tmp_path):
        """Trying again may help, so the status is another one."""
        (tmp_path / "sitecustomize.py").write_text("""
import os
os.register_at_fork(after_in_child=lambda: os.abort())
""")
        done = run("--port", 0, cwd=tmp_path, PYTHONPATH=str(tmp_path), **redis_server.environment)
        assert done.returncode == 1
        assert "cannot start: a worker was ended by SIGABRT while it started" in done.stderr


def test_broker_that_is_down_at_the_start_is_waited_for(tmp_path, pages, home):
    """In a compose file the database may come later: the relay serves soft refusals, then streams."""
    folder = home / "late"
    folder.mkdir()
    server = RedisServer(folder)
    server.stop()
    with Relay(tmp_path, "--workers", "2", **server.environment) as relay:
        (ready,) = pages.open(relay.port, ["/readyz"])
        assert ready.status == 503
        server.start()
        try:

            def all_ready():
                answers = pages.open(relay.port, ["/readyz"] * 8)
                return {page.status for page in answers} == {200}

            until(all_ready, "both workers are ready")
            (page,) = pages.open(relay.port, ["/channel=x"])
            server.publish("x", "hello")
            pages.until(lambda: page.events, "the event")
        finally:
            server.stop()


def test_unix_socket(broker, tmp_path, pages, channel):
    """All workers accept on the one socket, which is removed at the end; a stale one is replaced."""
    path = str(tmp_path / "relay.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    with Relay(tmp_path, "--workers", "2", unix_socket=path, **broker.environment) as relay:
        opened = pages.open(None, [f"/channel={channel}"] * 8, unix_socket=path)
        broker.publish(channel, "hello")
        pages.until(lambda: all(page.events for page in opened), "the event")
        done = run("--unix-socket", path, cwd=tmp_path, **broker.environment)
        assert done.returncode == 2
        assert "another process listens" in done.stderr
        assert relay.stop() == 0
    assert not Path(path).exists()


def test_relay_that_ends_leaves_the_socket_of_its_successor(redis_server, tmp_path, pages):
    """A deploy may start the new one while the old one drains."""
    path = str(tmp_path / "relay.sock")
    with Relay(tmp_path, "--workers", "1", unix_socket=path, **redis_server.environment) as old:
        old.signal(signal.SIGSTOP)
        Path(path).unlink()
        with Relay(tmp_path, "--workers", "1", unix_socket=path, **redis_server.environment):
            old.signal(signal.SIGCONT)
            assert old.stop() == 0
            (page,) = pages.open(None, ["/channel=x"], unix_socket=path)
            assert page.status == 200


def test_pid_1_reaps_orphans_reloads_and_ends_on_sigterm(redis_server, tmp_path):
    """As in a container without an init: the command is process 1 of a PID namespace."""
    probe = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine lets us make no PID namespace")
    log = tmp_path / "log"
    with log.open("w") as out:
        inner = f"""
import os, subprocess, sys
subprocess.Popen(["sh", "-c", "sleep 0.3 & exec true"]).wait()
os.execv({COMMAND!r}, [{COMMAND!r}, "--host", "127.0.0.1", "--port", "{free_port()}", "--workers", "2"])
"""
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child=SIGKILL", sys.executable, "-c", inner],
            cwd=tmp_path,
            env=environment(**redis_server.environment),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: "listening on" in log.read_text(), "it listens")
        (first,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        assert re.search(r"^NSpid:.*\s1$", Path(f"/proc/{first}/status").read_text(), re.MULTILINE)

        def children():
            return Path(f"/proc/{first}/task/{first}/children").read_text().split()

        until(lambda: len(children()) == 2 and all(state(pid) != "Z" for pid in children()), "the orphan is reaped")
        os.kill(first, signal.SIGHUP)
        until(lambda: " reloaded" in log.read_text(), "a reload, too, is of the same process")
        os.kill(first, signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def test_systemd_is_told_what_happens(redis_server, tmp_path):
    """READY when all workers serve, the watchdog is fed, RELOADING around a reload, STOPPING at the end."""
    path = str(tmp_path / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(20)
        told = []

        def expect(word):
            while not told or word not in told[-1]:
                told.append(systemd.recv(4096).decode())

        env = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000000"}
        with Relay(tmp_path, "--workers", "2", **redis_server.environment, **env) as relay:
            expect("READY=1")
            assert "2 workers on http://127.0.0.1" in told[-1]
            expect("WATCHDOG=1")
            relay.signal(signal.SIGHUP)
            expect("RELOADING=1")
            assert "MONOTONIC_USEC=" in told[-1]
            expect("READY=1")
            relay.signal(signal.SIGTERM)
            expect("STOPPING=1")


def test_json_log(redis_server, tmp_path, pages):
    """With LOG_FORMAT=json each line is one object."""
    with Relay(tmp_path, "--workers", "1", "--log-format", "json", **redis_server.environment) as relay:
        pages.open(relay.port, ["/channel=x"])
    entries = [json.loads(line) for line in relay.log.splitlines()]
    assert {"time", "level", "message", "process"} <= set(entries[0])
    assert any("stream opened" in entry["message"] for entry in entries)


def test_open_relay_warns_unless_in_debug_mode(redis_server, tmp_path):
    """What the predecessor left unsaid."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        assert "no authentication" in relay.log
        assert "ALLOWED_ORIGINS is empty" in relay.log
    with Relay(tmp_path, "--workers", "1", "--debug", **redis_server.environment) as relay:
        assert "WARNING" not in relay.log


def test_misspelt_variable_is_pointed_out(redis_server, tmp_path):
    """With the name that was meant."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment, RELAY_HEARTBEET="5") as relay:
        assert "RELAY_HEARTBEET is not a setting; did you mean RELAY_HEARTBEAT?" in relay.log


def test_module_is_the_command(redis_server, tmp_path):
    """python -m tornado_relay serves as well."""
    command = (sys.executable, "-m", "tornado_relay")
    with Relay(tmp_path, "--workers", "1", command=command, PYTHONPATH=str(ROOT), **redis_server.environment) as relay:
        begin = time.monotonic()
        assert relay.stop() == 0
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_secret_flags_are_on_no_command_line(postgres_server, tmp_path, pages, form):
    """Everybody on the machine can list processes; the settings are what the flags said."""
    password = re.search(":([^:@]+)@", postgres_server.url)[1]
    secrets = {"database-url": postgres_server.url, "jwt-secret": "hush" * 10, "publish-token": "quiet" * 8}
    flags = [part for flag, value in secrets.items() for part in form.format(flag, value).split()]
    with Relay(tmp_path, "--workers", "1", *flags, RELAY_JWT_SECRET="another" * 6) as relay:
        for pid in [relay.process.pid, *relay.workers()]:
            shown = Path(f"/proc/{pid}/cmdline").read_text()
            assert "--workers" in shown
            assert not [secret for secret in (password, "hush", "quiet") if secret in shown]
        paths = ["/channel=x", f"/channel=x?token={subscribe_token('x', key='hush' * 10)}"]
        assert [page.status for page in pages.open(relay.port, paths)] == [401, 200]
