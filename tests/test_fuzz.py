"""Nothing that anybody sends breaks a relay: 100,000 requests and 20,000 payloads from a seed; `make fuzz` takes more."""

import os
import random
from itertools import count

import httpx
import pytest
from fuzz import SECRET, TOKEN, Attacker, payload
from relay import Relay

from tornado_relay.events import frame
from tornado_relay.eventsource import Parser
from tornado_relay.tokens import subscribe_token

# The seed and a factor for the numbers, as `make fuzz` sets them.
SEED = int(os.environ.get("SSE_RELAY_FUZZ_SEED", "4"))
TIMES = int(os.environ.get("SSE_RELAY_FUZZ_TIMES", "1"))
DOCUMENTED = {100, 200, 202, 204, 400, 401, 403, 404, 405, 413, 503}


def unharmed(relay, workers):
    """No worker was lost, and nothing is in the log that is not of a stream."""
    assert relay.workers() == workers
    said = [line for line in relay.log.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert said == []
    assert httpx.get(f"{relay.url}/readyz").status_code == 200


@pytest.mark.parametrize("guarded", [False, True])
def test_no_request_breaks_a_relay(kept, tmp_path, pages, guarded):
    """Streams that were open stay so and get their events, once and in order; each whole request has an answer."""
    environment = kept.environment | {"RELAY_PUBLISH_TOKEN": TOKEN} | ({"RELAY_JWT_SECRET": SECRET} if guarded else {})
    own = subscribe_token("watched", ttl=10**6, key=SECRET)
    with Relay(tmp_path, "--workers", "2", **environment) as relay:
        workers = relay.workers()
        watching = pages.open(relay.port, ["/channel=watched"] * 10, {"Cookie": f"relay_token={own}"})
        numbers = count()

        def meanwhile():
            kept.publish("watched", str(next(numbers)))
            pages.read(0)

        attacker = Attacker(relay.port, SEED + guarded, meanwhile)
        attacker.run(25_000 * TIMES)
        meanwhile()
        last = next(numbers) - 1
        pages.until(lambda: all(page.data[-1:] == [str(last)] for page in watching), "the last event")
        assert all(page.data == list(map(str, range(last + 1))) for page in watching)
        unharmed(relay, workers)
    assert set(attacker.statuses) <= DOCUMENTED
    # It was not all rubbish.
    assert all(attacker.statuses[status] > 20 for status in (200, 202, 204, 400, 401, 403, 404, 405))


def test_no_payload_on_postgres_breaks_a_relay(kept_postgres, tmp_path, pages, channel):
    """Each is the one event that the codec makes of it, kept or not; nothing in it becomes another."""
    import psycopg2

    rng = random.Random(SEED)
    payloads = [payload(rng).encode("utf-8", "replace").decode().replace("\0", "") for _ in range(10_000 * TIMES)]
    payloads = [text for text in payloads if len(text.encode()) < 8000]
    connection = psycopg2.connect(kept_postgres.url)
    connection.autocommit = True
    with connection.cursor() as cursor:

        def publish(text):
            if rng.random() < 0.8:
                cursor.execute("SELECT pg_notify(%s, %s)", (channel, text))
            else:
                kept_postgres.publisher.publish(channel, text)

        same_on_all(kept_postgres, tmp_path, pages, channel, payloads, publish)
    connection.close()


def test_no_payload_on_redis_breaks_a_relay(kept_redis, tmp_path, pages, channel):
    """The same, with bytes that are no UTF-8 as well."""
    rng = random.Random(SEED)
    payloads = [payload(rng).encode("utf-8", "surrogatepass") for _ in range(9_000 * TIMES)]
    payloads += [rng.randbytes(rng.randrange(60)) for _ in range(1_000 * TIMES)]
    rng.shuffle(payloads)

    def publish(data):
        if rng.random() < 0.8:
            kept_redis.server.publish(channel, data)
        else:
            kept_redis.publisher.publish(channel, data)

    same_on_all(kept_redis, tmp_path, pages, channel, payloads, publish)


def same_on_all(kept, home, pages, channel, payloads, publish):
    expected = []
    for each in payloads:
        text = each if isinstance(each, str) else each.decode("utf-8", "replace")
        events = list(Parser().feed(frame(text).decode()))
        assert len(events) <= 1
        expected += [(event.event, event.data) for event in events]
    with Relay(home, "--workers", "2", **kept.environment) as relay:
        workers = relay.workers()
        opened = pages.open(relay.port, [f"/channel={channel}"] * 4)
        for number, each in enumerate(payloads):
            publish(each)
            if number % 50 == 0:
                pages.read(0)
        kept.publish(channel, "the last")
        pages.until(lambda: all(page.data[-1:] == ["the last"] for page in opened), "the last event")
        for page in opened:
            assert [(event.event, event.data) for event in page.events[:-1]] == expected
        unharmed(relay, workers)
