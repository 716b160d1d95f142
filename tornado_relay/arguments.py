"""What the command line may say: each setting as a flag, and the commands with theirs."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from typing import Any, NoReturn

from . import __version__
from .settings import FIELDS

PROGRAM = "sse-relay-server"


class Parser(argparse.ArgumentParser):
    """Answers wrong usage in one line."""

    command_flags: tuple[str, ...] = ()
    """Flags that only some of the commands have."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Look at the flags first: argparse would take the value of a misspelt one for a command."""
        args = sys.argv[1:] if args is None else args
        known = {"--", *self._option_string_actions, *self.command_flags}
        if unknown := [text for text in args if text.startswith("--") and text.partition("=")[0] not in known]:
            self.error(f"there is no flag {unknown[0]}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        self.exit(2, f"{PROGRAM}: {message.removeprefix('argument ')}; see {PROGRAM} --help\n")


def parser() -> argparse.ArgumentParser:
    """Return what reads the whole command line."""
    shared = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = shared.add_argument_group(
        "settings", "each is a flag, an environment variable, or a line in .env, in this order"
    )
    group.add_argument(
        "--env-file", metavar="PATH", help="read variables from this file, not from .env in the working directory"
    )
    for field in FIELDS:
        _add_flag(group, field)

    whole = Parser(
        prog=PROGRAM,
        parents=[shared],
        allow_abbrev=False,
        description="Relay events from PostgreSQL or Redis to browsers, as Server-Sent Events. Without a command: serve.",
    )
    whole.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, meaning: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[shared], allow_abbrev=False, help=meaning, description=meaning)

    notify = command("notify", "send one event to a channel")
    notify.add_argument("channel", metavar="CHANNEL")
    notify.add_argument("event", metavar="EVENT", help='JSON: {"event": ..., "id": ..., "data": ...}, or just the data')
    listen = command("listen", "print the events of a stream, one JSON object a line, until interrupted")
    listen.add_argument(
        "target", metavar="URL-or-CHANNEL", help="a stream's URL, or a channel of the relay on this machine"
    )
    check = command("check", "show the settings, look at what the relay needs, and exit with 1 if anything fails")
    check.add_argument(
        "--url", metavar="URL", default="", help="the relay's public address: send an event to there too"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")
    token = command("token", "print a token for streams on these channels, signed with RELAY_JWT_SECRET")
    token.add_argument("channel", metavar="CHANNEL", nargs="+", help="a name, or the beginning of names and a *")
    token.add_argument("--ttl", metavar="SECONDS", type=_positive, default=3600.0, help="until it ends; default 3600")
    token.add_argument("--private-key", metavar="PATH", help="sign with the private key in this PEM file")
    size = command("size", "say what so many streams and events take, by measured costs, and what is used up first")
    size.add_argument("--streams", metavar="N", type=_count, required=True, help="open at the same time")
    size.add_argument("--rate", metavar="N", type=_rate, required=True, help="events a second, on all channels")
    size.add_argument("--reach", metavar="N", type=_count, help="streams that get an event, on average; default all")
    size.add_argument("--event-bytes", metavar="N", type=_count, default=200, help="of one event; default 200")
    size.add_argument("--cores", metavar="N", type=_count, default=8, help="of one host; default 8")
    init = command("init-db", "set up, or bring up to date, the history of events in PostgreSQL (RELAY_HISTORY)")
    whole.command_flags = (
        *("--print-sql", "--ttl", "--private-key", "--url", "--json"),
        *("--streams", "--rate", "--reach", "--event-bytes", "--cores"),
    )
    init.add_argument("--print-sql", action="store_true", help="print the SQL for psql, and connect to nothing")
    return whole


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more, such as 10000")
    return int(text)


def _rate(text: str) -> float:
    return _positive(text, "number of events a second")


def _positive(text: str, what: str = "number of seconds") -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text) or not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}, more than 0")
    return float(text)


def _add_flag(group: Any, field: dataclasses.Field[Any]) -> None:
    about = field.metadata
    default = f"; default {field.default}" if field.default not in ("", (), False) else ""
    text = f"{about['meaning']} (variable {about['variable']}{default})".replace("%", "%%")
    if field.type == "bool":
        group.add_argument(about["flag"], dest=field.name, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(about["flag"], dest=field.name, metavar="VALUE", help=text)
