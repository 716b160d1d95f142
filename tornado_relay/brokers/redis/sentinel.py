"""Redis Sentinel: which server of a group is the master, asked for at each connect and again while it is in use.

The URL is the one that Prefect, RedisVL, LangChain and limits take:

    redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0?sentinel_password=...

with user, password and database of the servers, ``sentinel_username`` and ``sentinel_password`` of the Sentinels,
and ``rediss+sentinel`` for TLS to both. All other options are redis-py's, and for the servers.

A master that was replaced may go on, for some seconds or, where the network is cut, until it is mended; what is sent to
it then is lost. So publishers leave it first, and readers, who hear it until then, behind them.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import unquote

import redis
import redis.connection
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from ...errors import SettingsError
from . import hosts
from .watch import ASK_SECONDS

SCHEMES = ("redis+sentinel", "rediss+sentinel")
EXAMPLE = "redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0"

PORT = 26379
"""Where a Sentinel listens that has no port in the URL."""

# How soon one that kept us waiting is asked again, where there is another one or a master that was named before.
_ASK_AGAIN_SECONDS = 10.0

# A Sentinel that does not answer must not hold up the next one.
_OPTIONS: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_connect_timeout": 1, "socket_timeout": 1}


class MasterConnection(redis.sentinel.SentinelManagedConnection):
    """A connection to the server that the Sentinels name, if that says the same of itself."""

    def connect_to(self, address: Any) -> None:
        """Connect to ``address``, as `redis.sentinel.SentinelManagedConnection` has it."""
        super().connect_to(address)  # type: ignore[no-untyped-call]
        try:
            self.send_command("ROLE", check_health=False)  # type: ignore[no-untyped-call]
            role = self.read_response(disable_decoding=True)[0]
        except redis.exceptions.NoPermissionError:
            return  # a server that may not be asked is taken at the Sentinels' word
        except redis.RedisError:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise
        if role != b"master":
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(f"{address[0]}:{address[1]} is a {role.decode()}, and no Sentinel says so yet")

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        """Read a reply, or else disconnect: one that comes late would be taken for that to the next command."""
        return super().read_response(*arguments, **{"disconnect_on_error": True, **options})


class MasterTLSConnection(MasterConnection, redis.SSLConnection):
    """The same over TLS."""


class Sentinels(redis.sentinel.Sentinel):
    """The Sentinels of a URL."""

    def __init__(self, url: str) -> None:
        group = parse(url)
        super().__init__(group.sentinels.addresses, sentinel_kwargs={**_OPTIONS, **group.options})  # type: ignore[no-untyped-call]
        self.master_name = group.name
        self.epoch = 0
        """Which election made the master one: a server that becomes it again is not what it was."""
        # When each is asked again.
        self._ask_at = dict.fromkeys(self.sentinels, 0.0)
        # The master that was named last.
        self._last: tuple[str, int] | None = None

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """
        Return what `ask` does, or where no Sentinel answers the master that was named last.

        That one says itself whether it is one still, if it can be reached: see `MasterConnection`.

        Raises:
            redis.RedisError: As `ask` does, where none was named before.

        """
        try:
            self._last = self.ask(service_name)
        except (redis.ResponseError, redis.sentinel.MasterNotFoundError):
            raise
        except redis.ConnectionError:
            if not self._last:
                raise
        return self._last

    def ask(self, service_name: str) -> tuple[str, int]:
        """
        Return host and port of the master, as the one has it that knows of the last election.

        A Sentinel that is cut off goes on naming the old master. So more than half of them are asked, as far as they answer,
        and the highest ``config-epoch`` wins.

        Raises:
            redis.ResponseError: If every Sentinel says what asking again cannot mend: a password or name that is wrong.
            redis.sentinel.MasterNotFoundError: If they say that the master is down, as before each fail-over.
            redis.ConnectionError: If none answers. No error shows a password.

        """
        reasons, for_good = [], True
        states: list[tuple[int, bool, bool, str, int]] = []
        # Those that kept us waiting are the last.
        for sentinel in sorted(self.sentinels, key=self._ask_at.__getitem__):
            is_silent = self._ask_at[sentinel] > time.monotonic()
            if is_silent and (states or self._last):
                break
            if 2 * len(states) > len(self.sentinels) and max(states)[1]:
                break
            try:
                masters: Any = sentinel.sentinel_masters()
            except redis.RedisError as exc:
                reasons.append(str(exc))
                for_good &= isinstance(exc, (redis.AuthenticationError, redis.ResponseError))
                if isinstance(exc, redis.TimeoutError):
                    self._ask_at[sentinel] = time.monotonic() + _ASK_AGAIN_SECONDS
                continue
            if state := masters.get(service_name):
                is_up = self.check_master_state(state, service_name)  # type: ignore[no-untyped-call]
                # The one that leads the election names the old one until all replicas follow.
                is_over = "failover_in_progress" not in state["flags"]
                states.append((state.get("config-epoch", 0), is_up, is_over, state["ip"], state["port"]))
            else:
                reasons.append(f"known to a Sentinel is {', '.join(map(repr, masters)) or 'none'}")
        if states:
            self.epoch, is_up, _, host, port = max(states)
            if is_up:
                return host, port
            raise redis.sentinel.MasterNotFoundError(f"the Sentinels say that {service_name!r} is down")
        raise (redis.ResponseError if reasons and for_good else redis.ConnectionError)(
            f"no Sentinel names a master for {service_name!r}: {'; '.join(dict.fromkeys(reasons))}"
        )

    def left(self, servers: list[str]) -> str:
        """Ask, and return why a reader is to leave the one of ``servers``; nothing if it is not."""
        host, port = self.ask(self.master_name)
        return f"the master is {host}:{port} now" if servers not in ([], [f"{host}:{port}/{self.epoch}"]) else ""


class MasterPool(redis.sentinel.SentinelConnectionPool):
    """Connections to the master, with the Sentinels asked again every `ASK_SECONDS` of use."""

    def __init__(self, url: str, **options: Any) -> None:
        sentinels = Sentinels(url)
        kind = MasterTLSConnection if url.startswith("rediss") else MasterConnection
        super().__init__(sentinels.master_name, sentinels, **{**options, "connection_class": kind})  # type: ignore[no-untyped-call]
        self._ask_at = 0.0

    def get_connection(self, *_: Any, **__: Any) -> Any:
        """Return a connection to the server that is the master now, as far as a Sentinel can be asked."""
        if time.monotonic() >= self._ask_at:
            # Before they are asked: the other threads go on meanwhile.
            self._ask_at = time.monotonic() + ASK_SECONDS
            with suppress(redis.RedisError):
                self.get_master_address()  # type: ignore[no-untyped-call]
        return super().get_connection()


class Group(NamedTuple):
    """What the URL says."""

    sentinels: hosts.Hosts
    name: str
    options: dict[str, Any]
    """redis-py's, for connections to the Sentinels."""
    servers: str
    """The URL that the servers would have; its host is none."""


def is_sentinel(url: str) -> bool:
    """Return whether ``url`` is one of a Sentinel group."""
    return url.partition("://")[0] in SCHEMES


def parse(url: str) -> Group:
    """
    Return what ``url`` says.

    Raises:
        SettingsError: If it names no group.
        ValueError: If redis-py cannot read it.

    """
    parts = hosts.split(url, PORT)
    name, _, database = parts.path.partition("/")
    if not name or not parts.addresses or (database and not database.isdigit()):
        raise SettingsError(
            f"REDIS_URL of a Sentinel group names its Sentinels, the master's name and the database, such as {EXAMPLE}"
        )
    options: dict[str, Any] = {"ssl": True} if parts.tls else {}
    for_servers = []
    for key, value in parts.options:
        if key in ("sentinel_username", "sentinel_password"):
            options[key.removeprefix("sentinel_")] = value
        else:
            for_servers.append((key, value))
    servers = parts.url(database, for_servers)
    if parts.tls:
        # As redis-py reads them: some are numbers, or yes and no.
        read = redis.connection.parse_url(servers)  # type: ignore[no-untyped-call]
        options.update((key, value) for key, value in read.items() if key.startswith("ssl_"))
    return Group(parts, unquote(name), options, servers)
