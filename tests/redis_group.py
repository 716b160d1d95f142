"""Several Redis servers that belong together, on free ports: a Sentinel group, or a Cluster."""

import random
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from relay import environment
from servers import PATIENCE, RedisServer, free_port, redis_binary, until

from tornado_relay.brokers.redis.cluster import HISTORY_SLOT, TAG

# A program of a Django project, for a channel: as a server of applications does, it forks once it has sent something.
NOTIFY = """
import os
import django
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
django.setup()
from django.db import transaction
from tornado_relay import notify

def send(data):
    with transaction.atomic():
        notify(%r, {"data": data})

send("parent")
for number in range(3):
    child = os.fork()
    if not child:
        send(f"child {number}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
send("parent again")
"""
NOTIFIED = ("parent", "child 0", "child 1", "child 2", "parent again")
"""What it sends."""


class Member(RedisServer):
    """A server of a group; it may be stopped for a while, as if its network were cut."""

    def __init__(self, home, *options, password=None, **more):
        home.mkdir()
        self.more = options
        self.frozen = False
        self.password = password
        super().__init__(home, **more)

    def command(self):
        return [*super().command(), *self.more]

    def connect(self):
        at_once = Retry(NoBackoff(), 0)  # a server that is away is to be noticed as such
        return redis.Redis(self.address, self.port, password=self.password, socket_timeout=PATIENCE, retry=at_once)

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)
        self.frozen = False

    def follows(self):
        """Whether it is a replica, for which it cuts its clients off."""
        with suppress(redis.ConnectionError):
            return self.client.role()[0] == b"slave"
        return False

    def end(self):
        """Kill it in whatever state it is."""
        self.client.close()
        self.process.kill()
        self.process.wait(PATIENCE)


class Sentinels:
    """A master, a replica and three Sentinels; servers and Sentinels want passwords."""

    kind = "redis"
    password = "p@ss"
    sentinel_password = "s/ent"

    def __init__(self, home):
        common = ["--user", "sentinel", "on", ">pw", "allkeys", "allchannels", "allcommands"]
        common += ["--repl-diskless-sync-delay", "0", "--requirepass", self.password, "--masterauth", self.password]
        self.servers = [Member(home / "a", *common, password=self.password)]
        self.processes = []
        self.ports = [free_port() for _ in range(3)]
        try:
            self.servers.append(
                Member(
                    home / "b", "--replicaof", "127.0.0.1", str(self.servers[0].port), *common, password=self.password
                )
            )
            until(
                lambda: self.servers[1].client.info("replication")["master_link_status"] == "up", "the replica is there"
            )
            for number, port in enumerate(self.ports):
                self.start_sentinel(home / f"sentinel-{number}", port)
            for port in self.ports:
                hasten(redis.Redis(port=port, password=self.sentinel_password))
            self.sentinel = redis.Redis(port=self.ports[0], password=self.sentinel_password)
            until(self.knows_all, "the Sentinels know each other")
        except BaseException:
            self.end()
            raise
        names = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.url = f"redis+sentinel://:{quote(self.password)}@{names}/mymaster/0?sentinel_password={quote(self.sentinel_password, '')}"

    def start_sentinel(self, folder, port):
        folder.mkdir()
        lines = [
            f"port {port}",
            "bind 127.0.0.1",
            f"dir {folder}",
            f"sentinel monitor mymaster 127.0.0.1 {self.servers[0].port} 2",
        ]
        # What they are to the servers, so that one of these can shut them out.
        lines += ["sentinel auth-user mymaster sentinel", "sentinel auth-pass mymaster pw"]
        lines += ["sentinel down-after-milliseconds mymaster 1000", "sentinel failover-timeout mymaster 4000"]
        lines += [f"requirepass {self.sentinel_password}", f"sentinel sentinel-pass {self.sentinel_password}"]
        file = folder / "sentinel.conf"
        file.write_text("\n".join(lines) + "\n")
        command = [redis_binary(), file, "--sentinel"]
        self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

    def knows_all(self):
        with suppress(redis.ConnectionError, redis.ResponseError):
            state = self.sentinel.sentinel_masters()["mymaster"]
            return state["num-slaves"] == 1 and state["num-other-sentinels"] == 2
        return False

    def master(self):
        """The server that the Sentinels name."""
        with suppress(redis.RedisError):
            port = int(self.sentinel.sentinel_get_master_addr_by_name("mymaster")[1])
            return next(each for each in self.servers if each.port == port)
        return None

    def is_down_to(self, port):
        """Whether the Sentinel at ``port`` takes the master for dead."""
        with redis.Redis(port=port, password=self.sentinel_password) as client:
            return client.sentinel_masters()["mymaster"]["is_sdown"]

    def other(self, server):
        return next(each for each in self.servers if each is not server)

    def shut_sentinels_out(self, server):
        """Let the Sentinels take ``server`` for dead, and have no power over it, while it goes on for all others."""
        server.client.acl_setuser("sentinel", enabled=False)
        server.client.execute_command("CLIENT", "KILL", "USER", "sentinel")

    def fail_over(self):
        """As an operator does, who asks again when a Sentinel has given it up."""
        old = self.master()

        def is_over():
            if self.master() not in (None, old):
                return True
            # It refuses as long as it does not know that the replica is a good one, or that the last one is over.
            with suppress(redis.ResponseError):
                self.sentinel.execute_command("SENTINEL", "FAILOVER", "mymaster")
            return False

        until(is_over, "a fail-over", 60)

    def publish(self, channel, payload):
        self.master().client.publish(channel, payload)

    @property
    def environment(self):
        return {"REDIS_URL": self.url}

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait(PATIENCE)
        for each in self.servers:
            each.end()


class Cluster:
    """Three masters, each with a replica."""

    kind = "redis"
    tag = TAG

    def __init__(self, home, binary=None, address="127.0.0.1"):
        self.address = address
        self.servers = []
        # Redis refuses what is not from this machine, unless there is a password.
        options = [
            "--protected-mode",
            "no",
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1000",
            "--repl-diskless-sync-delay",
            "0",
        ]
        try:
            for number in range(6):
                self.servers.append(
                    Member(home / str(number), *options, port=port_with_bus(), binary=binary, address=address)
                )
            self.put_together()
        except BaseException:
            self.end()
            raise
        self.url = "redis+cluster://" + ",".join(f"{address}:{each.port}" for each in self.servers[:2])

    def put_together(self):
        masters, replicas = self.servers[:3], self.servers[3:]
        for number, each in enumerate(self.servers):
            each.id = cluster(each, "MYID").decode()
            cluster(each, "SET-CONFIG-EPOCH", number + 1)
            cluster(self.servers[0], "MEET", self.address, each.port)
        for number, each in enumerate(masters):
            cluster(each, "ADDSLOTS", *range(number * 16384 // 3, (number + 1) * 16384 // 3))
        known = all_say(self.servers, "cluster_known_nodes:6")
        until(known, "all know each other")
        for master, replica in zip(masters, replicas, strict=True):
            cluster(replica, "REPLICATE", master.id)
        until(all_say(self.servers, "cluster_state:ok"), "the Cluster is up")
        up = [lambda each=each: each.client.info("replication")["master_link_status"] == "up" for each in replicas]
        until(lambda: all(each() for each in up), "the replicas are there")

    @property
    def client(self):
        """Of the server that has the history."""
        return self.owner(HISTORY_SLOT).client

    def owner(self, slot):
        """The server that has a slot, as those that are up see it."""
        for each in (each for each in self.servers if not each.frozen):
            with suppress(redis.RedisError):
                for start, end, (_, port, *_), *_ in cluster(each, "SLOTS"):
                    if start <= slot <= end:
                        return next(one for one in self.servers if one.port == port)
        return None

    def replica_of(self, master):
        return next(
            each for each in self.servers if each.client.role()[0] == b"slave" and each.client.role()[2] == master.port
        )

    def fail_over(self, master):
        """As an operator does."""
        cluster(self.replica_of(master), "FAILOVER")

    def migrate(self, slot, target):
        """Move a slot with all that is in it."""
        source = self.owner(slot)
        cluster(target, "SETSLOT", slot, "IMPORTING", source.id)
        cluster(source, "SETSLOT", slot, "MIGRATING", target.id)
        while keys := cluster(source, "GETKEYSINSLOT", slot, 100):
            source.client.execute_command("MIGRATE", self.address, target.port, "", 0, 5000, "KEYS", *keys)
        for each in (target, source):
            cluster(each, "SETSLOT", slot, "NODE", target.id)

    @property
    def environment(self):
        return {"REDIS_URL": self.url}

    def end(self):
        for each in self.servers:
            each.end()


@contextmanager
def running(group, folder, *arguments):
    """Make a `Sentinels` or a `Cluster` in a new folder, and end it."""
    folder.mkdir(mode=0o755)
    made = group(folder, *arguments)
    try:
        yield made
    finally:
        made.end()


def cluster(server, *arguments):
    """What a server answers to a CLUSTER command, as it is."""
    with server.connect() as client:
        connection = client.connection_pool.get_connection()
        connection.send_command("CLUSTER", *arguments)
        return connection.read_response()


def all_say(servers, line):
    return lambda: all(line in cluster(each, "INFO").decode() for each in servers)


def port_with_bus():
    """A free port below which, as Redis has it, another one is free: that and 10,000."""
    while True:
        port = random.randint(15_000, 22_000)
        with (
            suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
            socket.create_server(("127.0.0.1", port + 10_000)),
        ):
            return port


def hasten(sentinel):
    """Let a Sentinel look every half second, where it can be told so (Redis 7): by itself it may take ten."""
    with sentinel, suppress(redis.ResponseError):
        until(lambda: answers(sentinel), "the Sentinel answers")
        sentinel.execute_command("SENTINEL", "DEBUG", "info-period", 500, "publish-period", 500)


def answers(client):
    try:
        return client.ping()
    except redis.ConnectionError:
        return False


def notify_in_django(group, folder, channel):
    """Have a project send `NOTIFIED`."""
    done = subprocess.run(
        [sys.executable, "-c", NOTIFY % channel],
        cwd=folder,
        env=environment(**group.environment),
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )
    assert done.returncode == 0, done.stderr
