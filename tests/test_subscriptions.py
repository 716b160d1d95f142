import asyncio

import pytest

from tornado_relay.brokers.backoff import Backoff
from tornado_relay.brokers.subscriptions import LINGER, Subscriptions


def on_a_loop(test):
    """Futures belong to a loop; nothing else here does."""

    def run():
        async def main():
            test(Subscriptions())

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_a_loop
def test_first_stream_waits_until_the_channel_is_confirmed(books):
    """A second stream waits for the same answer, a third finds it given."""
    (first,), (second,) = books.acquire(["a"]), books.acquire(["a"])
    assert first is second
    assert books.take(10) == (["a"], [])
    assert books.take(10) == ([], [])
    assert not first.done()
    books.confirm(["a"])
    assert first.done()
    assert books.acquire(["a"]) == set()
    assert not books.waiting


@on_a_loop
def test_channels_are_given_out_in_batches(books):
    """So many in one round trip, each once."""
    books.acquire([str(number) for number in range(25)])
    assert [len(books.take(10)[0]) for _ in range(4)] == [10, 10, 5, 0]


@on_a_loop
def test_idle_channel_is_dropped_after_a_while(books):
    """Not before, and not twice."""
    books.acquire(["a"])
    books.take(10)
    books.confirm(["a"])
    books.release(["a"], now=100)
    assert not books.sweep(now=100 + LINGER - 1)
    assert books.sweep(now=100 + LINGER)
    assert books.take(10) == ([], ["a"])
    assert not books.sweep(now=200)


@on_a_loop
def test_channel_with_a_stream_left_is_kept(books):
    """Only the last stream's end makes it idle."""
    books.acquire(["a"])
    books.acquire(["a"])
    books.take(10)
    books.confirm(["a"])
    books.release(["a"], now=0)
    assert not books.sweep(now=1000)


@pytest.mark.parametrize("taken", [False, True])
def test_channel_that_is_wanted_again_while_it_is_dropped(taken):
    """Before the command is out nothing happens; after it the channel is asked for again, behind the drop."""

    @on_a_loop
    def test(books):
        books.acquire(["a"])
        books.take(10)
        books.confirm(["a"])
        books.release(["a"], now=0)
        books.sweep(now=LINGER)
        if taken:
            assert books.take(10) == ([], ["a"])
        waiters = books.acquire(["a"])
        assert len(waiters) == (1 if taken else 0)
        assert books.take(10) == ((["a"], []) if taken else ([], []))

    test()


@on_a_loop
def test_stream_that_leaves_before_the_answer_makes_the_channel_idle(books):
    """It is confirmed first and dropped later, so that the books match the broker's."""
    books.acquire(["a"])
    books.take(10)
    books.release(["a"], now=0)
    assert not books.sweep(now=LINGER)
    books.confirm(["a"])
    assert books.sweep(now=LINGER)


@on_a_loop
def test_loss_fails_who_waits_and_wants_again_what_is_held(books):
    """After a reconnect exactly the channels of open streams are asked for."""
    books.acquire(["held", "gone"])
    books.take(10)
    books.confirm(["held", "gone"])
    books.release(["gone"], now=0)
    (waiter,) = books.acquire(["new"])
    books.lost(ConnectionError("away"))
    assert isinstance(waiter.exception(), ConnectionError)
    books.release(["new"], now=0)
    assert len(books) == 0
    assert books.take(10)[0] == ["held", "new"]
    books.confirm(["held", "new"])
    assert not books.waiting


@on_a_loop
def test_channel_that_the_broker_refuses_fails_alone(books):
    """Its streams are told, nobody waits for it any more, and the next one asks again."""
    (refused,), (other,) = books.acquire(["no"]), books.acquire(["yes"])
    books.take(10)
    books.refuse("no", PermissionError("no"))
    assert isinstance(refused.exception(), PermissionError)
    assert not other.done()
    books.release(["no"], now=0)
    books.confirm(["yes"])
    assert not books.waiting
    assert books.acquire(["no"])
    assert books.take(10)[0] == ["no"]


def test_backoff_grows_with_jitter_up_to_its_limit():
    """Between half of the ceiling and the ceiling, which doubles; a success starts it over."""
    backoff = Backoff(1.0, 8.0)
    for ceiling in (1, 2, 4, 8, 8):
        assert ceiling / 2 <= backoff.next() <= ceiling
    backoff.reset()
    assert backoff.next() <= 1
    assert len({backoff.next() for _ in range(10)}) > 5
