import random
import re
import time

import pytest

from tornado_relay.brokers.message import Message
from tornado_relay.counts import DELIVERIES, EVENTS, FANOUT, LATENCY, RESETS
from tornado_relay.events import HEARTBEAT, position
from tornado_relay.fanout import TURN
from tornado_relay.hub import Hub
from tornado_relay.unkept import Unkept


class Sink:
    def __init__(self, *channels, labels=False):
        self.channels = self.audible = channels
        self.labels = labels
        self.sent = []
        self.position = self.reached = 0

    def send(self, data):
        self.sent.append(data)


@pytest.fixture
def hub():
    return Hub()


def joined(hub, *channels, labels=False):
    sink = Sink(*channels, labels=labels)
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


def test_labels(hub):
    """Of two streams on the same channels the one that wants labels is told which channel an event is of; on one, or several."""
    plain, labelled = ([joined(hub, *names, labels=labels) for names in ("a", "ab")] for labels in (False, True))
    hub.deliver([Message("a", "1", seq=7), Message("b", "2")])
    assert [sink.sent for sink in plain] == [[b"data: 1\n\n"], [b"data: 1\n\ndata: 2\n\n"]]
    assert [sink.sent for sink in labelled] == [
        [b"channel: a\nseq: 7\ndata: 1\n\n"],
        [b"channel: a\nseq: 7\ndata: 1\n\nchannel: b\ndata: 2\n\n"],
    ]


def test_labelled_streams_share_their_bytes_too(hub):
    """Those on the same channel get one object, which is packed once."""
    a, b = joined(hub, "a", labels=True), joined(hub, "a", labels=True)
    hub.deliver([Message("a", "1"), Message("a", "2")])
    assert a.sent == [b"channel: a\ndata: 1\n\nchannel: a\ndata: 2\n\n"]
    assert a.sent[0] is b.sent[0]


def test_nothing_is_labelled_for_nobody(hub, monkeypatch):
    """Once the last stream that wants labels has left."""
    import tornado_relay.events

    joined(hub, "a")
    hub.remove(joined(hub, "a", labels=True))
    monkeypatch.delattr(tornado_relay.events, "label")
    hub.deliver([Message("a", "1")])


def test_removed_stream_gets_nothing_and_is_forgotten(hub):
    """Nothing is kept of a stream that ended, and removing it again is harmless."""
    sink = joined(hub, "a")
    other = joined(hub, "a", "b")
    assert hub.remove(sink)
    assert not hub.remove(sink)
    assert hub.remove(other)
    hub.deliver([Message("a", "x"), Message("b", "x")])
    assert (sink.sent, other.sent, len(hub), list(hub)) == ([], [], 0, [])
    assert list(hub.sizes()) == []


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
    assert stays.sent == [b"data: x\n\n", HEARTBEAT]


def test_reset_names_each_streams_own_channels(hub):
    """What a page may have missed depends on what it asked for."""
    a, b = joined(hub, "a"), joined(hub, "b", "c")
    hub.reset("broker-reconnect")
    assert b'"channels":["a"]' in a.sent[0]
    assert b'"channels":["b","c"]' in b.sent[0]


def kept(seq, channel="a"):
    return Message(channel, str(seq), f"aaaaaaaa-{seq}", seq)


@pytest.fixture
def history():
    return Hub(history=True)


def test_history_gives_events_their_ids(history):
    """What none keeps has none; without a history there are none at all."""
    sink = joined(history, "a")
    history.deliver([kept(1), Message("a", "x")])
    assert sink.sent == [b"id: aaaaaaaa-1\ndata: 1\n\ndata: x\n\n"]
    plain = Hub()
    sink = joined(plain, "a")
    plain.deliver([kept(1)])
    assert sink.sent == [b"data: 1\n\n"]


def test_held_stream_gets_heartbeats_only(history):
    """Until it joins; then all that is behind its position, once."""
    sink = joined(history, "a")
    history.hold(sink)
    history.deliver([kept(1)])
    history.heartbeat()
    sink.position = 3  # brought there from the history, while the broker's messages are at 1
    history.join(sink)
    history.deliver([kept(2), kept(3), kept(4)])
    history.deliver([kept(5)])
    frames = [b"id: aaaaaaaa-%d\ndata: %d\n\n" % (seq, seq) for seq in (4, 5)]
    assert sink.sent == [HEARTBEAT, *frames]
    assert not history._ahead  # noqa: SLF001


def test_heartbeat_moves_no_stream_back(history):
    """One that began, or was brought, behind the last message keeps its own place."""
    early, late = joined(history, "a"), joined(history, "b")
    late.position = 7
    history.deliver([kept(5)])
    history.heartbeat()
    assert early.sent[-1] == position("aaaaaaaa-5")
    assert late.sent == [HEARTBEAT]


def test_heartbeat_without_a_history_is_one_line(hub):
    """It ends no block, because some clients take a block without data for an event."""
    sink = joined(hub, "a")
    hub.heartbeat()
    hub.deliver([Message("a", "x")])
    hub.heartbeat()
    assert sink.sent == [b":\n", b"data: x\n\n", b":\n"]


def test_heartbeat_tells_a_position_once(history):
    """A stream gets the position again only if that has moved, by an event on any channel."""
    sink = joined(history, "a")
    history.deliver([kept(5, "b")])
    for _ in range(3):
        history.heartbeat()
    assert sink.sent == [position("aaaaaaaa-5"), HEARTBEAT, HEARTBEAT]
    history.deliver([kept(6, "b"), kept(7)])
    for _ in range(2):
        history.heartbeat()
    assert sink.sent[3:] == [b"id: aaaaaaaa-7\ndata: 7\n\n", position("aaaaaaaa-7"), HEARTBEAT]
    opened = Sink("a")
    opened.position = 7  # as its stream-open says
    history.join(opened)
    history.heartbeat()
    assert opened.sent == [HEARTBEAT]


def test_losing_the_broker_holds_each_stream_where_it_is(history):
    """At the last message, or where the stream began if that is later."""
    early, late, held = (joined(history, "a", "b") for _ in range(3))
    late.position = 7
    history.hold(held)
    history.deliver([kept(5)])
    assert history.hold_all() == [early, late]
    assert [early.position, late.position, held.position] == [5, 7, 0]


def test_recording_holds_what_came_live(history):
    """Of the channels asked for, with streams or without, in order, and nothing that no history keeps."""
    recorded = history.record(["a", "b"])
    history.deliver([kept(1), kept(2, "b"), kept(3, "c"), Message("a", "x"), kept(4)])
    assert {channel: [seq for seq, _ in frames] for channel, frames in recorded.items()} == {"a": [1, 4], "b": [2]}
    history.record(())
    history.deliver([kept(5)])
    assert len(recorded["a"]) == 2


def test_numbers_that_are_drawn_again_are_a_new_history(history):
    """Every stream is told, once, and none holds events for ones that it had."""
    sink, ahead = joined(history, "a"), joined(history, "a")
    history.deliver([kept(5)])
    history.hold(ahead)
    ahead.position = 9
    history.join(ahead)
    history.deliver([kept(3), kept(4)])
    for each in (sink, ahead):
        assert b"".join(each.sent).count(b"history-lost") == 1
        assert b"".join(each.sent).endswith(b"data: 3\n\nid: aaaaaaaa-4\ndata: 4\n\n")


def test_payload_that_could_not_be_read_is_said(history):
    """In its place among the others."""
    sink = joined(history, "a", "b")
    history.deliver([kept(1), kept(2)._replace(payload=None), kept(3)])
    assert [b"stream-reset" in part for part in sink.sent[0].split(b"\n\n")] == [False, True, False, False]


def test_channels_without_a_history_are_remembered_and_bounded(history):
    """The newest of them."""
    history.unkept = Unkept(2)
    for channel in "abcb":
        joined(history, channel)
        history.deliver([Message(channel, "x")])
    assert list(history.unkept) == ["c", "b"]


def test_channel_that_many_others_drove_out_is_still_told(history):
    """A plain NOTIFY is announced to a page that returns, even after 10,000 other channels had one."""
    away = Sink("a")
    away.position = 5
    history.deliver([kept(5)._replace(channel="a"), Message("a", "by hand")])
    history.deliver([Message(f"other {number}", "x") for number in range(10_000)])
    # No kept message has given them a place yet, so a stream on any forgotten channel may have missed one.
    assert history.missed_unkept(away) == ("a",)
    assert "a" in history.unkept
    assert len(list(history.unkept)) == 10_000
    history.deliver([kept(7), kept(9)])
    missed = {}
    for away.position in (-1, 0, 5, 6, 7, 9):
        missed[away.position] = history.missed_unkept(away)
    assert missed == {-1: (), 0: ("a",), 5: ("a",), 6: ("a",), 7: (), 9: ()}
    history.deliver([Message("one more", "x")])
    assert history.missed_unkept(away) == ()
    history.restart("history-lost", 0)
    assert history.missed_unkept(away) == ("a",)


def test_gap_on_a_channel_that_many_others_drove_out_is_told(history):
    """The streams on it learn of the gap, because nobody knows any more that it had no event outside the history."""
    sink = joined(history, "a")
    history.deliver([Message("a", "by hand"), *(Message(f"other {number}", "x") for number in range(10_000))])
    history.deliver([Message("a", None, reason="broker-reconnect")])
    assert b'"reason":"broker-reconnect","channels":["a"]' in sink.sent[-1]


def test_event_that_no_history_keeps_has_its_place(history):
    """Who is behind the next message that is kept has had it, on whatever channel that came."""
    sink = joined(history, "a", "b")
    sink.position = 5
    history.deliver([kept(5), Message("a", "by hand")])
    assert history.missed_unkept(sink) == ("a",)
    sink.position = 10**9
    assert history.missed_unkept(sink) == ("a",)
    history.deliver([kept(7)._replace(channel="b"), kept(9)])
    missed = {}
    for sink.position in (-1, 0, 6, 7, 8):
        missed[sink.position] = history.missed_unkept(sink)
    assert missed == {-1: (), 0: ("a",), 6: ("a",), 7: (), 8: ()}
    history.restart("history-lost", 0)
    assert history.missed_unkept(sink) == ("a",)


def test_held_stream_is_told_of_what_no_history_keeps(history):
    """It will not be given it later."""
    sink = joined(history, "a")
    history.hold(sink)
    history.deliver([kept(1), Message("a", "by hand"), Message("b", "by hand")])
    assert len(sink.sent) == 1
    assert b'"reason":"not-kept","channels":["a"]' in sink.sent[0]


class Turns(list):
    """What a hub wants to do later, as a loop would do it."""

    def run(self):
        self.pop(0)()


@pytest.fixture
def turns():
    return Turns()


def test_long_pass_gives_way(turns):
    """Others' events overtake an event for many streams; those on its own channel stay behind it."""
    hub = Hub(later=turns.append)
    many, few = [joined(hub, "many") for _ in range(3 * TURN)], joined(hub, "few")
    hub.deliver([Message("many", "1")])
    assert not any(sink.sent for sink in many)
    hub.deliver([Message("few", "x"), Message("many", "2")])
    assert few.sent == [b"data: x\n\n"]
    late = joined(hub, "many")
    turns.run()
    assert [len(sink.sent) for sink in many] == [1] * TURN + [0] * 2 * TURN
    while turns:
        turns.run()
    assert all(b"".join(sink.sent) == b"data: 1\n\ndata: 2\n\n" for sink in many)
    assert late.sent == []
    assert len(turns) == 0


def test_heartbeats_are_spread(hub):
    """Each stream has one in each round, and keeps its place in it."""
    many = [joined(hub, "many") for _ in range(100)]
    for _ in range(2):
        for part in range(7):
            hub.heartbeat(part, 7)
            hub.remove(many[part])
    counts = [len(sink.sent) for sink in many[7:]]
    assert set(counts) == {2}


def test_what_waits_for_its_pass_goes_out_in_one_write(turns):
    """However many batches it came in; a stream that joins meanwhile gets what comes after it, and is sent to with the others."""
    hub = Hub(later=turns.append)
    many = [joined(hub, "many") for _ in range(2 * TURN)]
    hub.deliver([Message("many", "1")])
    turns.run()
    for number in ("2", "3"):
        hub.deliver([Message("many", number)])
    late = joined(hub, "many")
    for number in ("4", "5"):
        hub.deliver([Message("many", number)])
    while turns:
        turns.run()
    assert {tuple(sink.sent) for sink in many} == {
        (b"data: 1\n\n", b"".join(b"data: %d\n\n" % number for number in (2, 3, 4, 5)))
    }
    assert late.sent == [b"data: 4\n\ndata: 5\n\n"]


def test_long_passes_of_labelled_streams(turns):
    """They are apart from those of the same channel's other streams, and give way as these do."""
    hub = Hub(later=turns.append)
    plain, labelled = ([joined(hub, "a", labels=labels) for _ in range(2 * TURN)] for labels in (False, True))
    hub.deliver([Message("a", "1")])
    turns.run()
    turns.run()
    assert [sum(bool(sink.sent) for sink in sinks) for sinks in (plain, labelled)] == [TURN] * 2
    while turns:
        turns.run()
    assert {tuple(sink.sent) for sink in labelled} == {(b"channel: a\ndata: 1\n\n",)}


def test_long_passes_take_turns(turns):
    """Of two, neither waits for the end of the other; streams on several channels have one of their own."""
    hub = Hub(later=turns.append)
    a, b, c = ([joined(hub, *names) for _ in range(2 * TURN)] for names in (["a"], ["b"], ["c", "d"]))
    hub.deliver([Message("a", "1"), Message("b", "2"), Message("c", "3"), Message("d", "4")])
    for _ in range(3):
        turns.run()
    assert [sum(bool(sink.sent) for sink in sinks) for sinks in (a, b, c)] == [TURN] * 3
    while turns:
        turns.run()
    assert all(sink.sent == [b"data: 3\n\ndata: 4\n\n"] for sink in c)
    assert all(sink.sent for sink in [*a, *b])


def test_one_call_at_a_time_is_on_its_way(turns):
    """The hub asks for one call at a time, however much waits."""
    hub = Hub(later=turns.append)
    for _ in range(2 * TURN):
        joined(hub, "many")
        joined(hub, "one", "another")
    for number in range(10):
        hub.deliver([Message("many", str(number)), Message("one", str(number))])
        assert len(turns) == 1
    while turns:
        turns.run()
        assert len(turns) <= 1
    assert all(sink.sent[-1].endswith(b"data: 9\n\n") for sink in hub)


@pytest.mark.parametrize("channels", [["a"], ["a", "b"], ["Orders", "orders"]])
def test_streams_that_fall_behind_get_larger_writes_and_not_more_of_them(turns, channels):
    """On one channel or on several, what waits is merged, so that the backlog ends with the pass after the last event."""
    hub = Hub(later=turns.append)
    many = [joined(hub, *channels) for _ in range(3 * TURN)]
    for number in range(100):
        hub.deliver([Message(channels[number % len(channels)], str(number))])
        turns.run()
    drain = 0
    while turns:
        turns.run()
        drain += 1
    assert drain <= 2 * 3
    assert {b"".join(sink.sent) for sink in many} == {b"".join(b"data: %d\n\n" % number for number in range(100))}
    assert max(len(sink.sent) for sink in many) <= 100 / 3 + 2


@pytest.mark.parametrize("history", [False, True])
def test_streams_that_join_or_leave_cost_others_nothing(turns, history):
    """Neither on the channel that is under way nor on another one are the others sent to for it, or sent to more often."""
    hub = Hub(history=history, later=turns.append)
    many = [joined(hub, "many") for _ in range(3 * TURN)]
    sent = 0
    for number in range(60):
        hub.deliver([kept(number + 1, "many")])
        before = sum(len(sink.sent) for sink in many)
        for channel in ("many", "other"):
            sink = joined(hub, channel)
            hub.hold(sink)
            hub.join(sink)
            hub.remove(sink)
        assert sum(len(sink.sent) for sink in many) == before
        turns.run()
        sent = sum(len(sink.sent) for sink in many)
        assert sent - before <= TURN
    while turns:
        turns.run()
    assert all(b"".join(sink.sent).count(b"data: ") == 60 for sink in many)
    assert max(len(sink.sent) for sink in many) <= 60 / 3 + 2


def test_loss_of_the_broker_sends_what_waits_once(turns):
    """However large the backlog, each stream that is held gets it in one write, and a reset is sent in turns."""
    hub = Hub(history=True, later=turns.append)
    many = [joined(hub, "a", "b") for _ in range(3 * TURN)]
    for number in range(50):
        hub.deliver([kept(number + 1)])
    hub.hold_all()
    assert {len(sink.sent) for sink in many} == {1}
    plain = Hub(later=turns.append)
    many = [joined(plain, "a", "b") for _ in range(3 * TURN)]
    turns.clear()
    plain.reset("broker-reconnect")
    assert not any(sink.sent for sink in many)
    turns.run()
    assert sum(len(sink.sent) for sink in many) == TURN


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_loss_of_the_broker_copies_no_backlog_for_each_stream(turns, channels):
    """All streams get the very same object, so that its size counts once in memory and it is packed once."""
    hub = Hub(history=True, later=turns.append)
    many = [joined(hub, *channels) for _ in range(3 * TURN)]
    for number in range(5):
        hub.deliver([kept(number + 1)])
    hub.hold_all()
    assert len({id(sink.sent[0]) for sink in many}) <= 3  # one for each turn
    assert {texts(sink)[-1] for sink in many} == {"5"}


def test_streams_that_were_ahead_settle_in_turns(turns):
    """All streams are ahead after a start, until the first event; the next one must not send to all of them at once."""
    hub = Hub(history=True, later=turns.append)
    many = [Sink("many") for _ in range(4 * TURN)]
    for sink in many:
        sink.position = 1
        hub.join(sink)
    for number in range(2, 30):
        before = sum(len(sink.sent) for sink in many)
        hub.deliver([kept(number, "many")])
        if turns:
            turns.run()
        assert sum(len(sink.sent) for sink in many) - before <= 2 * TURN
    while turns:
        turns.run()
    assert not hub._ahead  # noqa: SLF001
    assert all(texts(sink) == [str(number) for number in range(2, 30)] for sink in many)


def test_streams_on_their_own_channels_and_a_common_one_take_turns_too(turns):
    """An event for all of them gives way to other channels' events as one for a large channel does."""
    hub = Hub(later=turns.append)
    users = [joined(hub, "all", f"user-{number}") for number in range(3 * TURN)]
    many = [joined(hub, "many") for _ in range(2 * TURN)]
    few = joined(hub, "few")
    hub.deliver([Message("all", "1"), Message("many", "2"), Message("few", "3")])
    assert few.sent == [b"data: 3\n\n"]
    hub.deliver([Message("few", "4"), Message("user-700", "5")])
    assert len(few.sent) == 2
    while turns:
        before = sum(len(sink.sent) for sink in hub)
        turns.run()
        assert sum(len(sink.sent) for sink in hub) - before <= TURN
    assert all(len(sink.sent) == 1 for sink in [*users, *many])
    assert users[700].sent == [b"data: 1\n\ndata: 5\n\n"]


def test_frames_that_are_the_same_for_several_streams_are_joined_once(turns):
    """So they are packed once, also for streams on several channels that have fallen behind."""
    hub = Hub(later=turns.append)
    many = [joined(hub, "a", "b") for _ in range(2 * TURN)]
    hub.deliver([Message("a", "1")])
    hub.deliver([Message("b", "2")])
    turns.run()
    assert len({id(sink.sent[0]) for sink in many if sink.sent}) == 1


class Reference:
    """A hub beside plain lists of what each stream must get."""

    def __init__(self, hub, turns, seed):
        self.hub = hub
        self.turns = turns
        self.dice = random.Random(seed)
        self.seq = 0
        self.wanted = {}

    def come(self, number=3):
        for _ in range(number):
            sink = Sink(*self.dice.sample("abc", self.dice.choice([1, 1, 2])), labels=self.dice.random() < 0.2)
            sink.position = self.seq + self.dice.choice([0, 0, 3])
            self.hub.join(sink)
            self.wanted[sink] = []

    def deliver(self):
        batch = [kept(self.seq + n, self.dice.choice("abc")) for n in range(1, self.dice.randrange(2, 5))]
        self.seq += len(batch)
        for message in batch:
            for sink, frames in self.wanted.items():
                if message.channel in sink.channels and message.seq > sink.position:
                    frames.append(message.payload)
        self.hub.deliver(batch)

    def turn(self):
        if self.turns:
            self.turns.run()

    def leave(self):
        sink = self.flush()
        self.hub.remove(sink)
        del self.wanted[sink]

    def flush(self):
        sink = self.dice.choice(list(self.wanted))
        self.hub.flush(sink)
        assert texts(sink) == self.wanted[sink]
        return sink

    def hold(self):
        sink = self.dice.choice(list(self.wanted))
        self.hub.hold(sink)
        assert texts(sink) == self.wanted[sink]
        self.hub.join(sink)

    def reset(self):
        self.hub.reset("broker-reconnect")
        for frames in self.wanted.values():
            frames.append("reset")


@pytest.mark.parametrize("seed", range(30))
def test_each_stream_gets_what_is_delivered_while_it_is_there(turns, seed):
    """In order and once, whatever joins, leaves, is held, is ahead or is flushed between the turns of large passes."""
    reference = Reference(Hub(history=True, later=turns.append), turns, seed)
    reference.come(2 * TURN)
    actions = [reference.deliver, reference.turn] * 4
    actions += [reference.come, reference.leave, reference.flush, reference.hold, reference.reset]
    for _ in range(150):
        reference.dice.choice(actions)()
    while turns:
        turns.run()
    assert {sink: texts(sink) for sink in reference.wanted} == reference.wanted


def texts(sink):
    """The data of the events that a stream got, and "reset" for each reset."""
    found = re.findall(rb"event: (stream-reset)|data: (\d+)\n", b"".join(sink.sent))
    return ["reset" if reset else data.decode() for reset, data in found]


def test_stream_that_leaves_a_long_pass_costs_it_nothing(turns):
    """Its place is not given to another."""
    hub = Hub(later=turns.append)
    many = [joined(hub, "many") for _ in range(2 * TURN)]
    hub.deliver([Message("many", "1")])
    for sink in many[TURN - 5 : TURN + 5]:
        hub.remove(sink)
    while turns:
        turns.run()
    assert all(len(sink.sent) == 1 for sink in many if sink in hub)


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_stream_that_leaves_gets_nothing_of_what_waits(turns, channels):
    """The hub forgets the frames for it, whether they wait for its group or for it alone."""
    hub = Hub(later=turns.append)
    many = [joined(hub, *channels) for _ in range(2 * TURN)]
    hub.deliver([Message("a", "1")])
    for sink in many[:TURN]:
        hub.remove(sink)
    while turns:
        turns.run()
    assert [len(sink.sent) for sink in many] == [0] * TURN + [1] * TURN


@pytest.mark.parametrize("channels", ["a", "ab"])
def test_new_history_within_a_batch_comes_between_its_events(history, channels):
    """A page gets the events of the old history, then the reset, then those of the new one."""
    sink = joined(history, *channels)
    history.deliver([kept(5), kept(3), kept(4)])
    assert texts(sink) == ["5", "reset", "3", "4"]


@pytest.mark.parametrize("what", ["hold_all", "reset", "hold", "join"])
def test_what_is_under_way_comes_before_a_change(turns, what):
    """A stream that is held, told of a loss, or put elsewhere has had all that was delivered before."""
    hub = Hub(history=True, later=turns.append)
    many = [joined(hub, "many") for _ in range(2 * TURN)]
    hub.deliver([Message("many", "1", "00000000-1", 1)])
    hub.heartbeat()
    assert many[-1].sent == [HEARTBEAT]  # no id of what it does not have yet
    {"hold_all": hub.hold_all, "reset": lambda: hub.reset("broker-reconnect")}.get(
        what, lambda: getattr(hub, what)(many[-1])
    )()
    if what == "reset":  # it waits behind the event, for the same turn
        turns.run()
        turns.run()
    assert b"data: 1" in many[-1].sent[1]
    hub.deliver([Message("many", "2", "00000000-2", 2)])
    while turns:
        turns.run()
    assert sum(b"data: 1" in data for data in many[-1].sent) == 1


def test_labelled_streams_are_counted(hub):
    """As the others of their channel are: their number, and what is delivered to them."""
    for labels in (False, True):
        joined(hub, "a", labels=labels)
        joined(hub, "a", "b", labels=labels)
    hub.deliver([Message("a", "1")])
    sizes = {}
    for channel, number in hub.sizes():
        sizes[channel] = sizes.get(channel, 0) + number
    assert sizes == {"a": 4, "b": 2}
    assert hub.counts.own(DELIVERIES) == 4


def test_stream_that_is_ahead_keeps_its_labels():
    """One that the history has brought further than the broker's messages have come, until these are there as well."""
    hub = Hub(history=True)
    sink = Sink("a", labels=True)
    sink.position = 2
    hub.join(sink)
    hub.deliver([Message("a", str(number), f"00000000-{number}", number) for number in (1, 2, 3)])
    hub.deliver([Message("a", "4", "00000000-4", 4)])
    labelled = [b"channel: a\nseq: %d\nid: 00000000-%d\ndata: %d\n\n" % (number, number, number) for number in (3, 4)]
    assert sink.sent == labelled


@pytest.mark.parametrize("streams", [1, 3, TURN, 2 * TURN + 5])
def test_each_stream_is_timed_once(turns, streams):
    """As written to, from when the events came from the broker; each pass once."""
    hub = Hub(later=turns.append)
    for _ in range(streams):
        joined(hub, "a")
    joined(hub, "a", "b")
    hub.deliver([Message("a", "1"), Message("a", "2"), Message("nobody", "3")], time.monotonic() - 7)
    while turns:
        turns.run()
    *latencies, seconds = hub.counts.cells(LATENCY)
    assert sum(latencies) == latencies[LATENCY.bounds.index(10.0)] == streams + 1
    assert 7 * (streams + 1) <= seconds
    *passes, took = hub.counts.cells(FANOUT)
    assert sum(passes) == 1 + (streams >= TURN)
    assert took < seconds
    assert hub.counts.own(EVENTS) == 3
    assert hub.counts.own(DELIVERIES) == 2 * (streams + 1)


def test_streams_that_have_left_are_not_timed(turns):
    """Neither are groups that are empty when their turn comes, nor streams that were sent to before their turn."""
    hub = Hub(later=turns.append)
    many = [joined(hub, "many") for _ in range(2 * TURN)]
    users = [joined(hub, f"user-{number}") for number in range(TURN + 10)]
    hub.deliver([Message("many", "1"), *(Message(f"user-{number}", "2") for number in range(TURN + 10))])
    for sink in [*many[:20], *users[TURN:]]:
        hub.remove(sink)
    hub.flush(many[-1])
    while turns:
        turns.run()
    assert sum(hub.counts.cells(LATENCY)[:-1]) == 2 * TURN - 20 - 1 + TURN
    assert sum(hub.counts.cells(FANOUT)[:-1]) == 2


def test_resets_are_not_timed(turns):
    """The latency is that of events from the broker."""
    hub = Hub(later=turns.append)
    for channels in ["a"] * (2 * TURN) + ["ab", "c"]:
        joined(hub, *channels)
    hub.reset("broker-reconnect")
    while turns:
        turns.run()
    assert all(sink.sent for sink in hub)
    assert not any(hub.counts.cells(LATENCY) + hub.counts.cells(FANOUT))


def test_resets_are_counted_by_reason(history):
    """Each stream that is told of one, however it comes."""
    joined(history, "a")
    joined(history, "b")
    history.hold(joined(history, "a", "b"))
    history.deliver([kept(1), Message("a", "by hand"), Message("b", None, "00000000-2", 2)])
    history.reset("broker-reconnect")
    told = {reason: history.counts.own(RESETS, reason) for reason in RESETS.at}
    assert {reason: number for reason, number in told.items() if number} == {
        "not-kept": 1,
        "unreadable-payload": 1,
        "broker-reconnect": 3,
    }
