import random

import pytest

from tornado_relay.brokers.message import Message
from tornado_relay.hub import Hub


class Sink:
    def __init__(self, *channels):
        self.channels = self.audible = channels
        self.sent = []
        self.position = 0

    def send(self, data):
        self.sent.append(data)


@pytest.fixture
def hub():
    return Hub()


def joined(hub, *channels):
    sink = Sink(*channels)
    hub.add(sink)
    return sink


def test_event_reaches_its_channel_only(hub):
    """A stream gets what it subscribed to."""
    a, b = joined(hub, "a"), joined(hub, "b")
    hub.deliver([Message("a", "x")])
    assert (a.sent, b.sent) == ([b"data: x\n\n"], [])


def test_batch_is_one_write_of_shared_bytes(hub):
    """Events that wait are one send, and all streams of a channel get the very same object."""
    a, b = joined(hub, "a"), joined(hub, "a")
    hub.deliver([Message("a", "1"), Message("a", "2")])
    assert a.sent == [b"data: 1\n\ndata: 2\n\n"]
    assert a.sent[0] is b.sent[0]


def test_frame_is_encoded_once_for_all_streams(hub, monkeypatch):
    """The cost of encoding does not grow with the streams, and nobody's event costs nothing."""
    import tornado_relay.events

    calls = []
    encode = tornado_relay.events.encode
    monkeypatch.setattr(tornado_relay.events, "encode", lambda event: calls.append(event) or encode(event))
    for _ in range(100):
        joined(hub, "a")
        joined(hub, "a", "b")
    hub.deliver([Message("a", "x"), Message("nobody", "x")])
    assert len(calls) == 1


def test_order_across_channels_is_the_brokers(hub):
    """A stream on several channels gets a batch in its order, in one send."""
    sink = joined(hub, "a", "b", "c")
    batch = [Message(random.choice("abc"), str(number)) for number in range(50)]
    hub.deliver(batch)
    assert sink.sent == [b"".join(b"data: %d\n\n" % number for number in range(50))]


def test_event_reaches_a_stream_once(hub):
    """Also one that hears the channel by two names."""
    sink = joined(hub, "Orders", "orders")
    hub.deliver([Message("orders", "x")])
    assert sink.sent == [b"data: x\n\n"]


def test_removed_stream_gets_nothing_and_is_forgotten(hub):
    """Nothing is kept of a stream that ended, and removing it again is harmless."""
    sink = joined(hub, "a")
    other = joined(hub, "a", "b")
    assert hub.remove(sink)
    assert not hub.remove(sink)
    assert hub.remove(other)
    hub.deliver([Message("a", "x"), Message("b", "x")])
    assert (sink.sent, other.sent, len(hub), list(hub)) == ([], [], 0, [])
    assert not hub._solo  # noqa: SLF001
    assert not hub._mixed  # noqa: SLF001


def test_stream_that_leaves_while_it_is_sent_to_disturbs_no_other(hub):
    """A slow reader is cut inside send()."""

    class Leaving(Sink):
        def send(self, data):
            hub.remove(self)

    hub.add(Leaving("a"))
    stays = joined(hub, "a")
    hub.add(Leaving("a"))
    hub.deliver([Message("a", "x")])
    hub.heartbeat()
    assert stays.sent == [b"data: x\n\n", b":\n\n"]


def test_reset_names_each_streams_own_channels(hub):
    """What a page may have missed depends on what it asked for."""
    a, b = joined(hub, "a"), joined(hub, "b", "c")
    hub.reset("broker-reconnect")
    assert b'"channels":["a"]' in a.sent[0]
    assert b'"channels":["b","c"]' in b.sent[0]
