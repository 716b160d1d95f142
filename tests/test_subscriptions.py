import asyncio
import resource
from functools import partial

import pytest

from tornado_relay.brokers.backoff import Backoff
from tornado_relay.brokers.subscriptions import BURST, LINGER, RATE, SHARE, Subscriptions
from tornado_relay.errors import NoRoom


def on_a_loop(test, limit=0):
    """Futures belong to a loop; nothing else here does."""

    def run():
        async def main():
            test(Subscriptions(limit))

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def limited(limit):
    """For books that have room for so many channels."""
    return partial(on_a_loop, limit=limit)


def names(prefix, count):
    return [f"{prefix}{number}" for number in range(count)]


def serve(books, now=0.0):
    """Answer all that is wanted, as a broker would."""
    while any(batch := books.take(1000)):
        books.confirm(batch[0], now)


def hold(books, channels, client="", now=0.0):
    books.acquire(channels, now, client)
    serve(books, now)


def refusal(books, channels, client="", now=0.0):
    """The reason for which a stream on these channels is refused."""
    with pytest.raises(NoRoom) as refused:
        books.acquire(channels, now, client)
    return refused.value.reason


@on_a_loop
def test_first_stream_waits_until_the_channel_is_confirmed(books):
    """A second stream waits for the same answer, a third finds it given."""
    first, second = books.acquire(["a"], now=0), books.acquire(["a"], now=0)
    assert books.take(10) == (["a"], [])
    assert books.take(10) == ([], [])
    assert not first.done()
    books.confirm(["a"], now=0)
    assert first.done()
    assert second.done()
    assert books.acquire(["a"], now=0) is None
    assert not books.waiting


@on_a_loop
def test_stream_waits_for_all_of_its_channels(books):
    """Also where another stream waits for some of them, and however they are confirmed."""
    some, all_ = books.acquire(["a", "b"], now=0), books.acquire(["a", "b", "c"], now=0)
    books.take(10)
    books.confirm(["a"], now=0)
    assert not some.done()
    books.confirm(["b"], now=0)
    assert some.done()
    assert not all_.done()
    books.confirm(["c"], now=0)
    assert all_.done()


@on_a_loop
def test_stream_that_leaves_while_it_waits_takes_no_other_with_it(books):
    """Each waits for an answer of its own."""
    gone, other = books.acquire(["a"], now=0), books.acquire(["a"], now=0)
    gone.cancel()
    books.take(10)
    books.confirm(["a"], now=0)
    assert other.done()
    assert not other.cancelled()


@on_a_loop
def test_nobody_waits_for_ever(books):
    """Who has waited for too long is told, who came later goes on waiting, and so does the channel."""
    early, late = books.acquire(["a"], now=100), books.acquire(["a"], now=101)
    books.take(10)
    books.overdue(100, TimeoutError("too long"))
    assert isinstance(early.exception(), TimeoutError)
    assert not late.done()
    books.confirm(["a"], now=0)
    assert late.result() is None


@on_a_loop
def test_channels_are_given_out_in_batches(books):
    """Each channel is given out once, and the next batch goes out after the answer to the last one."""
    books.acquire(names("c", 25), now=0)
    given = []
    for size in (10, 10, 5, 0):
        add, _ = books.take(10)
        assert len(add) == size
        books.confirm(add, now=0)
        given += add
    assert given == names("c", 25)


@on_a_loop
def test_idle_channel_is_dropped_after_a_while(books):
    """Not before, and not twice."""
    books.acquire(["a"], now=0)
    books.take(10)
    books.confirm(["a"], now=0)
    books.release(["a"], now=100)
    assert not books.sweep(now=100 + LINGER - 1)
    assert books.sweep(now=100 + LINGER)
    assert books.take(10) == ([], ["a"])
    assert not books.sweep(now=200)


@on_a_loop
def test_channel_with_a_stream_left_is_kept(books):
    """Only the last stream's end makes it idle."""
    books.acquire(["a"], now=0)
    books.acquire(["a"], now=0)
    books.take(10)
    books.confirm(["a"], now=0)
    books.release(["a"], now=0)
    assert not books.sweep(now=1000)


@pytest.mark.parametrize("taken", [False, True])
def test_channel_that_is_wanted_again_while_it_is_dropped(taken):
    """Before the command is out nothing happens; after it the channel is asked for again, behind the drop."""

    @on_a_loop
    def test(books):
        books.acquire(["a"], now=0)
        books.take(10)
        books.confirm(["a"], now=0)
        books.release(["a"], now=0)
        books.sweep(now=LINGER)
        if taken:
            assert books.take(10) == ([], ["a"])
        waiter = books.acquire(["a"], now=LINGER)
        assert (waiter is not None) == taken
        assert books.take(10) == ((["a"], []) if taken else ([], []))

    test()


@on_a_loop
def test_stream_that_leaves_before_the_answer_makes_the_channel_idle(books):
    """It is confirmed first and dropped later, so that the books match the broker's."""
    books.acquire(["a"], now=0)
    books.take(10)
    books.release(["a"], now=0)
    assert not books.sweep(now=LINGER)
    books.confirm(["a"], now=LINGER)
    assert not books.sweep(now=2 * LINGER - 1)
    assert books.sweep(now=2 * LINGER)
    assert books.take(10) == ([], ["a"])


@on_a_loop
def test_loss_fails_who_waits_and_wants_again_what_is_held(books):
    """After a reconnect exactly the channels of open streams are asked for."""
    books.acquire(["held", "gone"], now=0)
    books.take(10)
    books.confirm(["held", "gone"], now=0)
    books.release(["gone"], now=0)
    waiter = books.acquire(["new"], now=0)
    books.lost(ConnectionError("away"))
    assert isinstance(waiter.exception(), ConnectionError)
    books.release(["new"], now=0)
    assert len(books) == 0
    assert books.take(10)[0] == ["held"]
    books.confirm(["held"], now=0)
    assert not books.waiting


@on_a_loop
def test_channel_that_the_broker_refuses_fails_alone(books):
    """Its streams are told, nobody waits for it any more, and the next one asks again."""
    refused, other = books.acquire(["no"], now=0), books.acquire(["yes"], now=0)
    books.take(10)
    books.refuse("no", PermissionError("no"))
    assert isinstance(refused.exception(), PermissionError)
    assert not other.done()
    books.release(["no"], now=0)
    books.confirm(["yes"], now=0)
    assert not books.waiting
    assert books.acquire(["no"], now=0)
    assert books.take(10)[0] == ["no"]


@on_a_loop
def test_nothing_is_kept_of_a_name_that_the_broker_refuses(books):
    """The name is forgotten if its stream still waits, and also if its stream has gone."""
    for number in range(1000):
        books.acquire([f"kept{number}", f"gone{number}"], now=0, client="6.6.6.6")
        books.take(10)
        books.release([f"gone{number}"], now=0)
        for name in (f"kept{number}", f"gone{number}"):
            books.refuse(name, PermissionError("no"))
        books.release([f"kept{number}"], now=0)
    assert not books.waiting
    assert not any(holds_something(books))


def holds_something(books):
    """The sizes of all that the books keep, but for what clients may bring again soon."""
    for name, value in vars(books).items():
        if name != "_allowances" and hasattr(value, "__len__"):
            yield len(value)


@on_a_loop
def test_refused_name_is_asked_for_again_while_its_last_stream_leaves(books):
    """The stream that was refused takes nothing of the hold of the one that came after it."""
    books.acquire(["no"], now=0)
    books.take(10)
    books.refuse("no", PermissionError("no"))
    second = books.acquire(["no"], now=0)
    books.release(["no"], now=0)
    assert books.take(10) == (["no"], [])
    books.confirm(["no"], now=0)
    assert second.done()
    assert not books.sweep(now=1000)


@on_a_loop
def test_channel_that_nobody_waits_for_is_not_asked_for(books):
    """A stream that leaves before its channels were sent costs the broker nothing."""
    books.acquire(names("gone", 100), now=0, client="6.6.6.6")
    books.acquire(["a"], now=0)
    books.release(names("gone", 100), now=0)
    assert books.take(1000) == (["a"], [])
    books.confirm(["a"], now=0)
    assert not books.waiting


@on_a_loop
def test_clients_take_turns(books):
    """A batch has the channels of all clients that wait, and few of the one that wants thousands."""
    for number in range(50):
        books.acquire(names(f"flood{number}-", 100), now=0, client="6.6.6.6")
    books.take(1000)  # is under way when the others come
    for number in range(30):
        books.acquire([f"user{number}"], now=0, client=f"1.1.1.{number}")
    assert books.take(1000) == ([], [])
    books.confirm(names("flood0-", 100) + names("flood1-", 100), now=0)
    add, _ = books.take(1000)
    assert set(names("user", 30)) <= set(add)
    assert len(add) == 30 + SHARE


@on_a_loop
def test_client_does_not_wait_for_the_turn_of_another_that_wants_the_same(books):
    """Names can be guessed, so somebody may have queued them before."""
    books.acquire(names("user", 5000), now=0, client="6.6.6.6")
    waiter = books.acquire(["user4999"], now=0, client="1.1.1.1")
    add, _ = books.take(1000)
    assert "user4999" in add
    books.confirm(add, now=0)
    assert waiter.done()
    serve(books)
    assert not books.waiting


@on_a_loop
def test_broker_that_leaves_some_unanswered_is_asked_for_others(books):
    """A Cluster of which one slot has no server is asked for others once each second."""
    books.acquire(names("stuck", 10), now=0)
    books.take(10)
    good = books.acquire(["good"], now=0)
    assert books.take(10) == ([], [])
    assert books.sweep(now=1)
    assert books.take(10) == (["good"], [])
    books.confirm(["good"], now=1)
    assert good.done()
    assert books.waiting


@limited(10)
def test_channels_are_bounded(books):
    """One too many is refused and holds nothing; confirmed ones are served, and idle ones make room."""
    hold(books, names("a", 6))
    hold(books, names("b", 4))
    assert refusal(books, ["b0", "new"]) == "channels"
    assert books.acquire(["a0", "b3"], now=0) is None
    books.release(["a0", "b3"], now=0)
    books.release(names("b", 4), now=0)
    assert books.acquire(["new", "b3"], now=1)
    assert books.take(10) == (["new"], ["b0"])
    books.confirm(["new"], now=1)
    assert len(books) == 10
    assert refusal(books, names("more", 3)) == "channels"
    assert books.acquire(["b1"], now=1) is None


@limited(1000)
def test_one_client_gets_half_and_leaves_room_for_others(books):
    """The more clients hold many channels, the fewer each of them may have; a newcomer finds room."""
    for number in range(50):
        hold(books, names(f"one{number}-", 10), "6.6.6.6")
    assert refusal(books, ["one more"], "6.6.6.6") == "client-channels"
    assert books.acquire(["one0-0"], 0, "6.6.6.6") is None
    while True:
        try:
            hold(books, [f"two{len(books)}"], "6.6.6.7")
        except NoRoom:
            break
    assert len(books) == 750
    hold(books, names("three", 100), "1.1.1.1")
    hold(books, names("four", 100), "1.1.1.2")
    books.release(names("one0-", 10), now=0)
    books.sweep(now=LINGER)
    serve(books)
    assert len(books) == 941


@limited(100)
def test_idle_channels_do_not_count_for_their_client(books):
    """Pages of one client that come and go find room, as long as few are there at a time."""
    for number in range(50):
        page = names(f"page{number}-", 10)
        hold(books, page, "1.1.1.1", now=number)
        books.release(page, now=number)
        assert len(books) <= 100
    hold(books, names("page49-", 10), "1.1.1.1", now=50)
    hold(books, names("more", 40), "1.1.1.1", now=50)
    assert refusal(books, ["one more"], "1.1.1.1", now=50) == "client-channels"


@limited(20_000)
def test_clients_without_an_address_share_the_limit_of_the_worker(books):
    """By a Unix socket without a proxy nobody can be told from others."""
    for number in range(200):
        hold(books, names(f"c{number}-", 100))
    assert len(books) == 20_000
    assert refusal(books, ["new"]) == "channels"


@on_a_loop
def test_20000_streams_with_a_channel_each_find_room(books):
    """With a mixed-case twin each, and with 100 channels that all of them share."""
    for number in range(20_000):
        hold(
            books,
            [f"User-{number}", f"user-{number}", f"shared-{number % 100}"],
            f"10.{number % 250}.{number // 250}.1",
        )
    assert len(books) == 40_100


@pytest.mark.parametrize("descriptors", [1024, 100_000, 1_000_000])
def test_there_is_room_for_two_channels_of_each_stream(descriptors, monkeypatch):
    """All streams that a worker has descriptors for may have a channel of one user, and its twin."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert Subscriptions().limit >= max(50_000, 2 * (descriptors - 4096 - 64))


@on_a_loop
def test_new_channels_of_one_client_are_paced(books):
    """An office comes back at once; a client that goes on inventing names is refused, others are not."""
    for number in range(BURST // 100):
        hold(books, names(f"a{number}-", 100), "6.6.6.6")
        books.release(names(f"a{number}-", 100), now=0)
    assert refusal(books, ["new"], "6.6.6.6") == "client-channels"
    assert books.acquire(names("a0-", 100), 0, "6.6.6.6") is None
    hold(books, names("other", 100), "1.1.1.1")
    hold(books, names("b", RATE), "6.6.6.6", now=1)
    assert refusal(books, ["new"], "6.6.6.6", now=1) == "client-channels"
    hold(books, ["new"], "6.6.6.6", now=1.01)


@on_a_loop
def test_client_that_holds_nothing_is_forgotten(books):
    """Once it may bring as many channels as any other."""
    for number in range(1000):
        hold(books, [f"c{number}"], f"10.0.{number // 250}.{number % 250}")
        books.release([f"c{number}"], now=0)
    for now in (LINGER, BURST / RATE):
        books.sweep(now)
        serve(books, now)
    assert len(books) == 0
    assert not any(len(value) for value in vars(books).values() if hasattr(value, "__len__"))


@on_a_loop
def test_loss_costs_a_client_nothing_of_its_allowance(books):
    """What is held is wanted again, however much that is."""
    for number in range(BURST // 100):
        hold(books, names(f"c{number}-", 100), "1.1.1.1")
    books.lost(ConnectionError("away"))
    assert books.waiting
    serve(books)
    assert len(books) == BURST
    assert not books.waiting


class Clock(float):
    """A time that counts how often somebody looks how long ago another one was."""

    def __new__(cls, value):
        clock = super().__new__(cls, value)
        clock.looks = 0
        return clock

    def __sub__(self, other):
        self.looks += 1
        return float(self) - other


@on_a_loop
def test_sweep_looks_at_what_is_due(books):
    """Of 10,000 idle channels a sweep looks only at the oldest if none of them is due."""
    hold(books, names("idle", 10_000))
    books.release(names("idle", 10_000), now=0)
    now = Clock(LINGER - 1)
    assert not books.sweep(now)
    assert now.looks <= 1
    books.release(books_of_one(books), now=1)
    now = Clock(LINGER)
    assert books.sweep(now)
    assert now.looks <= 10_001
    assert sum(len(books.take(1000)[1]) for _ in range(11)) == 10_000


def books_of_one(books):
    hold(books, ["late"], now=1)
    return ["late"]


def test_backoff_grows_with_jitter_up_to_its_limit():
    """Between half of the ceiling and the ceiling, which doubles; a success starts it over."""
    backoff = Backoff(1.0, 8.0)
    for ceiling in (1, 2, 4, 8, 8):
        assert ceiling / 2 <= backoff.next() <= ceiling
    backoff.reset()
    assert backoff.next() <= 1
    assert len({backoff.next() for _ in range(10)}) > 5
