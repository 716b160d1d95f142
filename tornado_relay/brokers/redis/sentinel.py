"""Redis Sentinel: which server of a group is the master, asked for at each connect and again while it is in use.

The URL is the one that Prefect, RedisVL, LangChain and limits take:

    redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0?sentinel_password=...

with user, password and database of the servers, ``sentinel_username`` and ``sentinel_password`` of the Sentinels,
and ``rediss+sentinel`` for TLS to both. All other options are redis-py's, and for the servers.

A master that was replaced may go on, for some seconds or, where the network is cut, until it is mended; what is sent to
it then is lost. So publishers leave it first, and readers, who hear it until then, behind them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from ...errors import SettingsError

SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
EXAMPLE = "redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0"

PORT = 26379
"""Where a Sentinel listens that has no port in the URL."""

ASK_SECONDS = 1.0
"""How old what a publisher knows of the master may be."""
# The same where no Sentinel answers: the master that is known is used on, and asking takes time.
_ASK_AGAIN_SECONDS = 10.0

LEAVE_SECONDS = 3.0
"""
How often a reader asks; it leaves a master when another one has been named for so long. That must be longer than
`ASK_SECONDS` and the two seconds in which Sentinels tell each other.
"""

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
        if role != b"master":
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(f"{address[0]}:{address[1]} is a {role.decode()}, and no Sentinel says so yet")


class MasterTLSConnection(MasterConnection, redis.SSLConnection):
    """The same over TLS."""


class Sentinels(redis.sentinel.Sentinel):
    """The Sentinels of a URL."""

    def __init__(self, url: str) -> None:
        group = parse(url)
        super().__init__(group.sentinels, sentinel_kwargs={**_OPTIONS, **group.options})  # type: ignore[no-untyped-call]
        self.master_name = group.name

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return host and port of the master; raise redis.ConnectionError, without a password in it, if none is named."""
        reasons = []
        for number, sentinel in enumerate(self.sentinels):
            try:
                masters: Any = sentinel.sentinel_masters()
            except redis.RedisError as exc:
                reasons.append(str(exc))
                continue
            state = masters.get(service_name)
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]
                # The one that answers is asked first the next time.
                self.sentinels[0], self.sentinels[number] = sentinel, self.sentinels[0]
                return state["ip"], state["port"]
            known = ", ".join(map(repr, masters)) or "none"
            reasons.append(f"{service_name!r} is down" if state else f"known to a Sentinel is {known}")
        raise redis.sentinel.MasterNotFoundError(
            f"no Sentinel names a master for {service_name!r}: {'; '.join(dict.fromkeys(reasons))}"
        )

    def master(self) -> tuple[str, int]:
        """Return host and port of the URL's master; raise redis.ConnectionError if none is named."""
        return self.discover_master(self.master_name)


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
            pause = ASK_SECONDS
            try:
                self.get_master_address()  # type: ignore[no-untyped-call]
            except redis.ConnectionError:
                pause = _ASK_AGAIN_SECONDS
            self._ask_at = time.monotonic() + pause
        return super().get_connection()


class Watch:
    """Sees on a thread of its own whether the server that a reader is connected to is still the master."""

    def __init__(self, url: str) -> None:
        self._sentinels = Sentinels(url)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redis-sentinel")

    async def run(self, server: Callable[[], str], leave: Callable[[Exception], None]) -> None:
        """Call ``leave`` once another server than ``server`` is named for `LEAVE_SECONDS`. Cancel it to end."""
        before = ""
        while True:
            await asyncio.sleep(LEAVE_SECONDS)
            try:
                host, port = await asyncio.get_running_loop().run_in_executor(self._executor, self._sentinels.master)
            except redis.RedisError:
                continue  # who cannot ask stays: the connection itself says when the server is gone
            named = f"{host}:{port}"
            if server() not in ("", named) and named == before:
                leave(redis.ConnectionError(f"the master is {named} now"))
            before = named if named != server() else ""


class Group(NamedTuple):
    """What the URL says."""

    sentinels: list[tuple[str, int]]
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

    """
    scheme, _, rest = url.partition("://")
    authority, _, behind = rest.partition("/")
    path, _, query = behind.partition("?")
    userinfo, at, hosts = authority.rpartition("@")
    name, _, database = path.partition("/")
    if not name or not hosts or (database and not database.isdigit()):
        raise SettingsError(
            f"REDIS_URL of a Sentinel group names its Sentinels, the master's name and the database, such as {EXAMPLE}"
        )
    options: dict[str, Any] = {"ssl": True} if scheme == "rediss+sentinel" else {}
    for_servers = []
    for key, value in parse_qsl(query):
        if key in ("sentinel_username", "sentinel_password"):
            options[key.removeprefix("sentinel_")] = value
        else:
            for_servers.append((key, value))
            if key.startswith("ssl_") and "ssl" in options:
                options[key] = value
    sentinels = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host}")
        sentinels.append((parts.hostname or "localhost", parts.port or PORT))
    servers = f"{SCHEMES[scheme]}://{userinfo}{at}localhost/{database}?{urlencode(for_servers)}"
    return Group(sentinels, unquote(name), options, servers)
