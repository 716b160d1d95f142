"""What a supervisor leaves to the one that takes its place, in the same process, at a reload (execve(2)).

The next one is of the code that is installed by then. It has the listening sockets, the workers, which go on as its
children, and the settings: those with which a worker of its own code has just served on trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import limits, tokens
from .errors import RelayError, SettingsError
from .process import Report
from .settings import FIELDS, HANDOVER, Settings
from .sockets import Listening

# Of this form, and of all that is in memory which both know: what the cells of limits.Tally mean, a worker's pulse.
VERSION = 1

FIXED = ("host", "port", "unix_socket", "admin_host", "admin_port", "workers", "embedded", "embedded_dir")
"""Settings that take a restart."""


@dataclass(frozen=True)
class Heir:
    """A worker that goes on."""

    pid: int
    pulse: int
    pipe: int
    row: int
    drain_seconds: float


@dataclass(frozen=True)
class Handover:
    """Descriptors and what goes with them."""

    sockets: list[list[int]]
    """Those of each worker's place."""
    workers: list[Heir | None]
    """Who serves there."""
    tally: tuple[int, str]
    """The memory, and how it is laid out; see `limits.Tally`."""
    ledger: tuple[int, str]
    """The memory, and what is counted where in it; see `counts.Ledger`."""
    admin: tuple[list[int], str, float] | None
    """The listening sockets, the folder, and since when; see `sockets.Admin`."""
    socket_file: tuple[int, int] | None
    """The identity of the Unix socket's file, if it is to be removed at the end."""
    embedded: bool
    """Whether the embedded PostgreSQL is this relay's to stop."""
    fixed: dict[str, Any]
    """The values of `FIXED`."""
    memory: int
    """Where the trial leaves the settings, a memfd."""
    authenticates: bool = False
    """Whether the workers that are there ask who somebody is; not in debug mode."""
    again: bool = False
    """Whether another reload was asked for meanwhile."""
    report: int = -1
    """Where the trial says why it failed; -1 is no trial."""
    version: int = VERSION

    def on_trial(self, _: Callable[[], None], report: Report) -> int:
        """Become the trial of what is installed now; a `process.Run`."""
        try:
            dataclasses.replace(self, report=report.pipe).execute()
        except (OSError, ValueError) as exc:
            report(f"{sys.executable} cannot be run: {exc}")
        return 1

    def execute(self) -> None:
        """
        Become the next supervisor, or the trial.

        Raises:
            OSError, ValueError: If that cannot be; nothing has changed then.

        """
        if sys.stdout:
            with contextlib.suppress(OSError):  # nobody reads it any more
                sys.stdout.flush()
        os.environ[HANDOVER] = json.dumps(dataclasses.asdict(self))
        try:
            self.pass_on(True)
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606  (ourselves)
        finally:
            del os.environ[HANDOVER]
            self.pass_on(False)

    def pass_on(self, inheritable: bool) -> None:
        """Let the descriptors go through execve(2), or no more."""
        if self.report >= 0:
            descriptors = [self.memory, self.report]
        else:
            descriptors = [self.memory, self.tally[0], self.ledger[0]]
            for heir in filter(None, self.workers):
                descriptors += [heir.pulse] if heir.pipe < 0 else [heir.pulse, heir.pipe]
            for group in [*self.sockets, self.admin[0] if self.admin else []]:
                descriptors += group
        for descriptor in descriptors:
            os.set_inheritable(descriptor, inheritable)

    def listening(self) -> Listening:
        """Return the listening sockets."""
        *groups, admin = [
            [socket.socket(fileno=descriptor) for descriptor in group]
            for group in [*self.sockets, self.admin[0] if self.admin else []]
        ]
        return Listening(groups, admin, self.socket_file)

    def keep_fixed(self, fresh: Settings) -> tuple[Settings, list[str]]:
        """Return ``fresh`` with what takes a restart as it was, and the variables of what was to change of that."""
        kept = {name: self.fixed[name] for name in FIXED if name in self.fixed}
        changed = [
            field.metadata["variable"]
            for field in FIELDS
            if field.name in kept and getattr(fresh, field.name) != kept[field.name]
        ]
        return dataclasses.replace(fresh, **kept), changed

    def keep_closed(self, fresh: Settings) -> None:
        """
        Refuse that a reload opens the relay to everybody: a file that has been lost would do it.

        Raises:
            SettingsError: If ``fresh`` has no authentication, and the relay had some.

        """
        if self.authenticates and not tokens.authenticates(fresh):
            raise SettingsError(
                "the new settings have no authentication (RELAY_JWT_SECRET, RELAY_JWT_PUBLIC_KEY or RELAY_AUTH_URL), so "
                "anybody could listen to any channel; to remove it on purpose, restart the relay"
            )

    def leave_settings(self, settings: Settings) -> None:
        """Leave ``settings`` to the next supervisor: the files that have them may change until it is there."""
        with os.fdopen(os.dup(self.memory), "wb") as memory:
            memory.seek(0)
            pickle.dump(settings, memory)

    def settings(self) -> Settings:
        """Return the settings that `leave_settings` has left."""
        with os.fdopen(os.dup(self.memory), "rb") as memory:
            memory.seek(0)
            settings: Settings = pickle.load(memory)  # noqa: S301  (written by this very code)
        return settings


def received(text: str | None) -> Handover | None:
    """
    Return what a predecessor has left, as `settings.handed_over` gives it.

    Raises:
        RelayError: If it is a predecessor of another age, or its workers count in other memory, or it is not a predecessor.

    """
    if text is None:
        return None
    try:
        fields = json.loads(text)
        version, layout, report = fields["version"], fields["tally"][1], fields["report"]
    except (ValueError, LookupError, TypeError) as exc:
        raise RelayError(f"{HANDOVER} is for the relay's own use; remove it from the environment") from exc
    # A later version may have left what this one does not know.
    unknown = fields.keys() - {field.name for field in dataclasses.fields(Handover)}
    if version != VERSION or layout != limits.LAYOUT or unknown:
        if report >= 0:
            Report(report)("the installed version cannot take over from the one that runs: restart it")
        raise RelayError("the installed version cannot take over from the one that runs")
    fields["workers"] = [heir and Heir(**heir) for heir in fields["workers"]]
    for name in ("tally", "ledger", "admin", "socket_file"):  # JSON has no tuples
        fields[name] = fields[name] and tuple(fields[name])
    handover = Handover(**fields)
    handover.pass_on(False)
    return handover
