"""A PostgreSQL server and its streaming standby, which take each other's place."""

import os
import shutil
import subprocess
from copy import copy

import pytest
from servers import PostgresServer, until

from tornado_relay.embedded import Cluster


class Pair:
    """Two servers; ``url`` names them always in the same order, whichever of them is the ``primary``."""

    kind = "postgres"

    def __init__(self, home):
        folders = [home / "first", home / "second"]
        for folder in folders:
            folder.mkdir(mode=0o755)
        self.primary = PostgresServer(folders[0], log_statement="none")
        self.standby = copy(self.primary)
        self.standby.cluster = Cluster(folders[1] / "postgresql", self.primary.binaries)
        self.rejoin()
        self.url = url_of(self.primary, self.standby)

    def rejoin(self):
        """Give the standby, which is down, a copy of the primary's data, and let it follow."""
        source, target = self.primary.cluster.home, self.standby.cluster.home
        backup = self.standby.binaries / "pg_basebackup"
        if not backup.exists():
            pytest.fail(f"pg_basebackup is not installed in {backup.parent}")
        shutil.rmtree(target / "data", ignore_errors=True)
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / "password", target / "password")
        owner, as_owner = source.stat(), {}
        if os.geteuid() == 0:  # as which the server refuses to run
            as_owner = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
            os.chown(target, owner.st_uid, owner.st_gid)
        command = [backup, "-d", self.primary.url, "-D", target / "data", "-R", "-c", "fast", "--no-sync"]
        subprocess.run(command, cwd="/", check=True, **as_owner)
        self.standby.start()
        self.standby.url = self.standby.cluster.url
        self.until_streaming("async")

    def synchronise(self):
        """Let no transaction commit before the standby has it."""
        self.primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.primary.execute("SELECT pg_reload_conf()")
        self.until_streaming("sync")

    def until_streaming(self, state):
        query = "SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'"
        until(lambda: self.primary.execute(query) == [(state,)], f"the standby follows ({state})")

    def catch_up(self):
        """Wait until the standby shows all that the primary has done."""
        ((end,),) = self.primary.execute("SELECT pg_current_wal_lsn()")
        until(lambda: self.standby.execute("SELECT pg_last_wal_replay_lsn() >= %s", end) == [(True,)], "it has all")

    def promote(self):
        """Let the standby take the place of the primary, which is down."""
        assert self.standby.execute("SELECT pg_promote()") == [(True,)]
        self.primary, self.standby = self.standby, self.primary

    def stop(self):
        for server in (self.standby, self.primary):
            server.stop("immediate")

    def execute(self, statement, *arguments):
        return self.primary.execute(statement, *arguments)

    def publish(self, channel, payload):
        self.primary.publish(channel, payload)

    def listeners(self):
        return self.primary.listeners()

    @property
    def environment(self):
        return {"DATABASE_URL": self.url}


def url_of(first, second):
    """Return one URL for both servers, of the first one's user."""
    return first.url.replace(f":{first.port}/", f":{first.port},127.0.0.1:{second.port}/")
