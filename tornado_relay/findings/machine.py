"""What of this machine limits the relay: descriptors, the kernel's queues."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from pathlib import Path

from ..limits import shares
from ..settings import Settings
from ..sockets import BACKLOG
from .finding import OK, WARNING, Finding

# With fewer descriptors than this, a worker is full while it has nothing to do.
FEW_DESCRIPTORS = 10_000


def of_machine(settings: Settings) -> Iterator[Finding]:
    """Look at what the kernel allows."""
    yield _descriptors(settings)
    if not settings.unix_socket:
        yield _reuseport()
    yield _backlog()
    yield from _tracking(settings)


def _descriptors(settings: Settings) -> Finding:
    # The relay raises the soft limit to the hard one when it starts.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = hard if hard != resource.RLIM_INFINITY else 2**20
    streams, _ = shares(hard)
    workers = settings.worker_count
    text = (
        f"{hard} descriptors a process are {streams} streams a worker, {streams * workers} in all ({workers} workers)"
    )
    advice = "raise it: LimitNOFILE=100000 in the unit, docker run --ulimit nofile=100000, ulimit -Hn in a shell"
    if settings.max_connections > streams * workers:
        text += f", fewer than RELAY_MAX_CONNECTIONS={settings.max_connections}"
    elif hard >= FEW_DESCRIPTORS:
        return Finding(OK, "machine.descriptors", text)
    return Finding(WARNING, "machine.descriptors", text, advice)


def _reuseport() -> Finding:
    name = "machine.reuseport"
    with socket.socket() as one, socket.socket() as other:
        try:
            for each in (one, other):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                each.bind(("127.0.0.1", one.getsockname()[1] if each is other else 0))
        except OSError as exc:
            return Finding(
                WARNING,
                name,
                f"SO_REUSEPORT does not work here ({exc.strerror}), by which the kernel spreads connections over workers",
                "use Linux 3.9 or newer without a sandbox that forbids it, or --workers 1, or --unix-socket",
            )
    return Finding(OK, name, "SO_REUSEPORT works: the kernel spreads connections over the workers")


def _backlog() -> Finding:
    limit = _kernel("net/core/somaxconn")
    text = f"the kernel keeps {limit} connections that wait to be accepted (net.core.somaxconn)"
    if limit is None or limit >= BACKLOG:
        return Finding(OK, "machine.backlog", text if limit else "net.core.somaxconn cannot be read here")
    return Finding(
        WARNING,
        "machine.backlog",
        f"{text}, of the {BACKLOG} that the relay asks for: when all pages come back at once, some wait for seconds",
        f"sysctl -w net.core.somaxconn={BACKLOG} net.ipv4.tcp_max_syn_backlog={BACKLOG}",
    )


def _tracking(settings: Settings) -> Iterator[Finding]:
    """Each stream is an entry in the table of a firewall that tracks connections; a full one drops what is new."""
    limit, taken = _kernel("net/netfilter/nf_conntrack_max"), _kernel("net/netfilter/nf_conntrack_count")
    if not limit or taken is None:
        return
    wanted = settings.max_connections or FEW_DESCRIPTORS * settings.worker_count
    text = f"the firewall tracks {taken} connections, {limit} at most (net.netfilter.nf_conntrack_max)"
    if limit >= 2 * wanted:
        yield Finding(OK, "machine.conntrack", text)
    else:
        advice = f"sysctl -w net.netfilter.nf_conntrack_max={4 * wanted}, or exempt the relay's port from tracking"
        yield Finding(WARNING, "machine.conntrack", text, advice)


def _kernel(name: str) -> int | None:
    try:
        return int(Path("/proc/sys", name).read_text())
    except (OSError, ValueError):
        return None
