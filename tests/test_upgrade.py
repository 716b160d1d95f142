"""A new version of the package, taken up by SIGHUP while streams are open and events come."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import httpx
import pytest
from callers import Callers
from fleet import Fleet, Numbers
from relay import ROOT, Relay
from servers import PATIENCE, free_port, until
from test_limits import statuses

CHANNELS = [f"upgrade-{number}" for number in range(5)]
CHANGED = {"__init__.py": ('__version__ = "', '__version__ = "99.')}


class Installed:
    """A copy of the package, and what an installer does to it."""

    def __init__(self, home):
        self.home = home
        shutil.copytree(ROOT / "tornado_relay", home / "tornado_relay", ignore=shutil.ignore_patterns("__pycache__"))

    def change(self, changes):
        """Replace texts, as ``{file: (old, new)}``."""
        for name, (old, new) in changes.items():
            path = self.home / "tornado_relay" / name
            text = path.read_text()
            assert old in text
            path.with_suffix(".new").write_text(text.replace(old, new))
            # Python takes a .pyc for that of a source of the same length and second.
            second = int(path.stat().st_mtime) + 1
            os.utime(path.with_suffix(".new"), (second, second))
            path.with_suffix(".new").rename(path)

    def relay(self, tmp_path, *flags, **options):
        command = (sys.executable, "-m", "tornado_relay")
        return Relay(tmp_path, *flags, command=command, PYTHONPATH=str(self.home), **options)


@pytest.fixture
def installed(tmp_path):
    (home := tmp_path / "site").mkdir()
    return Installed(home)


def reload(relay, word=" reloaded"):
    before = relay.log.count(word)
    relay.signal(signal.SIGHUP)
    until(lambda: relay.log.count(word) > before, word)


def reload_until_it_executes_itself(relay):
    """Return in the middle of a reload: the trial has ended, and the next supervisor is not there yet."""
    status, count = Path(f"/proc/{relay.process.pid}/status"), len(relay.workers())

    def blocked():
        return int(re.search(r"SigBlk:\s+(\w+)", status.read_text())[1], 16) & 1 << signal.SIGTERM - 1

    relay.signal(signal.SIGHUP)
    until(lambda: len(relay.workers()) > count, "the trial")
    until(lambda: len(relay.workers()) == count and blocked(), "its end")


def test_upgrade_by_sighup_loses_no_event_and_refuses_nobody(kept, tmp_path, installed):
    """Each stream gets each event once, in order; who connects is answered; the process stays, the version is new."""
    with (
        installed.relay(tmp_path, "--workers", "2", "--drain-seconds", "1", drain=None, **kept.environment) as relay,
        Fleet([f"/channel={channel}" for channel in CHANNELS for _ in range(10)], relay.port) as fleet,
        Callers(relay.port) as callers,
    ):
        numbers = Numbers(kept, CHANNELS, 1000)
        numbers.start()
        fleet.until(lambda: all(len(stream.got) > 10 for stream in fleet.streams), "events come")
        (old,), workers = set(callers.answers), relay.workers()
        installed.change(CHANGED)
        relay.signal(signal.SIGHUP)
        fleet.until(lambda: " reloaded" in relay.log, "the reload")
        before = sum(callers.answers.values())
        fleet.until(lambda: sum(callers.answers.values()) > before + 50, "they are answered after it")
        numbers.enough.set()
        fleet.until(lambda: not numbers.is_alive(), "all are published")
        taken = {f"/channel={channel}": numbers.taken[channel] for channel in CHANNELS}
        fleet.until(lambda: all(stream.got[-1:] == taken[stream.path][-1:] for stream in fleet.streams), "the last one")
        for stream in fleet.streams:
            assert stream.got == taken[stream.path]
            assert not stream.resets
        assert all(stream.connections > 1 for stream in fleet.streams)
        assert all(f"sse-relay-server/99.{old}".encode() in stream.page.head for stream in fleet.streams)
        assert not numbers.unsure
        callers.__exit__()
        assert not callers.troubles
        assert set(callers.answers) == {old, f"99.{old}"}
        assert not set(relay.workers()) & set(workers)
        assert relay.stop() == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hub.py": ("class Hub", "clas Hub")}, "SyntaxError"),
        ({"worker.py": ("self.relay.poller.start()", "self.relay.poller.no_such()")}, "AttributeError"),
        ({"handover.py": ("VERSION = 1", "VERSION = 2")}, "cannot take over from the one that runs: restart it"),
        ({"limits.py": ("ROWS = 4", "ROWS = 6")}, "cannot take over from the one that runs: restart it"),
        ({"limits.py": ("ROWS = 4", "ROWS = 3")}, "cannot take over from the one that runs: restart it"),
        ({"limits.py": ("CELLS = 65_536", "CELLS = 1_024")}, "cannot take over from the one that runs: restart it"),
        (
            {"handover.py": ("    authenticates: bool", "    asks: bool")},
            "cannot take over from the one that runs: restart it",
        ),
        ({"__main__.py": ("sys.exit(main())", "sys.exit(1)")}, "ended with status 1"),
        ({"__main__.py": ("sys.exit(main())", "sys.exit(0)")}, "ended with status 0"),
        (
            {"worker.py": ("self.reader = Reader(", "self._stop.set()\n            self.reader = Reader(")},
            "ended with status 1",
        ),
    ],
)
def test_code_that_does_not_serve_changes_nothing(redis_server, tmp_path, pages, installed, changes, why):
    """The old workers go on with their streams, one that dies is followed by another, and the mended code is taken."""
    with installed.relay(tmp_path, "--workers", "2", troubled=True, **redis_server.environment) as relay:
        workers = relay.workers()
        (page,) = pages.open(relay.port, ["/channel=x"])
        originals = {name: (new, old) for name, (old, new) in changes.items()}
        installed.change(changes)
        reload(relay, "reload refused")
        assert why in relay.log
        assert relay.workers() == workers
        assert not page.closed
        installed.change(originals)
        installed.change(CHANGED)
        reload(relay)
        assert b"/99." in pages.open(relay.port, ["/channel=x"])[0].head


@pytest.mark.parametrize(
    "does",
    [
        r"os.write(inherited.report, b'\xff\xfe\0')",
        r"os.write(inherited.report, 'ü'.encode()[:1])",
        r"os.write(inherited.report, b'rea')",
        r"os.write(inherited.report, b'x' * 1_000_000)",
        r"os.close(inherited.report); os.ftruncate(inherited.memory, 0)",
        r"os.fork() or [time.sleep(0.1) for _ in range(600) if not os.path.exists('done')]",
    ],
)
def test_nothing_that_a_trial_says_or_does_ends_the_relay(redis_server, tmp_path, pages, installed, does):
    """Any bytes, half a word, too many of them, none; or a process that it leaves behind, with its pipe."""
    report = "report = Report(inherited.report)"
    with installed.relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=x"])
        installed.change({"cli.py": (report, f"import time; {does}; os._exit(1)")})
        try:
            reload(relay, "reload refused")
        finally:
            (tmp_path / "done").touch()
        assert relay.process.poll() is None
        redis_server.publish("x", "hello")
        pages.until(lambda: page.events, "the event")
        assert "Traceback" not in relay.log.partition("BrokenPipeError")[0]


def test_worker_that_fails_after_the_trial_stops_the_reload(redis_server, tmp_path, pages, installed):
    """Then the old workers go on under the new parent, which restarts one that dies, and ends them all in order."""
    serving = "        self.server.listen_on"
    failing = {"worker.py": (serving, f"        if self.sockets:\n            return FAILED\n{serving}")}
    with installed.relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        workers = relay.workers()
        (page,) = pages.open(relay.port, ["/channel=x"])
        installed.change(failing)
        reload(relay, "reload stopped")
        assert relay.workers() == workers
        assert not page.closed
        os.kill(workers[0], signal.SIGKILL)
        until(lambda: "was ended by SIGKILL, the next starts" in relay.log, "its death is noticed")
        assert relay.stop() == 0
        assert "Traceback" not in relay.log


def test_hung_worker_is_noticed_after_a_reload_too(redis_server, tmp_path, installed):
    """Its pulse goes on in the same memory."""
    serving = "        self.server.listen_on"
    failing = {"worker.py": (serving, f"        if self.sockets:\n            return FAILED\n{serving}")}
    stuck = {"process.py": ("STUCK_SECONDS = 15.0", "STUCK_SECONDS = 3.0")}
    with installed.relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        installed.change(failing | stuck)
        reload(relay, "reload stopped")
        hung, sound = relay.workers()
        os.kill(hung, signal.SIGSTOP)
        until(lambda: f"({hung}) is stuck for" in relay.log, "the hang is noticed")
        until(lambda: f"({hung}) was ended by SIGKILL" in relay.log, "it is ended")
        assert f"({sound})" not in relay.log


def test_signals_in_the_middle_of_a_handover_are_not_lost(redis_server, tmp_path, pages, installed):
    """They wait until the next supervisor can handle them: SIGHUP is another reload, SIGTERM drains and ends with 0."""
    with installed.relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        opened = pages.open(relay.port, ["/channel=x"] * 10)
        for number in (signal.SIGHUP, signal.SIGTERM):
            reload_until_it_executes_itself(relay)
            relay.signal(number)
            if number == signal.SIGHUP:
                until(lambda: relay.log.count(" reloaded") == 2, "both reloads")
        assert relay.process.wait(PATIENCE) == 0
        assert "SIGTERM: stopping" in relay.log
        assert "Traceback" not in relay.log
        pages.until(lambda: all(page.closed for page in opened), "the streams have ended")
        assert all(page.body.count(b"retry: ") == 2 for page in opened)


def test_stray_signal_in_the_middle_of_a_handover_ends_nothing(redis_server, tmp_path, pages, installed):
    """The program that is about to begin ignores it as well, as soon as it can."""
    with installed.relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        reload_until_it_executes_itself(relay)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, 40):
            relay.signal(number)
        until(lambda: " reloaded" in relay.log, "the reload")
        assert pages.open(relay.port, ["/channel=x"])[0].status == 200


def test_settings_that_change_after_the_trial_wait_for_the_next_reload(redis_server, tmp_path, pages, installed):
    """What has been tried is what is used: a file that is edited in between ends nothing."""
    (env_file := tmp_path / "relay.env").write_text("")
    with installed.relay(tmp_path, "--workers", "1", "--env-file", env_file, **redis_server.environment) as relay:
        env_file.write_text("ALLOWED_ORIGINS=https://shop.example\n")
        reload_until_it_executes_itself(relay)
        env_file.write_text("RELAY_HEARTBEAT=often\n")
        until(lambda: " reloaded" in relay.log, "the reload")
        assert pages.open(relay.port, ["/healthz"], {"Origin": "https://other.example"})[0].status == 403
        reload(relay, "reload refused")
        assert "RELAY_HEARTBEAT" in relay.log


def test_interpreter_that_is_gone_is_named(redis_server, tmp_path, installed):
    """A virtualenv that was removed, or is being made anew."""
    venv, ours = tmp_path / "venv", Path(sys.prefix)
    (venv / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "lib", "bin/python"):
        (venv / name).symlink_to(ours / name)
    python = venv / "bin/python"
    command = (str(python), "-m", "tornado_relay")
    options = {"PYTHONPATH": str(installed.home), **redis_server.environment}
    with Relay(tmp_path, "--workers", "2", command=command, **options) as relay:
        workers = relay.workers()
        python.unlink()
        reload(relay, "reload refused")
        assert f"{python} cannot be run: " in relay.log
        assert relay.workers() == workers
        assert "Traceback" not in relay.log


def test_empty_place_is_filled_at_once(redis_server, tmp_path, pages, installed):
    """One whose worker is dead at the handover does not wait for the drains of those before it: its socket has a queue."""
    installed.change({"process.py": ("Backoff(0.1, 30.0)", "Backoff(60.0, 60.0)")})
    flags = ("--workers", "2", "--drain-seconds", "10")
    with installed.relay(tmp_path, *flags, drain=None, **redis_server.environment) as relay:
        survivor, victim = relay.workers()
        pages.open(relay.port, ["/channel=x"] * 40)
        os.kill(victim, signal.SIGKILL)
        until(lambda: "was ended by SIGKILL, the next starts" in relay.log, "its death is noticed")
        relay.signal(signal.SIGHUP)
        until(lambda: "has taken over" in relay.log, "the handover")
        pages.open(relay.port, ["/healthz"] * 20)
        assert survivor in relay.workers(), "the drain has ended"


def test_flag_that_the_new_version_makes_a_secret(redis_server, tmp_path, pages, installed):
    """It stays on the command line until a restart; nobody executes itself in the middle of a handover."""
    meaning = '"gzip compresses events for clients that take it, each once for all streams | off",'
    with installed.relay(tmp_path, "--workers", "1", "--compression", "off", **redis_server.environment) as relay:
        installed.change({"settings.py": (meaning, f"{meaning} secret=True,")} | CHANGED)
        reload(relay)
        assert b"/99." in pages.open(relay.port, ["/channel=x"])[0].head


def test_settings_that_take_a_restart_are_named(redis_server, tmp_path, installed):
    """By their variables; and what a reload hands over, secrets too, is open in no worker."""
    (env_file := tmp_path / "relay.env").write_text("RELAY_WORKERS=1\n")
    with installed.relay(tmp_path, "--env-file", env_file, **redis_server.environment) as relay:
        env_file.write_text("RELAY_WORKERS=2\n")
        reload(relay)
        assert "RELAY_WORKERS changed: that takes a restart" in relay.log
        (worker,) = relay.workers()
        for pid, has_them in ((relay.process.pid, True), (worker, False)):
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            assert any("memfd:settings" in link for link in links) == has_them


@pytest.mark.parametrize("limit", ["--max-connections", "--max-connections-per-ip"])
def test_seats_are_counted_over_a_reload(redis_server, tmp_path, pages, installed, limit):
    """While the old worker drains its streams still count, by their addresses too, and those of the new one after that."""
    flags = ("--workers", "1", "--drain-seconds", "3", limit, "5")
    with installed.relay(tmp_path, *flags, drain=None, **redis_server.environment) as relay:
        opened = pages.open(relay.port, ["/channel=x"] * 5)
        relay.signal(signal.SIGHUP)
        pages.until(lambda: any(page.closed for page in opened), "the drain begins")
        again, _ = statuses(pages, relay, 5)
        assert 1 <= len(again) <= sum(page.closed for page in opened)
        pages.until(lambda: " reloaded" in relay.log, "the old worker is gone")
        assert len(statuses(pages, relay, 6)[0]) == 5 - len(again)


def test_version_that_counts_otherwise_begins_anew(redis_server, tmp_path, pages, installed):
    """Memory of another layout is not counted in; that of the same is, as tests/test_metrics.py holds."""
    more = {"counts.py": ('values=("client", "cut",', 'values=("novel", "client", "cut",')}
    port = free_port()
    with installed.relay(tmp_path, "--workers", "2", "--admin-port", port, **redis_server.environment) as relay:
        pages.open(relay.port, ["/channel=x"] * 3)
        installed.change(more)
        reload(relay)
        pages.open(relay.port, ["/channel=x"] * 2)
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        assert "sse_relay_streams_opened_total 2.0" in lines
        assert 'sse_relay_streams_closed_total{reason="novel"} 0.0' in lines
        assert 'sse_relay_reloads_total{result="done"} 1.0' in lines
        assert relay.stop() == 0
        assert "Traceback" not in relay.log


def test_what_is_ours_is_removed_after_a_reload(redis_server, tmp_path, pages, installed):
    """The Unix socket, and the folder of the admin listener: at the end, and not before."""
    path, folder = tmp_path / "relay.sock", tmp_path / "tmp"
    folder.mkdir()
    options = {"RELAY_ADMIN_PORT": str(free_port()), "TMPDIR": str(folder), **redis_server.environment}
    with installed.relay(tmp_path, "--workers", "2", unix_socket=str(path), **options) as relay:
        for _ in range(2):
            reload(relay)
            assert pages.open(None, ["/channel=x"], unix_socket=str(path))[0].status == 200
            assert len(list(folder.glob("*/*"))) == 2
        assert relay.stop() == 0
        assert not path.exists()
        assert not list(folder.iterdir())


def test_embedded_postgresql_is_stopped_after_a_reload(home, channel, tmp_path, pages, installed):
    """It runs on meanwhile, and is still the relay's to stop."""
    folder = home / f"embedded-{channel}" / "pg"
    with installed.relay(tmp_path, "--embedded", "--embedded-dir", folder, "--workers", "1") as relay:
        postmaster = int((folder / "data/postmaster.pid").read_text().split()[0])
        reload(relay)
        assert pages.open(relay.port, ["/readyz"])[0].status == 200
        assert int((folder / "data/postmaster.pid").read_text().split()[0]) == postmaster
        assert relay.stop() == 0
        until(lambda: not Path(f"/proc/{postmaster}").exists(), "the server has ended")
