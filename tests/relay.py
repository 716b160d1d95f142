"""The installed command as a child process of a test."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from servers import PATIENCE, free_port, patience, until

COMMAND = str(Path(sys.executable).with_name("sse-relay-server"))
ROOT = Path(__file__).parent.parent
# What systemd does before it starts a service: the sockets from descriptor 3 on, and the variables.
GIVE = """
import fcntl, os, sys
count, pid, command = int(sys.argv[1]), os.environ.pop("LISTEN_PID", None), sys.argv[2:]
moved = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 200) for fd in command[:count]]
for fd in command[:count]:
    os.close(int(fd))
for number, fd in enumerate(moved):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.execvpe(command[count], command[count:], {**os.environ, "LISTEN_PID": pid or str(os.getpid())})
"""
# Every Python process that the tests start fails on a warning, as pytest's own process does (pyproject.toml).
WARNINGS = "error"
_OURS = re.compile("RELAY_|REDIS_URL|DATABASE_URL|ALLOWED_ORIGINS|LOG_|DJANGO_|NOTIFY_SOCKET|WATCHDOG_|LISTEN_")


def environment(**more):
    """Our own environment without anything that a relay would read, and with ``more``; warnings are errors in it."""
    ours = {key: value for key, value in os.environ.items() if not _OURS.match(key)}
    return ours | {"PYTHONWARNINGS": WARNINGS} | more


def run(*arguments, cwd, seconds=60, **env):
    """Run the command to its end."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=patience(seconds),
        check=False,
    )


def giving(sockets, command=(COMMAND,)):
    """The command as systemd starts it with ``sockets``; LISTEN_FDNAMES is the caller's."""
    descriptors = [str(each.fileno()) for each in sockets]
    return sys.executable, "-c", GIVE, str(len(descriptors)), *descriptors, *command


def troubles(log):
    """Return the lines of a log that show a bug: a traceback, or a warning of Python's."""
    return [line for line in log.splitlines() if re.search(r"Traceback|[a-z]Warning\b", line)]


class Relay:
    """
    A serving relay; used as a context manager, so that none is left behind.

    At the end its log must be without tracebacks and Python's warnings, unless the test says that it is ``troubled``.
    """

    def __init__(
        self, home, *flags, port=0, unix_socket="", drain="0.5", command=(COMMAND,), given=(), troubled=False, **env
    ):
        self.home = home
        self.troubled = troubled
        self.log_path = home / f"relay-{os.urandom(4).hex()}.log"
        self.unix_socket = unix_socket
        address = ["--unix-socket", unix_socket] if unix_socket else ["--host", "127.0.0.1", "--port", str(port)]
        if given:
            address, command = [], giving(given, command)
            env = {"LISTEN_FDS": str(len(given)), **env}
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *address, *(["--drain-seconds", drain] if drain else []), *map(str, flags)],
                cwd=home,
                env=environment(**env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[each.fileno() for each in given],
            )

    def __enter__(self):
        try:
            self.wait_listening()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(self, failed, *_):
        self.stop()
        if failed is None and not self.troubled:
            assert not (trouble := troubles(self.log)), f"the relay's log has {trouble}:\n{self.log}"

    @property
    def log(self):
        return self.log_path.read_text()

    def wait_listening(self):
        def found():
            assert self.process.poll() is None, f"the relay ended:\n{self.log}"
            return re.search(r"listening on (?:http://[^ ]*:(\d+)|unix:)", self.log)

        match = until(found, "the relay listens")
        self.port = int(match[1]) if match[1] else None
        self.url = f"http://127.0.0.1:{self.port}"

    def workers(self):
        """The process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        """End it as an operator would, and return its exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def cpu_seconds(self):
        """User and system time of parent and workers so far."""
        ticks = 0
        for pid in [self.process.pid, *self.workers()]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class Watched:
    """A relay with an admin listener."""

    def __init__(self, relay, port):
        self.relay = relay
        self.url = f"http://127.0.0.1:{port}"

    def status(self):
        return httpx.get(f"{self.url}/status", timeout=PATIENCE).json()

    def metrics(self, accept="", **query):
        """What Prometheus would read: each sample's value, by name and labels."""
        answer = httpx.get(f"{self.url}/metrics", headers={"Accept": accept}, params=query, timeout=PATIENCE)
        answer.raise_for_status()
        samples = (sample for family in text_string_to_metric_families(answer.text) for sample in family.samples)
        return {(sample.name, *sample.labels.values()): sample.value for sample in samples}

    def states(self):
        """What there is at each place."""
        return [(worker["number"], worker["state"]) for worker in self.status()["workers"]]


@contextmanager
def watched(tmp_path, *flags, workers=2, **environment):
    port = free_port()
    with Relay(tmp_path, "--workers", workers, "--admin-port", port, *flags, **environment) as relay:
        yield Watched(relay, port)
