"""Hosts of their own on one machine: network namespaces, a cable from each to where all else is."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from fronts import SOCKET, Front, configuration
from programs import program
from relay import COMMAND, Relay
from servers import PATIENCE, until
from test_proxies import in_place_of, shown

CLONE_NEWNET = 0x40000000  # linux/sched.h
ADDRESS = "10.77.0.1"

_libc = ctypes.CDLL(None, use_errno=True)


def ip(command, *before):
    subprocess.run([*before, program("ip"), *shlex.split(command)], check=True)


class Site:
    """
    A network that this thread, and all that it starts, has for itself while it is used as a context manager.

    What is to be reached from the hosts listens on `ADDRESS`.
    """

    def __enter__(self):
        program("ip")
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        _call(_libc.unshare, CLONE_NEWNET)
        try:
            ip("link set lo up")
            ip(f"address add {ADDRESS}/32 dev lo")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        _call(_libc.setns, self._outside, CLONE_NEWNET)
        os.close(self._outside)


class Host:
    """A host with relays on it, used as a context manager."""

    def __init__(self, number, home):
        self.home = home / f"host-{number}"
        self.home.mkdir()
        self.relays = []
        self.cable = f"host-{number}"
        self.address = f"10.77.{number}.2"
        self._gateway = f"10.77.{number}.1"
        # The namespace lasts as long as a process in it.
        unshare, nsenter = program("unshare"), program("nsenter")
        self._holder = subprocess.Popen([unshare, "--net", "sleep", "infinity"])
        self._inside = (nsenter, "-t", str(self._holder.pid), "-n", "--")

    def __enter__(self):
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self):
        network = Path(f"/proc/{self._holder.pid}/ns/net")
        ours = Path("/proc/thread-self/ns/net").readlink()
        until(lambda: network.readlink() != ours, "its namespace")
        ip(f"link add {self.cable} type veth peer name uplink netns {self._holder.pid}")
        ip(f"address add {self._gateway}/24 dev {self.cable}")
        ip(f"address add {self.address}/24 dev uplink", *self._inside)
        ip(f"link set {self.cable} up")
        ip("link set lo up", *self._inside)
        self.mend()

    def __exit__(self, *_):
        try:
            self.signal(signal.SIGCONT)
            for relay in self.relays:
                relay.stop()
        finally:
            self._holder.kill()
            self._holder.wait(PATIENCE)

    def start(self, *flags, port, **env):
        """Start a relay with two workers, which listens on the host's address."""
        command = (*self._inside, COMMAND)
        relay = Relay(
            self.home, "--workers", "2", "--host", self.address, "--port", port, *flags, command=command, **env
        )
        self.relays.append(relay.__enter__())
        return relay

    def cut(self):
        """Pull the cable: nothing is heard of it any more, not even that it is gone."""
        ip("link set uplink down", *self._inside)

    def mend(self):
        ip("link set uplink up", *self._inside)
        ip(f"route add default via {self._gateway}", *self._inside)

    def kill(self):
        self.signal(signal.SIGKILL)
        for relay in self.relays:
            relay.process.wait(PATIENCE)
        self.relays.clear()

    def signal(self, number):
        """Send a signal to all processes of its relays, as if it befell the host."""
        for relay in self.relays:
            for pid in (relay.process.pid, *relay.workers()):
                os.kill(pid, number)


def reachable(server):
    """Let the hosts connect to a PostgreSQL server that listens on `ADDRESS` too, and return its URL for them."""
    with (server.cluster.data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.77.0.0/16 scram-sha-256\n")
    server.execute("SELECT pg_reload_conf()")
    return server.url.replace("127.0.0.1", ADDRESS)


def front(hosts, port, folder, certificate):
    """HAProxy before a relay of each host, as docs/proxies.md has it, without TLS."""
    servers = shown("haproxy", "10.0.0.3")
    first, _, _ = servers.partition("    server relay-2")
    named = "".join(f"    server {host.cable} {host.address}:{port}\n" for host in hosts)
    text = in_place_of(f"server relay unix@{SOCKET}", first + named, configuration("haproxy"))
    return Front("haproxy", folder, certificate, text=re.sub(" ssl (crt .*)", r"  # \1", text))


def _call(function, *arguments):
    if function(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
