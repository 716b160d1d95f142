"""A real PgBouncer."""

import os
import pwd
import shutil
import signal
import subprocess

import psycopg2
from psycopg2.extensions import parse_dsn
from servers import PATIENCE, execute, free_port, until


class PgBouncer:
    """A pooler in front of ``server`` while the ``with`` lasts, for the databases and the user of its URL."""

    def __init__(self, binary, home, server, mode):
        self.server = server
        self.port = free_port()
        self.home = home / f"pgbouncer-{self.port}"
        self.home.mkdir(mode=0o700)
        self.mode = mode
        options = parse_dsn(server.url)
        (self.home / "users").write_text(f'"{options["user"]}" "{options["password"]}"\n')
        self.configure()
        self.url = self.url_of(server.url)
        as_owner = {}
        if os.geteuid() == 0:  # as which it refuses to run
            owner = pwd.getpwnam("nobody")
            as_owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            for path in (self.home, *self.home.iterdir()):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        with (self.home / "log").open("w") as log:
            self.process = subprocess.Popen([binary, self.home / "pgbouncer.ini"], stderr=log, **as_owner)

    def __enter__(self):
        try:
            until(self.answers, "PgBouncer answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(PATIENCE)
        shutil.rmtree(self.home)

    def configure(self):
        (self.home / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={self.server.port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {self.home}/users\npool_mode = {self.mode}\n"
            "server_login_retry = 1\n"
        )

    def lead_to(self, server):
        """Let it lead to another server from its next transaction on, as an operator would."""
        self.server = server
        self.configure()
        self.process.send_signal(signal.SIGHUP)
        until(self.leads, "it leads there")

    def leads(self):
        try:
            return execute(self.url, "SELECT inet_server_port()") == [(self.server.port,)]
        except psycopg2.Error:
            return False

    def url_of(self, url):
        """Return the way through the pooler to a database of the server."""
        return url.replace(f":{parse_dsn(url)['port']}/", f":{self.port}/")

    def answers(self):
        assert self.process.poll() is None, f"PgBouncer ended:\n{(self.home / 'log').read_text()}"
        try:
            psycopg2.connect(self.url).close()
        except psycopg2.OperationalError as exc:
            if "refused" not in str(exc):
                raise
            return False
        return True
