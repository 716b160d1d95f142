"""What a stream gets of pages, as plain functions."""

from tornado_relay.events import position
from tornado_relay.history.page import PART_BYTES, FramedPage, Page, Part, Row, part
from tornado_relay.history.spans import Cursor

HEAD = Cursor("aaaaaaaa", 100)
HERE = position(str(HEAD))


def frames(*numbers, size=0):
    return [(number, b"%d." % number + b"x" * size) for number in numbers]


def whole(*numbers, through=0):
    return FramedPage(frames(*numbers), None, through)


def cut(*numbers):
    return FramedPage(frames(*numbers), numbers[-1], 0)


def test_events_of_all_channels_in_their_order():
    """And then the place up to which the history was read."""
    pages = {"a": whole(3, 7), "b": whole(5, 8)}
    assert part(2, pages, [[], []], HEAD) == Part(b"3.5.7.8." + HERE, 100, True, {})


def test_page_that_was_cut_ends_all():
    """What comes behind it on other channels waits until the rest of it is read."""
    pages = {"a": cut(3, 7), "b": whole(5, 8), "c": cut(4, 9)}
    assert part(2, pages, [[], [], []], HEAD) == Part(b"3.4.5.7.", 7, False, {})


def test_page_that_there_was_no_room_for_ends_all_before_its_first_event():
    """Its channel has nothing up to there."""
    pages = {"a": whole(3, 7), "b": FramedPage([], 4, 0)}
    assert part(2, pages, [[], []], HEAD) == Part(b"3.", 4, False, {})


def test_labels():
    """Each event is told the channel of, whether it was kept or has come live."""
    pages = {"a": whole(3), "b": whole(5)}
    tails = [frames(101), frames(102)]
    lines = [("a", 3), ("b", 5), ("a", 101), ("b", 102)]
    data = b"".join(b"channel: %b\nseq: %d\n%d." % (name.encode(), number, number) for name, number in lines)
    assert part(2, pages, tails, HEAD, labels=True) == Part(data, 102, True, {})


def test_live_events_follow_each_once():
    """Those that the pages have already are left out."""
    pages = {"a": whole(3, 99), "b": whole()}
    tails = [frames(99, 101, 104), frames(100, 102)]
    assert part(2, pages, tails, HEAD) == Part(b"3.99.101.102.104.", 104, True, {})


def test_stream_that_is_further_than_the_head():
    """It has come live, on this or another relay, behind the moment of the read."""
    assert part(102, {"a": whole()}, [frames(101, 102, 103)], HEAD) == Part(b"103.", 103, True, {})
    assert part(102, {"a": whole()}, [frames(101, 102)], HEAD) == Part(b"", 102, True, {})


def test_end_tells_the_place_unless_the_last_event_has():
    """A client that gets no event may have an older id, or an id of a publisher's own."""
    assert part(2, {"a": whole(100)}, [[]], HEAD) == Part(b"100.", 100, True, {})
    assert part(100, {"a": whole()}, [[]], HEAD) == Part(HERE, 100, True, {})
    assert part(2, {"a": whole()}, [[]], HEAD) == Part(HERE, 100, True, {})
    assert part(-1, {"a": whole()}, [[]], HEAD).data == HERE


def test_part_is_bounded_over_many_channels():
    """It ends with the event that fills it."""
    pages = {
        name: FramedPage(frames(*range(first, 100, 3), size=PART_BYTES // 10), None, 0)
        for name, first in (("a", 1), ("b", 2), ("c", 3))
    }
    given = part(0, pages, [[], [], []], HEAD)
    assert (given.position, given.complete, given.data.count(b".")) == (10, False, 10)


def test_gaps_are_of_the_channels_that_lost_something_behind_the_place():
    """For a stream that takes what there is they are those that it is never told of."""
    pages = {"a": whole(7, through=6), "b": whole(8, through=2), "c": whole(through=100)}
    assert part(2, pages, [[], [], []], HEAD).gaps == {"a": 6, "c": 100}
    assert part(0, pages, [[], [], []], HEAD).gaps == {"a": 6, "b": 2, "c": 100}
    assert part(-1, pages, [[], [], []], HEAD).gaps == {"a": 6, "b": 2, "c": 100}


def test_frames_carry_the_ids():
    """Each event is framed once for all streams at a place."""
    page = Page([Row(3, "aaaaaaaa-3", '{"data":"x"}')], end=3, through=1)
    assert page.framed() == FramedPage([(3, b"id: aaaaaaaa-3\ndata: x\n\n")], end=3, through=1)
