"""How many streams and channels there may be: as counts in shared memory, and on running relays."""

import os
import re
import signal

import httpx
import pytest
from outages import Proxy
from pages import Page
from programs import program
from relay import COMMAND, Relay, watched
from servers import until

from tornado_relay.limits import Seats, Tally, network_of

LOCAL = {"RELAY_TRUSTED_PROXIES": "127.0.0.1"}
FLOOD = {"X-Forwarded-For": "6.6.6.6"}


def test_limit_holds_over_all_rows():
    """Whichever worker a stream comes to; one that ends makes room."""
    tally = Tally(2)
    one, other = (Seats(tally, row, 3, 0) for row in range(2))
    assert [seats.take("1.1.1.1") for seats in (one, other, one)] == [None] * 3
    assert "3 streams are taken" in other.take("1.1.1.2").text
    one.release("1.1.1.1")
    assert other.take("1.1.1.2") is None
    assert "RELAY_MAX_CONNECTIONS" in one.take("1.1.1.1").text


def test_limit_of_one_client():
    """Others are not concerned, and who has no address is not counted."""
    tally = Tally(2)
    one, other = (Seats(tally, row, 0, 2) for row in range(2))
    assert [seats.take("1.1.1.1") for seats in (one, other)] == [None] * 2
    assert "1.1.1.1 has 2 streams" in one.take("1.1.1.1").text
    assert other.take("1.1.1.2") is None
    assert [one.take("") for _ in range(5)] == [None] * 5
    other.release("1.1.1.1")
    assert one.take("1.1.1.1") is None


def test_clients_are_seldom_taken_for_others():
    """Of 5,000 addresses that come twice, where two are allowed, one in fifty at most is refused for the sake of others."""
    seats = Seats(Tally(1), 0, 0, 2)
    addresses = [f"10.0.{number // 250}.{number % 250}" for number in range(5000)]
    assert len([address for address in addresses * 2 if seats.take(address)]) < 100


def test_row_of_a_worker_that_ended_is_empty():
    """It did not release what it held."""
    tally = Tally(1)
    row = tally.take_row()
    with pytest.raises(OSError, match="too many workers"):
        tally.take_row()
    Seats(tally, row, 1, 1).take("1.1.1.1")
    tally.free_row(row)
    assert Seats(tally, tally.take_row(), 1, 1).take("1.1.1.1") is None


@pytest.mark.parametrize(
    ("address", "network"),
    [("1.2.3.4", "1.2.3.4"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("::1", "::/64")],
)
def test_what_counts_as_one_client(address, network):
    """A household has as many IPv6 addresses as it likes."""
    assert network_of(address) == network


def statuses(pages, relay, count, headers=None, path="/channel=x"):
    """How many of ``count`` streams stay open."""
    opened = pages.open(relay.port, [path] * count, headers)
    pages.until(
        lambda: all(page.closed or page.body.startswith(b": sse-relay-server") for page in opened), "an answer to all"
    )
    return [page for page in opened if not page.closed], [page for page in opened if page.closed]


def test_one_too_many_is_refused_softly(redis_server, tmp_path, pages):
    """On two workers exactly the limit is open, none of them ends, and a seat that is left can be had."""
    with Relay(tmp_path, "--workers", "2", "--max-connections", "20", **redis_server.environment) as relay:
        taken, refused = statuses(pages, relay, 30, {"Accept": "text/event-stream"})
        assert (len(taken), len(refused)) == (20, 10)
        assert all(page.status == 200 and page.parser.retry for page in refused)
        redis_server.publish("x", "event")
        pages.until(lambda: all(page.events for page in taken), "those that are open have the event")
        plain = httpx.get(f"{relay.url}/channel=x")
        assert plain.status_code == 503
        assert plain.text == "all 20 streams are taken (RELAY_MAX_CONNECTIONS)\n"
        pages.close(taken.pop())
        until(lambda: statuses(pages, relay, 1)[0], "its seat is free")


def test_refused_requests_hold_no_seat(redis_server, tmp_path, pages):
    """For want of a token, or of a channel."""
    environment = redis_server.environment | {"RELAY_JWT_SECRET": "s" * 40}
    with Relay(tmp_path, "--workers", "1", "--max-connections", "1", **environment) as relay:
        for path in ["/channel=x", "/events", "/channel=x?token=y"] * 3:
            assert pages.open(relay.port, [path])[0].status in {400, 401}


def test_limit_of_each_client(redis_server, tmp_path, pages):
    """By the address that the proxy saw; nobody gets more seats by headers of his own."""
    flags = ("--workers", "2", "--max-connections-per-ip", "3")
    with Relay(tmp_path, *flags, **redis_server.environment, **LOCAL) as relay:
        for forwarded in ("1.1.1.1", "6.6.6.6, 1.1.1.2", "2001:db8::1"):
            assert len(statuses(pages, relay, 5, {"X-Forwarded-For": forwarded})[0]) == 3
        for forwarded in ("7.7.7.7, 1.1.1.1", "2001:db8::2"):
            assert not statuses(pages, relay, 1, {"X-Forwarded-For": forwarded})[0]
        assert "stream opened: 1.1.1.2 on x" in relay.log
    with Relay(tmp_path, *flags, **redis_server.environment) as relay:
        opened = [page for n in range(5) for page in statuses(pages, relay, 1, {"X-Forwarded-For": f"1.1.1.{n}"})[0]]
        assert len(opened) == 3


def test_seats_of_a_worker_that_was_killed_are_free(redis_server, tmp_path, pages):
    """And a reload counts the streams of the old worker, as long as they are open, but not for ever."""
    with Relay(tmp_path, "--workers", "1", "--max-connections", "5", **redis_server.environment) as relay:
        for how in (signal.SIGKILL, signal.SIGHUP):
            until(relay.workers, "a worker")
            taken = []

            def all_taken(taken=taken):
                taken += statuses(pages, relay, 1)[0]
                return len(taken) == 5

            until(all_taken, "five seats")
            assert not statuses(pages, relay, 1)[0]
            if how == signal.SIGKILL:
                os.kill(relay.workers()[0], how)
            else:
                relay.signal(how)
            pages.until(lambda taken=taken: all(page.closed for page in taken), "they end")
        until(lambda: statuses(pages, relay, 1)[0], "a seat")


def invented(number, count=100):
    """The address of a stream on channels that nobody else knows."""
    return "/events?" + "&".join(f"channel=invented-{number}-{n}" for n in range(count))


def test_one_client_cannot_crowd_out_others_by_invented_channels(broker, tmp_path, pages, channel):
    """It is refused softly; others' streams open and get their events meanwhile, and nothing is left."""
    # With so few descriptors a worker may have 50,000 channels, and one client half of them.
    narrow = (program("prlimit"), "--nofile=1024", COMMAND)
    with watched(tmp_path, workers=1, command=narrow, **broker.environment, **LOCAL) as relay:
        port = relay.relay.port

        def channels():
            return relay.metrics()["sse_relay_channels", "0"]

        (good,) = pages.open(port, [f"/channel={channel}"], {"X-Forwarded-For": "1.1.1.1"})
        flood = []
        for number in range(10):
            flood += pages.open(port, [invented(30 * number + n) for n in range(30)], FLOOD)
            (other,) = pages.open(port, [f"/channel={channel}-{number}"], {"X-Forwarded-For": f"1.1.2.{number}"})
            broker.publish(channel, f"good-{number}")
            broker.publish(f"{channel}-{number}", f"other-{number}")
            pages.until(lambda: good.data[-1:] == [f"good-{number}"], "the event on a channel that was there")
            pages.until(lambda: other.data == [f"other-{number}"], "the event on a new channel")
        assert good.data == [f"good-{number}" for number in range(10)]
        refused = [page for page in flood if page.closed]
        assert all(page.status == 200 and page.parser.retry for page in refused)
        seen = relay.metrics()["sse_relay_refusals_total", "client-channels"]
        assert seen == len(refused) >= 50
        assert "streams are told to come back: 6.6.6.6 " in relay.relay.log
        for page in flood:
            if not page.closed:
                pages.close(page)
        until(lambda: channels() <= 11, "the invented channels are dropped", 60)
        (back,) = pages.open(port, ["/channel=one-more"], FLOOD)
        assert not back.closed


def opened(relay):
    """The clients of the streams, in the order in which they were opened."""
    return re.findall(r"stream opened: (\S+) on", relay.log)


def test_new_channels_of_others_do_not_wait_for_those_of_one_client(broker, tmp_path, pages, channel):
    """If the broker is slow, a stream does not wait for 80 others of one client, with 100 channels each."""
    with Proxy(broker.port) as proxy:
        ((name, url),) = broker.environment.items()
        environment = {name: url.replace(f":{broker.port}/", f":{proxy.port}/")}
        with Relay(tmp_path, "--workers", "1", **environment, **LOCAL) as relay:
            pages.open(relay.port, [f"/channel={channel}"], {"X-Forwarded-For": "1.1.1.1"})
            proxy.freeze()
            for number in range(80):
                pages.add(Page(relay.port, invented(number), FLOOD))
            late = pages.add(Page(relay.port, f"/channel={channel}-2", {"X-Forwarded-For": "1.1.1.2"}))
            assert httpx.get(f"{relay.url}/healthz").status_code == 200  # it came after all of them
            proxy.thaw()
            pages.until(lambda: late.status, "the stream of another client opens")
            until(lambda: "1.1.1.2" in opened(relay), "its line in the log")
            before = opened(relay).index("1.1.1.2")
            assert before < 60, f"{before} streams of one client were opened before"


def test_history_is_read_while_new_channels_wait(kept_postgres, tmp_path, pages, channel):
    """A stream that has its channel and asks the history does not wait for all channels of others."""
    with Proxy(kept_postgres.server.port) as proxy:
        url = kept_postgres.url.replace(f":{kept_postgres.server.port}/", f":{proxy.port}/")
        environment = kept_postgres.environment | {"DATABASE_URL": url}
        with Relay(tmp_path, "--workers", "1", **environment, **LOCAL) as relay:
            pages.open(relay.port, [f"/channel={channel}"])
            logged = len(kept_postgres.server.log)
            proxy.freeze()
            flood = [pages.add(Page(relay.port, invented(number), FLOOD)) for number in range(40)]
            assert httpx.get(f"{relay.url}/healthz").status_code == 200
            proxy.thaw()
            pages.until(lambda: all(page.status for page in flood), "all are answered")
            log = kept_postgres.server.log[logged:]
            assert log.index("sse_relay.event") < log.rindex('LISTEN "invented-')
