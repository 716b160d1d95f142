"""The command ``sse-relay-server``. Only this module prints, and exits, except for wrong usage."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from . import (
    __version__,
    arguments,
    channels,
    embedded,
    events,
    eventsource,
    findings,
    handover,
    logs,
    schema,
    settings,
    sizing,
    sockets,
    systemd,
    tokens,
)
from .arguments import PROGRAM
from .errors import RelayError, SettingsError
from .findings import FAILURE, OK, WARNING, Finding
from .process import Report, ignore_strays
from .publish import open_publisher
from .settings import FIELDS, Settings
from .supervisor import Supervisor

log = logging.getLogger(__name__)

# How `check` begins a line.
_LEVELS = {OK: "ok", WARNING: "WARN", FAILURE: "FAIL"}


def main(given: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    _open_standard_streams()
    options = vars(arguments.parser().parse_args(given))
    env_file = options.pop("env_file", None)
    flags = {field.name: _as_text(options.pop(field.name)) for field in FIELDS if field.name in options}

    def load() -> Settings:
        return settings.load(flags, env_file=env_file)

    try:
        return _run(options.pop("command", None), options, load, env_file)
    except RelayError as exc:
        print(f"{PROGRAM}: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, SettingsError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone, as in "| head"
        sys.stdout = None
        return 0


def _run(command: str | None, options: dict[str, Any], load: Callable[[], Settings], env_file: str | None) -> int:
    run: dict[str | None, Callable[[], int]] = {
        None: lambda: _serve(load, env_file),
        "notify": lambda: _notify(load(), **options),
        "listen": lambda: _listen(load(), **options),
        "check": lambda: _check(load, options["url"], as_json=options["json"]),
        "token": lambda: _token(load(), **options),
        "size": lambda: _size(**options),
        "init-db": lambda: _init_db(load, **options),
    }
    return run[command]()


def _open_standard_streams() -> None:
    """Give standard input, output and error to nobody if they are closed, or the next files would take their places."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


def _hide_secrets() -> None:
    """Start anew with secret flags in the environment, which others cannot read: a command line is everybody's (proc(5))."""
    secret = {field.metadata["flag"]: field.metadata["variable"] for field in FIELDS if field.metadata.get("secret")}
    rest, hidden = [], {}
    given = iter(sys.orig_argv)
    for argument in given:
        flag, equals, value = argument.partition("=")
        if flag in secret:
            hidden[secret[flag]] = value if equals else next(given, "")
        else:
            rest.append(argument)
    if hidden:
        os.environ.update(hidden)
        os.execv(sys.executable, rest)  # noqa: S606  (ourselves)


def _serve(load: Callable[[], Settings], env_file: str | None) -> int:
    # The one command that needs Tornado. Loaded before the fork, so that the workers share it.
    from . import worker  # noqa: PLC0415

    ignore_strays()
    inherited = handover.received(settings.handed_over())
    if inherited and inherited.report >= 0:
        return _on_trial(load, inherited)
    # Until the supervisor takes over, a SIGTERM must still end what has been started here.
    signal.signal(signal.SIGTERM, _terminated)
    current = inherited.settings() if inherited else load()
    if not inherited:  # a handover is for this very process image
        _hide_secrets()
    variables = settings.systemd_variables()
    logs.setup(current.log_level, current.log_format, journal=systemd.reads_stderr(variables))
    public, admin = systemd.given(variables)
    if not inherited:
        for line in settings.misspelt_variables(env_file):
            log.warning("%s", line)
    with _embedded(current, inherited) as (cluster, ours):
        if inherited:
            log.info("version %s has taken over, and replaces the workers", __version__)
            listening = inherited.listening()
        else:
            current = _complete(current, cluster)
            _warn_if_open(current)
            _raise_descriptor_limit()
            listening = sockets.listen(current, public, admin)
            if cluster:
                _show_first_steps(current, listening.groups[0][0], cluster.url)
        notifier = systemd.Notifier(variables)
        before = inherited.admin[1:] if inherited and inherited.admin else None
        with sockets.admin(listening.admin, len(listening.groups), before) as desk:
            supervisor = Supervisor(
                current, listening, worker.run, notifier, admin=desk, embedded=ours, inherited=inherited
            )
            return supervisor.run()


def _on_trial(load: Callable[[], Settings], inherited: handover.Handover) -> int:
    """Find out for the supervisor, which wants to reload, whether a worker can serve with what there is now."""
    from . import worker  # noqa: PLC0415

    report = Report(inherited.report)
    try:
        fresh, changed = inherited.keep_fixed(load())
        journal = systemd.reads_stderr(settings.systemd_variables())
        logs.setup(fresh.log_level, fresh.log_format, journal=journal)
        for name in changed:
            log.warning("%s changed: that takes a restart, a reload keeps the old one", name)
        logging.disable(logging.INFO)
        fresh = _complete(fresh, _cluster(fresh) if fresh.embedded else None)
        inherited.keep_closed(fresh)
    except SettingsError as exc:
        report(str(exc))
        return 2
    if not worker.rehearse(fresh, report):
        return 1
    inherited.leave_settings(fresh)
    report("")
    return 0


def _complete(loaded: Settings, cluster: embedded.Cluster | None) -> Settings:
    """Return the settings with the embedded PostgreSQL's URL, once all is in them that a worker needs."""
    from . import worker  # noqa: PLC0415

    if cluster:
        loaded = dataclasses.replace(loaded, database_url=cluster.url, listen_database_url="", redis_url="")
    _require_broker(loaded)
    worker.check_settings(loaded)
    if 0 < len(loaded.jwt_secret.encode()) < tokens.MIN_SECRET_BYTES:
        log.warning("RELAY_JWT_SECRET can be guessed: it has less than %d bytes", tokens.MIN_SECRET_BYTES)
    return loaded


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _notify(current: Settings, channel: str, event: str) -> int:
    payload = events.of_argument(event)
    text = events.serialize(payload)
    channels.check(channel)
    open_publisher(*_require_broker(current)).publish(channel, text, events.own_id(payload))
    return 0


def _token(current: Settings, channel: list[str], ttl: float, private_key: str | None) -> int:
    try:
        key = Path(private_key).read_text() if private_key else current.jwt_secret
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"--private-key: {private_key} cannot be read: {exc}") from exc
    if not key:
        raise SettingsError("RELAY_JWT_SECRET is not set; set it to the relay's, or give --private-key")
    print(tokens.subscribe_token(channel, ttl, key=key))
    return 0


def _init_db(load: Callable[[], Settings], *, print_sql: bool) -> int:
    if print_sql:
        print(schema.script(), end="")
        return 0
    for line in schema.install(load().history_url):
        print(line, flush=True)
    print(f"\nTo use it, start the relay with RELAY_HISTORY, such as RELAY_HISTORY=1000.\n\n{schema.grants()}", end="")
    return 0


def _size(streams: int, rate: float, reach: int | None, event_bytes: int, cores: int) -> int:
    if reach and reach > streams:
        raise SettingsError(f"--reach {reach} is more than --streams {streams}: an event reaches as many at most")
    if event_bytes > events.MAX_KEPT_BYTES:
        raise SettingsError(f"--event-bytes {event_bytes} is more than an event may have: {events.MAX_KEPT_BYTES}")
    for line in sizing.report(sizing.Load(streams, rate, reach or streams, event_bytes, cores)):
        print(line)
    return 0


def _listen(current: Settings, target: str) -> int:
    url, unix_socket = target, ""
    if not target.startswith(("http://", "https://")):
        host = "127.0.0.1" if current.host == "0.0.0.0" or sockets.is_everywhere(current.host) else current.host
        host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{current.port}/channel={quote(channels.check(target), safe='')}"
        unix_socket = current.unix_socket
    print(f"listening to {url}", file=sys.stderr)

    def show(trouble: str) -> None:
        print(f"{trouble}; trying again", file=sys.stderr)

    for received in eventsource.listen(url, show, unix_socket=unix_socket):
        print(json.dumps(dataclasses.asdict(received), ensure_ascii=False), flush=True)
    return 0


def _check(load: Callable[[], Settings], url: str, *, as_json: bool) -> int:
    try:
        current = load()
    except SettingsError as exc:
        shown, found = {}, iter([Finding(FAILURE, "settings", str(exc))])
    else:
        shown, found = findings.of_settings(current), findings.look(current, url)
    if as_json:
        told = [dataclasses.asdict(finding) for finding in found]
        failed = any(finding["level"] == FAILURE for finding in told)
        print(json.dumps({"ok": not failed, "settings": shown, "findings": told}, ensure_ascii=False, indent=1))
        return 1 if failed else 0
    for variable, value in shown.items():
        print(f"      {variable}={value}")
    failed = False
    for finding in found:
        failed = failed or finding.level == FAILURE
        print(f"{_LEVELS[finding.level]:<5} {finding.text}", flush=True)
        if finding.advice:
            print(f"      -> {finding.advice}", flush=True)
    return 1 if failed else 0


def _cluster(current: Settings) -> embedded.Cluster:
    home = Path(current.embedded_dir) if current.embedded_dir else embedded.default_home()
    return embedded.Cluster(home, embedded.wheel_binaries(home))


@contextmanager
def _embedded(current: Settings, inherited: handover.Handover | None) -> Iterator[tuple[embedded.Cluster | None, bool]]:
    """Run the relay's own PostgreSQL meanwhile, if asked for, and yield it, and whether it is ours to stop."""
    if not current.embedded:
        yield None, False
        return
    cluster = _cluster(current)
    if inherited:
        ours = inherited.embedded
    else:
        if not cluster.exists:
            print(f"Setting up a PostgreSQL in {cluster.home} (some seconds, once) ...", flush=True)
            cluster.create()
        ours = not cluster.running
    try:
        if not inherited:
            if ours:
                print(f"Starting the PostgreSQL in {cluster.home} ...", flush=True)
                cluster.start(bound=True)
            cluster.create_database()
        yield cluster, ours
    finally:
        if ours:
            cluster.stop()


def _show_first_steps(current: Settings, listener: socket.socket, url: str) -> None:
    print(f"\nGive this to Django:\n\n    DATABASE_URL={url}\n", flush=True)
    if current.debug and listener.family != socket.AF_UNIX:
        program = sys.argv[0] if not sys.argv[0].endswith(".py") else f"{sys.executable} -m tornado_relay"
        print(
            f"Open this page:\n\n    http://127.0.0.1:{listener.getsockname()[1]}/?channel=demo\n\n"
            f"and send it an event from another terminal:\n\n"
            f'    DATABASE_URL={url} {program} notify demo \'{{"event": "greeting", "data": "hello"}}\'\n',
            flush=True,
        )


def _require_broker(current: Settings) -> tuple[str, str]:
    broker = current.broker
    if broker is None and current.redis_url:
        raise SettingsError("RELAY_USE_PG is true, but DATABASE_URL is not set; give it, or leave RELAY_USE_PG out")
    if broker is None:
        raise SettingsError(
            "no broker is set. Set DATABASE_URL=postgresql://user:password@host:5432/database, or REDIS_URL=redis://host:6379/0,\n"
            "in the environment or in .env; or try the relay with a PostgreSQL of its own: sse-relay-server --embedded"
        )
    return broker


def _warn_if_open(current: Settings) -> None:
    if current.debug:
        return
    if not tokens.authenticates(current):
        log.warning(
            "no authentication: whoever reaches this relay can listen to any channel; see RELAY_JWT_SECRET and RELAY_AUTH_URL"
        )
    if not current.allowed_origins:
        log.warning("ALLOWED_ORIGINS is empty: the pages of any site may connect")


def _raise_descriptor_limit() -> None:
    # A stream is a descriptor; the usual soft limit of 1,024 is there for programs that use select().
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # under our systemd unit they are equal, and setrlimit() is forbidden
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
