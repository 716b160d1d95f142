"""The payloads that were too large for NOTIFY, with a fake in place of the connection."""

import asyncio

import pytest

from tornado_relay.brokers.message import Message
from tornado_relay.brokers.postgres.large_payloads import BATCH, LargePayloads
from tornado_relay.errors import BrokerRefused, BrokerUnavailable


class History:
    """Answers reads when it is let, and remembers what was asked."""

    def __init__(self, error=None):
        self.asked = []
        self.answer = asyncio.Event()
        self.error = error

    async def query(self, _, arguments):
        (numbers,) = arguments
        self.asked.append(numbers)
        await self.answer.wait()
        if self.error:
            raise self.error
        return [(number, f"large {number}") for number in numbers]


def message(number, *, large=False):
    return Message("a", None if large else f"small {number}", f"00000000-{number}", number)


def payloads(passed):
    """What was passed on, in order."""
    return [(each.seq, each.payload) for messages, _ in passed for each in messages]


def run(scenario, error=None):
    """Run ``scenario`` with a history and what passes messages on, and return what was passed on, batch by batch."""
    passed = []

    async def main():
        history = History(error)
        await scenario(LargePayloads(history.query, lambda *batch: passed.append(batch)), history)

    asyncio.run(main())
    return passed


async def turns():
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_messages_with_their_payloads_pass_at_once():
    """Nothing is read for them."""

    async def scenario(large, history):
        large.pass_on([message(1), message(2)], 5.0)
        assert history.asked == []

    passed = run(scenario)
    assert payloads(passed) == [(1, "small 1"), (2, "small 2")]
    assert passed[0][1] == 5.0


def test_messages_behind_a_large_one_wait_for_it():
    """The order holds, and the time is that of the first message that waited."""

    async def scenario(large, history):
        large.pass_on([message(1), message(2, large=True)], 5.0)
        await turns()
        large.pass_on([message(3)], 6.0)
        history.answer.set()
        await turns()
        large.pass_on([message(4)], 7.0)

    passed = run(scenario)
    assert payloads(passed) == [(1, "small 1"), (2, "large 2"), (3, "small 3"), (4, "small 4")]
    assert [arrived for _, arrived in passed] == [5.0, 5.0, 7.0]


def test_many_large_payloads_are_read_in_batches():
    """Each payload is read once, and no read has more than a batch of them."""

    async def scenario(large, history):
        history.answer.set()
        large.pass_on([message(number, large=True) for number in range(1, 2 * BATCH + 2)], 5.0)
        await turns()
        assert [len(asked) for asked in history.asked] == [BATCH, BATCH, 1]

    assert payloads(run(scenario)) == [(number, f"large {number}") for number in range(1, 2 * BATCH + 2)]


def test_payloads_that_may_not_be_read_leave_a_gap():
    """The hub then sends a reset in place of each, in the order of the messages."""

    async def scenario(large, history):
        history.answer.set()
        large.pass_on([message(1), message(2, large=True), message(3)], 5.0)
        await turns()

    assert payloads(run(scenario, BrokerRefused("no"))) == [(1, "small 1"), (2, None), (3, "small 3")]


@pytest.mark.parametrize("error", [None, BrokerUnavailable("gone")])
def test_nothing_that_waits_outlives_the_connection(error):
    """Streams get it from the history, or a reset; the next connection begins with nothing."""

    async def scenario(large, history):
        large.pass_on([message(1, large=True), message(2)], 5.0)
        await turns()
        if error:
            history.answer.set()
            await turns()
        large.clear()
        history.error = None
        history.answer.set()
        large.pass_on([message(3, large=True)], 6.0)
        await turns()

    assert payloads(run(scenario, error)) == [(3, "large 3")]
