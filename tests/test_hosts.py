"""Three hosts behind HAProxy, one of which is cut off, killed, or stands still: 3,000 streams, and what they got."""

import os
import signal
from contextlib import ExitStack, contextmanager

import pytest
from hosts import ADDRESS, Host, Site, front, reachable
from programs import program
from redis_group import Cluster, running
from relay import run
from servers import PostgresServer, until
from storm import compare, storming

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(os.getuid() != 0, reason="network namespaces take root"),
]

STREAMS = (135, 15)  # on each of 20 channels, with a history and without
# Events a second, each to 150 streams.
RATE = 120.0
RELAYS = (("100000", 8001), ("0", 8002))
"""Of each host: the history, and the port."""


@contextmanager
def postgres(folder):
    folder.mkdir(mode=0o755)
    server = PostgresServer(folder, log_statement="none", listen_addresses=f"127.0.0.1,{ADDRESS}")
    try:
        server.url = reachable(server)
        done = run("init-db", cwd=folder, **server.environment)
        assert done.returncode == 0, done.stderr
        yield server
    finally:
        server.stop("immediate")


@contextmanager
def redis_cluster(folder):
    with running(Cluster, folder, program("redis-server"), ADDRESS) as group:
        yield group


@pytest.mark.parametrize("broker", [postgres, redis_cluster])
def test_no_event_is_lost_with_a_host(broker, home, tmp_path, channel, certificate):
    """With a history each stream gets each event once and in order; without, it is told what it may have missed."""
    with ExitStack() as stack:
        stack.enter_context(Site())
        group = stack.enter_context(broker(home / f"hosts-{channel}"))
        hosts = [stack.enter_context(Host(number, tmp_path)) for number in (1, 2, 3)]
        for host in hosts:
            start(host, group)
        fronts = [stack.enter_context(front(hosts, port, home, certificate)) for _, port in RELAYS]
        cut_off, killed, stopped = hosts

        def disturb(_, fleets):
            all_go_on(fleets)
            cut_off.cut()
            all_go_on(fleets)
            cut_off.mend()
            killed.kill()
            all_go_on(fleets)
            start(killed, group)
            stopped.signal(signal.SIGSTOP)
            all_go_on(fleets)
            stopped.signal(signal.SIGCONT)

        relays = [relay for host in hosts for relay in host.relays]
        ports = [each.port for each in fronts]
        with storming(group, relays, disturb, STREAMS, ports, RATE) as storm:
            fleets, *_ = storm
            compare(group, *storm)
            assert sum(len(fleet.streams) for fleet in fleets) == 3000
            assert all(stream.connections > 1 for fleet in fleets for stream in fleet.streams)


def start(host, broker):
    for history, port in RELAYS:
        host.start("--history", history, port=port, **broker.environment)


def all_go_on(fleets):
    """Wait until each stream has an event that has been published after now."""
    now = [(stream, len(stream.got)) for fleet in fleets for stream in fleet.streams]
    until(lambda: all(len(stream.got) > before + 5 for stream, before in now), "events for all", 60)
