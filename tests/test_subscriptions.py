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
    first, second = books.acquire(["a"], now=0), books.acquire(["a"], now=0)
    assert books.take(10) == (["a"], [])
    assert books.take(10) == ([], [])
    assert not first.done()
    books.confirm(["a"])
    assert first.done()
    assert second.done()
    assert books.acquire(["a"], now=0) is None
    assert not books.waiting


@on_a_loop
def test_stream_waits_for_all_of_its_channels(books):
    """Also where another stream waits for some of them, and however they are confirmed."""
    some, all_ = books.acquire(["a", "b"], now=0), books.acquire(["a", "b", "c"], now=0)
    books.confirm(["a"])
    assert not some.done()
    books.confirm(["b"])
    assert some.done()
    assert not all_.done()
    books.confirm(["c"])
    assert all_.done()


@on_a_loop
def test_stream_that_leaves_while_it_waits_takes_no_other_with_it(books):
    """Each waits for an answer of its own."""
    gone, other = books.acquire(["a"], now=0), books.acquire(["a"], now=0)
    gone.cancel()
    books.confirm(["a"])
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
    books.confirm(["a"])
    assert late.result() is None


@on_a_loop
def test_channels_are_given_out_in_batches(books):
    """So many in one round trip, each once."""
    books.acquire([str(number) for number in range(25)], now=0)
    assert [len(books.take(10)[0]) for _ in range(4)] == [10, 10, 5, 0]


@on_a_loop
def test_idle_channel_is_dropped_after_a_while(books):
    """Not before, and not twice."""
    books.acquire(["a"], now=0)
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
    books.acquire(["a"], now=0)
    books.acquire(["a"], now=0)
    books.take(10)
    books.confirm(["a"])
    books.release(["a"], now=0)
    assert not books.sweep(now=1000)


@pytest.mark.parametrize("taken", [False, True])
def test_channel_that_is_wanted_again_while_it_is_dropped(taken):
    """Before the command is out nothing happens; after it the channel is asked for again, behind the drop."""

    @on_a_loop
    def test(books):
        books.acquire(["a"], now=0)
        books.take(10)
        books.confirm(["a"])
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
    books.confirm(["a"])
    assert books.sweep(now=LINGER)


@on_a_loop
def test_loss_fails_who_waits_and_wants_again_what_is_held(books):
    """After a reconnect exactly the channels of open streams are asked for."""
    books.acquire(["held", "gone"], now=0)
    books.take(10)
    books.confirm(["held", "gone"])
    books.release(["gone"], now=0)
    waiter = books.acquire(["new"], now=0)
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
    refused, other = books.acquire(["no"], now=0), books.acquire(["yes"], now=0)
    books.take(10)
    books.refuse("no", PermissionError("no"))
    assert isinstance(refused.exception(), PermissionError)
    assert not other.done()
    books.release(["no"], now=0)
    books.confirm(["yes"])
    assert not books.waiting
    assert books.acquire(["no"], now=0)
    assert books.take(10)[0] == ["no"]


def test_backoff_grows_with_jitter_up_to_its_limit():
    """Between half of the ceiling and the ceiling, which doubles; a success starts it over."""
    backoff = Backoff(1.0, 8.0)
    for ceiling in (1, 2, 4, 8, 8):
        assert ceiling / 2 <= backoff.next() <= ceiling
    backoff.reset()
    assert backoff.next() <= 1
    assert len({backoff.next() for _ in range(10)}) > 5
