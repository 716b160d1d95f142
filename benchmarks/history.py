"""What the history costs a publisher, beside bare NOTIFY and PUBLISH: python benchmarks/history.py.

On servers of its own, fsync on as in production. Prints events a second and the ratio, for one writer and for
eight: with a history writers take turns from the lock until their commit is on disk, as NOTIFY has it anyway.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg2
import redis

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from servers import PostgresServer, RedisServer

from tornado_relay import schema
from tornado_relay.brokers.redis import scripts

SECONDS = 3.0
KEYS = scripts.Keys("sse-relay")
PAYLOAD = '{"data":"%s"}' % ("x" * 100)
STATEMENTS = {"bare": "SELECT pg_notify('c%d', %%s)", "history": "SELECT sse_relay.publish('c%d', %%s, NULL)"}


def rate(make, writers):
    """Events a second of ``writers`` threads, each of which calls what ``make(number)`` gave it."""
    counts = [0] * writers
    end = time.monotonic() + SECONDS

    def work(number):
        publish = make(number)
        while time.monotonic() < end:
            publish(counts[number])
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def on_postgres(server, kind):
    def make(number):
        connection = psycopg2.connect(server.url)
        connection.autocommit = True
        cursor = connection.cursor()
        statement = STATEMENTS[kind] % number
        # Blanks at the end as notify() has them: NOTIFY folds equal payloads.
        return lambda count: cursor.execute(statement, (PAYLOAD + " " * (count % 7),))

    return make


def on_redis(server, kind):
    def make(number):
        client = redis.Redis(port=server.port)
        channel, script = f"c{number}", scripts.text("publish")
        if kind == "bare":
            return lambda _: client.publish(channel, PAYLOAD)
        keys = (KEYS.state, KEYS.spans, KEYS.events(channel), KEYS.own_ids(channel))
        client.eval(script, len(keys), *keys, channel, PAYLOAD, "", "1", "", "", "")
        digest = scripts.digest(script)
        return lambda _: client.evalsha(digest, len(keys), *keys, channel, PAYLOAD, "", "", "", "", "")

    return make


def main():
    with tempfile.TemporaryDirectory(prefix="sse-relay-benchmark-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        postgres = PostgresServer(home, fsync="on", log_statement="none")
        (home / "redis").mkdir()
        store = RedisServer(home / "redis")
        try:
            list(schema.install(postgres.url))
            state = {"keep": 1000, "seconds": 86400, "since": 0, "token": "00000000", "seq": 0}
            store.client.hset(KEYS.state, mapping=state)
            for name, server, on in (("PostgreSQL", postgres, on_postgres), ("Redis", store, on_redis)):
                for writers in (1, 8):
                    bare, kept = (rate(on(server, kind), writers) for kind in ("bare", "history"))
                    print(
                        f"{name}, {writers} writers: bare {bare:,.0f}/s, history {kept:,.0f}/s, {bare / kept:.2f} times the cost"
                    )
        finally:
            postgres.stop("immediate")
            store.stop()


if __name__ == "__main__":
    main()
