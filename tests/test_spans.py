import pytest

from tornado_relay.history.spans import Cursor, Spans, parse

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"


@pytest.mark.parametrize("cursor", [Cursor(A, 0), Cursor("0123abcd", 2**62)])
def test_a_place_comes_back_as_it_was_written(cursor):
    """On the wire and from there."""
    assert parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    "text",
    ["", "earliest", A, f"{A}-", f"{A}--1", f"{A}-01", f"{A}-1 ", f" {A}-1", f"{A}-1.5", "zz-1", f"{A}-" + "9" * 20],
)
def test_what_is_no_place_of_ours(text):
    """It may be an id of the publisher's own."""
    assert parse(text) is None


def test_places_of_each_span():
    """From just before its first event to just before the next span's; the last one has no end."""
    spans = Spans([(A, 1), (B, 10), (C, 10)])
    assert [seq for seq in range(20) if spans.admits(Cursor(A, seq))] == list(range(10))
    assert [seq for seq in range(20) if spans.admits(Cursor(B, seq))] == [9]
    assert [seq for seq in range(20) if spans.admits(Cursor(C, seq))] == list(range(9, 20))
    assert not spans.admits(Cursor("dddddddd", 5))
